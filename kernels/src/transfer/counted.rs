//! Transfers of tensors that are counted, or are shadows: what they hold while a copy is under way.
//!
//! A copy between GPUs is ordered by events, and its source is not free before the stream that frees it has waited for the
//! copy. The same moments count here: a source that was sent counts on its device until the sender settles, and one that
//! was parked until the group behind it begins.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Result, Shape};

use super::Route;
use crate::ledger::{Allocation, Label, Ledger};
use crate::tensor::{Device, Tensor};

/// Sources of copies, and the pinned host memory that the copies go to.
#[derive(Debug)]
pub(super) struct Sources {
    /// What a source is counted as while its copy is under way, and what its buffer in host memory is.
    labels: [Label; 2],
    /// Where copies go through host memory.
    host: Option<Ledger>,
    /// Buffers there are multiples of this.
    grain: u64,
    /// Whether copies need a source without gaps.
    is_gpu: bool,
    /// Whether the other side gets a copy; in the same memory it gets the tensor itself.
    is_copied: bool,
    held: Mutex<Vec<Held>>,
}

/// A source that counts until its sender settles, between GPUs after its copy is done.
#[derive(Debug)]
struct Held {
    _source: Option<Arc<Allocation>>,
    is_copied: Arc<AtomicBool>,
}

/// The copy of a source.
#[derive(Debug)]
pub(super) struct Copy {
    is_done: Arc<AtomicBool>,
    /// In host memory, where it goes through that.
    _buffer: Option<Allocation>,
}

impl Copy {
    /// The other side has it.
    pub fn finish(&self) {
        self.is_done.store(true, Ordering::Relaxed);
    }
}

impl Sources {
    /// Of a link from `from` to `to`. Of two shadow GPUs without a route each reads the other's memory.
    pub fn of_link(from: &Device, to: &Device, route: Route) -> Self {
        let is_gpu = from.as_shadow_gpu().is_some();
        Self {
            labels: ["boundary", "boundary"],
            host: from.host_ledger().filter(|_| route == Route::Host).cloned(),
            grain: 1,
            is_gpu,
            is_copied: is_gpu && from.location() != to.location(),
            held: Mutex::default(),
        }
    }

    /// Counts `x` until its copy is done and [`Self::settle`] is called; the result is `x` without its memory, and its copy.
    pub fn hold(&self, x: Tensor) -> Result<(Tensor, Copy)> {
        let x = if self.is_gpu { x.contiguous()? } else { x };
        let bytes = (x.elem_count() * x.dtype().size_in_bytes()) as u64;
        let buffer = bytes.next_multiple_of(self.grain);
        let _buffer = self.host.as_ref().map(|host| host.take_as(self.labels[1], buffer));
        // What goes to host memory needs nobody to receive it: the stream waits for the copy when its sender settles.
        let is_done = Arc::new(AtomicBool::new(self.host.is_some()));
        if self.is_copied {
            x.relabel(self.labels[0]);
            let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
            held.push(Held { _source: x.allocation(), is_copied: is_done.clone() });
        }
        Ok((x.without_allocation(), Copy { is_done, _buffer }))
    }

    /// Lets go of the sources whose copies are done.
    pub fn settle(&self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.retain(|held| !held.is_copied.load(Ordering::Relaxed));
    }

    /// How many sources are held.
    pub fn live(&self) -> usize {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

/// Pinned host memory beside the shadow of a GPU.
#[derive(Debug)]
pub(super) struct Store {
    device: Device,
    leaving: Sources,
}

/// A tensor in a [`Store`].
#[derive(Debug)]
pub(super) struct Parked {
    store: Arc<Store>,
    shape: Shape,
    dtype: DType,
    _copy: Copy,
    returning: Option<Tensor>,
}

impl Store {
    /// Whose buffers are counted as `label`, in multiples of `grain` bytes.
    pub fn new(device: &Device, label: Label, grain: u64) -> Self {
        let (labels, host) = (["leaving", label], device.host_ledger().cloned());
        let held = Mutex::default();
        let leaving = Sources { labels, host, grain, is_gpu: true, is_copied: true, held };
        Self { device: device.clone(), leaving }
    }

    /// See [`super::HostStore::park`].
    pub fn park(self: &Arc<Self>, x: Tensor) -> Result<Parked> {
        let (shape, dtype) = (x.shape().clone(), x.dtype());
        let (_, copy) = self.leaving.hold(x)?;
        Ok(Parked { store: self.clone(), shape, dtype, _copy: copy, returning: None })
    }

    /// See [`super::HostStore::next_group`].
    pub fn next_group(&self) {
        self.leaving.settle();
    }
}

impl Parked {
    /// See [`super::Parked::prefetch`].
    pub fn prefetch(&mut self) {
        self.returned();
    }

    /// See [`super::Parked::take`].
    pub fn take(mut self) -> Tensor {
        self.returned().clone()
    }

    fn returned(&mut self) -> &Tensor {
        let Self { store, shape, dtype, returning, .. } = self;
        returning.get_or_insert_with(|| {
            store.next_group();
            let x = Tensor::shadow(shape.clone(), *dtype, &store.device);
            x.relabel("coming back");
            x
        })
    }
}
