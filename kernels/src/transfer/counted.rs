//! Transfers of tensors that are counted, or are shadows: what they hold while a copy is under way.
//!
//! A copy between GPUs is ordered by events, and its source is not free before the stream that frees it has waited for the
//! copy. The same moments count here: a source that was sent counts on its device until the sender settles, and one that
//! was parked until the group behind it begins.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Result, Shape};

use super::Route;
use crate::ledger::{Allocation, Label, Ledger};
use crate::tensor::{Device, ShadowRoute, Tensor};

/// Sources of copies, and the pinned host memory that the copies go to.
#[derive(Debug)]
pub(super) struct Sources {
    /// What a source is counted as while its copy is under way, and what its buffer in host memory is.
    labels: [Label; 2],
    /// Where copies go through host memory.
    host: Option<Ledger>,
    /// Whether copies are made by kernels, which need a source without gaps.
    is_gpu: bool,
    held: Mutex<Vec<Arc<Allocation>>>,
}

impl Sources {
    /// Of a link from `from` to another device.
    pub fn of_link(from: &Device, route: Route) -> Self {
        let gpu = from.as_shadow_gpu();
        let is_by_host = gpu.is_some_and(|gpu| route == Route::Host || gpu.route == ShadowRoute::Host);
        let host = from.host_ledger().filter(|_| is_by_host).cloned();
        Self { labels: ["boundary", "boundary"], host, is_gpu: gpu.is_some(), held: Mutex::default() }
    }

    /// Counts `x` until [`Self::clear`]; the result is `x` without its memory, and the buffer that it is copied to.
    pub fn hold(&self, x: Tensor) -> Result<(Tensor, Option<Allocation>)> {
        let x = if self.is_gpu { x.contiguous()? } else { x };
        let bytes = (x.elem_count() * x.dtype().size_in_bytes()) as u64;
        let buffer = self.host.as_ref().map(|host| host.take_as(self.labels[1], bytes));
        x.relabel(self.labels[0]);
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.extend(x.allocation());
        Ok((x.without_allocation(), buffer))
    }

    /// Lets go of all sources.
    pub fn clear(&self) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).clear();
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
    _buffer: Option<Allocation>,
    returning: Option<Tensor>,
}

impl Store {
    pub fn new(device: &Device) -> Self {
        let (labels, host) = (["leaving", "parked"], device.host_ledger().cloned());
        Self {
            device: device.clone(),
            leaving: Sources { labels, host, is_gpu: true, held: Mutex::default() },
        }
    }

    /// See [`super::HostStore::park`].
    pub fn park(self: &Arc<Self>, x: Tensor) -> Result<Parked> {
        let (shape, dtype) = (x.shape().clone(), x.dtype());
        let (_, _buffer) = self.leaving.hold(x)?;
        Ok(Parked { store: self.clone(), shape, dtype, _buffer, returning: None })
    }

    /// See [`super::HostStore::next_group`].
    pub fn next_group(&self) {
        self.leaving.clear();
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
