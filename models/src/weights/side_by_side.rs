//! Several parts of a model at once on their way to one GPU.
//!
//! A tensor begins with an allocation and ends with copies that are still under way, and a quantised one with a kernel; while
//! that is so of one, the cores read another, and the link is never idle.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use kernels::{DType, Device, Tensor};

use super::frozen::Frozen;
use super::loader::TensorSpec;
use crate::Result;

/// How many parts are read at once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AtOnce(usize);

impl AtOnce {
    /// Parts that stay on the device.
    pub const RESIDENT: Self = Self(3);
    /// Parts that go on to host memory: no more than a step has on the device at once.
    pub const PASSING: Self = Self(2);

    /// On `device`. Shadows are played one by one, in order; a CPU has no link, and a single tensor keeps all its cores busy.
    fn on(self, device: &Device) -> usize {
        if device.is_cpu() || device.is_shadow() { 1 } else { self.0 }
    }
}

/// What `load` makes of each of `items`, in their order; several threads call it where the tensors go to a GPU.
///
/// # Errors
/// The error of the foremost item that fails; nothing is begun after a failure.
pub(crate) fn loaded<I: Sync, T: Send>(
    items: &[I],
    device: &Device,
    at_once: AtOnce,
    load: impl Fn(usize, &I) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let threads = at_once.on(device).min(items.len());
    if threads <= 1 {
        return items.iter().enumerate().map(|(index, item)| load(index, item)).collect();
    }
    on_threads(items, threads, load)
}

/// What `load` makes of each of `items`, in their order, on so many threads. Items are begun in order, so that all before one that
/// fails end too.
///
/// # Errors
/// The error of the foremost item that fails; nothing is begun after a failure.
pub fn on_threads<I: Sync, T: Send>(
    items: &[I],
    threads: usize,
    load: impl Fn(usize, &I) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let (next, has_failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let done = Mutex::new(Vec::with_capacity(items.len()));
    let work = || {
        while !has_failed.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { break };
            let made = load(index, item);
            if made.is_err() {
                has_failed.store(true, Ordering::Relaxed);
            }
            done.lock().unwrap_or_else(PoisonError::into_inner).push((index, made));
        }
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().for_each(|thread| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        });
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, made)| made).collect()
}

/// On the shadow of a GPU, what the matrices among `specs` take beyond those of [`loaded`] one by one: each that is quantised is
/// there as it is stored too, for a moment.
///
/// # Errors
/// Never, on a shadow.
pub(crate) fn beside(
    specs: impl Iterator<Item = TensorSpec>,
    frozen: Frozen,
    device: &Device,
    at_once: AtOnce,
) -> Result<Option<Tensor>> {
    if !device.is_shadow() || device.is_cpu() || !frozen.is_quantised() {
        return Ok(None);
    }
    let matrices = specs.filter(|spec| spec.class.is_matrix());
    let largest = matrices.map(|spec| spec.shape.iter().product::<usize>()).max().unwrap_or(0);
    let stored = Tensor::zeros((at_once.0 - 1, largest), DType::F32, device)?;
    stored.relabel("weights to quantise");
    Ok(Some(stored))
}
