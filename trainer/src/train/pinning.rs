//! Host memory that is pinned in the background while a run's models are read and its clips encoded.
//!
//! Inside the first step it would take as long as the step itself, or several times that, with every card waiting.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use kernels::Device;
use kernels::transfer::HostStore;

use crate::bytes::Bytes;
use crate::error::Result;
use crate::machine::memory::host_shares;
use crate::plan::Planned;
use crate::watch::ui::{Bar, Ui};

/// The host memory beside each stage, on its way to be pinned.
pub(super) struct Pinning {
    stores: Vec<HostStore>,
    threads: Vec<JoinHandle<kernels::Result<()>>>,
    stop: Arc<AtomicBool>,
    bar: Option<Bar>,
    bytes: u64,
    started: Instant,
}

impl Pinning {
    /// Starts pinning what the plan parks at once beside each stage of `split`, a thread for each.
    ///
    /// # Errors
    /// A device that fails.
    pub fn start(planned: &Planned, split: &[(Device, Range<usize>)], ui: &Ui) -> Result<Self> {
        let plan = &planned.plan;
        let pinned = plan.memory.pinned.map_or(0, |pinned| pinned.0);
        let limits = host_shares(pinned, split.len(), plan.under_way());
        let mut pinning = Self {
            stores: Vec::new(),
            threads: Vec::new(),
            stop: Arc::default(),
            bar: None,
            bytes: 0,
            started: Instant::now(),
        };
        let mut slabs = planned.forecast.slabs();
        slabs.resize(split.len(), Vec::new());
        for (((device, _), limit), slabs) in split.iter().zip(limits).zip(&mut slabs) {
            let store = HostStore::new(device)?;
            store.set_limit(limit);
            pinning.stores.push(store);
            if !device.is_cuda() {
                slabs.clear();
            }
        }
        pinning.bytes = slabs.iter().flatten().sum();
        if pinning.bytes > 0 {
            let bar = ui.bytes_bar(format!("{:>16}", "pinning memory"), pinning.bytes);
            let stores = pinning.stores.iter().cloned().zip(slabs);
            pinning.threads =
                stores.map(|(store, slabs)| pinning.thread(store, slabs, bar.clone())).collect();
            pinning.bar = Some(bar);
        }
        Ok(pinning)
    }

    fn thread(&self, store: HostStore, slabs: Vec<u64>, bar: Bar) -> JoinHandle<kernels::Result<()>> {
        let stop = self.stop.clone();
        thread::spawn(move || {
            let before = std::cell::Cell::new(0);
            let go_on = |done: u64| {
                bar.inc((done - before.replace(done)) as usize);
                !stop.load(Ordering::Relaxed)
            };
            store.reserve(&slabs, &go_on)?;
            go_on(slabs.iter().sum());
            Ok(())
        })
    }

    /// The stores, first stage to last.
    pub fn stores(&self) -> &[HostStore] {
        &self.stores
    }

    /// Waits for what is not pinned yet.
    ///
    /// # Errors
    /// Memory that the system does not let be pinned.
    pub fn finish(mut self, ui: &Ui) -> Result<()> {
        let (waited_from, threads) = (Instant::now(), std::mem::take(&mut self.threads));
        if !threads.is_empty() {
            let mut joined = threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            ui.phase("waiting for pinned memory", || joined.try_for_each(|pinned| pinned))?;
        }
        if let Some(bar) = self.bar.take() {
            bar.finish();
            let (all, waited) = (self.started.elapsed(), waited_from.elapsed());
            ui.say(&format!(
                "pinned {} of host memory in the background; the first step waited {:.1} of {:.1} s for it",
                Bytes(self.bytes),
                waited.as_secs_f64(),
                all.as_secs_f64()
            ));
        }
        Ok(())
    }
}

impl Drop for Pinning {
    /// A run that ends before its first step stops pinning at the next slab.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // The run has an error of its own to tell, or was stopped.
            let _ = thread.join();
        }
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
    }
}
