//! Transfers of counted tensors and shadows: the memory that is in use while a copy is under way.
//!
//! A copy between GPUs is ordered by events, and its source is not freed before the stream that frees it has waited for the
//! copy. The ledger follows the same moments: a source that was sent counts on its device until the sender settles, and one
//! that was parked until the next group begins.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Result, Shape};

use super::Route;
use crate::ledger::{Allocation, Label, Ledger};
use crate::tensor::{Device, Tensor};

/// Sources of copies, and the pinned host memory that the copies go to.
#[derive(Debug)]
pub(super) struct Sources {
    /// The labels of a source whose copy is under way, and of its buffer in host memory.
    labels: [Label; 2],
    /// The ledger of host memory, if copies are routed through it.
    host: Option<Ledger>,
    /// Buffers there are multiples of this.
    grain: u64,
    /// Whether copies need a contiguous source.
    is_gpu: bool,
    /// Whether the receiver gets a copy; in the same memory it gets the tensor itself.
    is_copied: bool,
    sources: Mutex<Vec<CountedSource>>,
}

/// A source that is counted until its sender settles, between GPUs after its copy is done.
#[derive(Debug)]
struct CountedSource {
    _source: Option<Arc<Allocation>>,
    is_copied: Arc<AtomicBool>,
}

/// The copy of a source.
#[derive(Debug)]
pub(super) struct Copy {
    is_done: Arc<AtomicBool>,
    /// In host memory, if the copy is routed through it.
    _buffer: Option<Allocation>,
}

impl Copy {
    /// Marks it as received.
    pub fn finish(&self) {
        self.is_done.store(true, Ordering::Relaxed);
    }
}

impl Sources {
    /// Of a link from `from` to `to`. Two shadow GPUs have peer access unless the route is through host memory.
    pub fn of_link(from: &Device, to: &Device, route: Route) -> Self {
        let is_gpu = from.as_shadow_gpu().is_some();
        Self {
            labels: ["boundary", "boundary"],
            host: from.host_ledger().filter(|_| route == Route::Host).cloned(),
            grain: 1,
            is_gpu,
            is_copied: is_gpu && from.location() != to.location(),
            sources: Mutex::default(),
        }
    }

    /// Counts `x` until its copy is done and [`Self::settle`] is called; the result is `x` without its memory, and its copy.
    pub fn hold(&self, x: Tensor) -> Result<(Tensor, Copy)> {
        let x = if self.is_gpu { x.contiguous()? } else { x };
        let bytes = (x.elem_count() * x.dtype().size_in_bytes()) as u64;
        let buffer = bytes.next_multiple_of(self.grain);
        let _buffer = self.host.as_ref().map(|host| host.take_as(self.labels[1], buffer));
        // A copy to host memory has no receiver: the stream waits for it when its sender settles.
        let is_done = Arc::new(AtomicBool::new(self.host.is_some()));
        if self.is_copied {
            x.relabel(self.labels[0]);
            let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
            sources.push(CountedSource { _source: x.allocation(), is_copied: is_done.clone() });
        }
        Ok((x.without_allocation(), Copy { is_done, _buffer }))
    }

    /// Frees the sources whose copies are done.
    pub fn settle(&self) {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        sources.retain(|source| !source.is_copied.load(Ordering::Relaxed));
    }

    /// How many sources are still counted.
    pub fn live(&self) -> usize {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

/// Pinned host memory of a shadow GPU.
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
    /// The store of `device`, whose buffers are labelled `label`, in multiples of `grain` bytes.
    pub fn new(device: &Device, label: Label, grain: u64) -> Self {
        let (labels, host) = (["leaving", label], device.host_ledger().cloned());
        let sources = Mutex::default();
        let leaving = Sources { labels, host, grain, is_gpu: true, is_copied: true, sources };
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

    /// A copy on `device`; what is parked stays.
    pub fn copied(&self, device: &Device) -> Tensor {
        let x = Tensor::shadow(self.shape.clone(), self.dtype, device);
        x.relabel("streamed weights");
        x
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
