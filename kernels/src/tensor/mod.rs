//! The value that models compute with: a tensor, or the shadow of one.
//!
//! A shadow has a shape, strides, a dtype and a device, and no numbers (like PyTorch's FakeTensor). Every operation changes a
//! shadow's layout as it changes a tensor's, so the code that trains a model also computes, on shadows, what it would
//! allocate. Tensors of a device with a [`Ledger`](crate::ledger::Ledger) are counted, real ones and shadows alike: an
//! operation that writes a new tensor allocates, clones and views share its memory, and the last of them frees it.
//!
//! Methods have candle's names and meaning. What candle composes of several operations (means, padding) is composed here, so
//! that intermediate tensors are counted too.

mod arithmetic;
mod create;
mod device;
mod join;
mod math;
mod operators;
mod read;
mod view;

use std::fmt;
use std::sync::Arc;

use candle_core::{DType, Error, Layout, Result, Shape};

pub use device::{Device, ShadowAttention, ShadowGpu};
#[cfg(feature = "cuda")]
pub(crate) use device::{Kind, Other};

use crate::ledger::{Allocation, Label};

/// A tensor, or the shadow of one. Clones and views share its memory.
#[derive(Clone)]
pub struct Tensor {
    body: Body,
    device: Device,
    /// Its allocation in its device's ledger, if that has one.
    allocation: Option<Arc<Allocation>>,
}

#[derive(Clone)]
enum Body {
    Real(candle_core::Tensor),
    Shadow(Shadow),
}

/// A tensor without numbers.
#[derive(Clone)]
struct Shadow {
    layout: Layout,
    dtype: DType,
    /// Number of elements of the memory that it is a view of.
    stored: usize,
}

/// A shadow was asked for its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoNumbers;

impl fmt::Display for NoNumbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the shadow of a tensor has no numbers to read")
    }
}

impl std::error::Error for NoNumbers {}

impl Shadow {
    fn shape(&self) -> &Shape {
        self.layout.shape()
    }
}

impl Tensor {
    /// A tensor of candle on `device`, where its memory is.
    pub fn from_candle(x: candle_core::Tensor, device: &Device) -> Self {
        let bytes = || stored(&x) * x.dtype().size_in_bytes();
        let allocation = device.ledger().map(|ledger| Arc::new(ledger.take(bytes() as u64)));
        Self { body: Body::Real(x), device: device.clone(), allocation }
    }

    /// The tensor of candle.
    ///
    /// # Errors
    /// [`NoNumbers`] where it is a shadow.
    pub fn as_candle(&self) -> Result<&candle_core::Tensor> {
        match &self.body {
            Body::Real(x) => Ok(x),
            Body::Shadow(_) => Err(Error::wrap(NoNumbers)),
        }
    }

    /// Whether it has no numbers.
    pub fn is_shadow(&self) -> bool {
        matches!(self.body, Body::Shadow(_))
    }

    /// Its dtype.
    pub fn dtype(&self) -> DType {
        match &self.body {
            Body::Real(x) => x.dtype(),
            Body::Shadow(x) => x.dtype,
        }
    }

    /// Where it is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Its shape and strides.
    pub fn layout(&self) -> &Layout {
        match &self.body {
            Body::Real(x) => x.layout(),
            Body::Shadow(x) => &x.layout,
        }
    }

    /// Its shape.
    pub fn shape(&self) -> &Shape {
        self.layout().shape()
    }

    /// Sizes of its dimensions.
    pub fn dims(&self) -> &[usize] {
        self.shape().dims()
    }

    /// Size of one dimension.
    ///
    /// # Errors
    /// If there is no such dimension, as for all methods that take one.
    pub fn dim(&self, dim: impl candle_core::shape::Dim) -> Result<usize> {
        let dim = dim.to_index(self.shape(), "dim")?;
        Ok(self.dims()[dim])
    }

    /// The one dimension.
    ///
    /// # Errors
    /// If there are more or fewer; likewise for the methods that follow.
    pub fn dims1(&self) -> Result<usize> {
        self.shape().dims1()
    }

    /// Both dimensions.
    pub fn dims2(&self) -> Result<(usize, usize)> {
        self.shape().dims2()
    }

    /// All three dimensions.
    pub fn dims3(&self) -> Result<(usize, usize, usize)> {
        self.shape().dims3()
    }

    /// All four dimensions.
    pub fn dims4(&self) -> Result<(usize, usize, usize, usize)> {
        self.shape().dims4()
    }

    /// All five dimensions.
    pub fn dims5(&self) -> Result<(usize, usize, usize, usize, usize)> {
        self.shape().dims5()
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.shape().rank()
    }

    /// Number of elements.
    pub fn elem_count(&self) -> usize {
        self.shape().elem_count()
    }

    /// Steps in memory along each dimension, in elements.
    pub fn stride(&self) -> &[usize] {
        self.layout().stride()
    }

    /// Whether its elements are in row-major order without gaps.
    pub fn is_contiguous(&self) -> bool {
        self.layout().is_contiguous()
    }

    /// Sets the label of its memory, which may be shared with other tensors, if its device is counted.
    pub fn relabel(&self, label: Label) {
        if let Some(allocation) = &self.allocation {
            allocation.relabel(label);
        }
    }

    /// Its allocation in its device's ledger, which is not freed before the result is dropped.
    pub(crate) fn allocation(&self) -> Option<Arc<Allocation>> {
        self.allocation.clone()
    }

    /// The same tensor, no longer counted by itself: the owner of [`Self::allocation`] counts it.
    pub(crate) fn without_allocation(self) -> Self {
        Self { allocation: None, ..self }
    }

    /// The same shadow on `device`, in the memory of `allocation`.
    pub(crate) fn moved(self, device: &Device, allocation: Option<Arc<Allocation>>) -> Self {
        Self { allocation, device: device.clone(), ..self }
    }

    /// Its bytes, where it is counted: of all the memory that it is a view of.
    pub fn counted_bytes(&self) -> u64 {
        self.allocation.as_ref().map_or(0, |allocation| allocation.bytes())
    }

    /// A new tensor without numbers on `device`, which is one of shadows.
    pub(crate) fn shadow(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Self {
        let shape = shape.into();
        let stored = shape.elem_count();
        let allocation =
            device.ledger().map(|ledger| Arc::new(ledger.take((stored * dtype.size_in_bytes()) as u64)));
        let body = Body::Shadow(Shadow { layout: Layout::contiguous(shape), dtype, stored });
        Self { body, device: device.clone(), allocation }
    }

    /// A result of `self`, which is `self` again or a view of it, or has memory of its own.
    fn result(&self, x: candle_core::Tensor) -> Self {
        if self.device.ledger().is_none() {
            return Self { body: Body::Real(x), device: self.device.clone(), allocation: None };
        }
        match &self.body {
            Body::Real(own) if is_same_memory(own, &x) => self.with_body(Body::Real(x)),
            _ => Self::from_candle(x, &self.device),
        }
    }

    /// In the memory of `self`.
    fn with_body(&self, body: Body) -> Self {
        Self { body, device: self.device.clone(), allocation: self.allocation.clone() }
    }

    /// In the memory of `self`, which is a shadow, with another layout.
    fn with_layout(&self, shadow: &Shadow, layout: Layout) -> Self {
        self.with_body(Body::Shadow(Shadow { layout, ..*shadow }))
    }

    /// Checks that `other` is on the same device, and that both are tensors or both are shadows.
    fn check_beside(&self, other: &Self, op: &'static str) -> Result<()> {
        if self.device.same_device(&other.device) {
            return Ok(());
        }
        let (lhs, rhs) = (self.device.location(), other.device.location());
        Err(Error::DeviceMismatchBinaryOp { lhs, rhs, op }.bt())
    }
}

/// Whether both tensors share memory.
fn is_same_memory(a: &candle_core::Tensor, b: &candle_core::Tensor) -> bool {
    std::ptr::eq(&raw const *a.storage_and_layout().0, &raw const *b.storage_and_layout().0)
}

/// Number of elements of the memory of `x`. Only known for tensors in host memory.
fn stored(x: &candle_core::Tensor) -> usize {
    use candle_core::CpuStorage;
    match &*x.storage_and_layout().0 {
        candle_core::Storage::Cpu(storage) => match storage {
            CpuStorage::U8(v) => v.len(),
            CpuStorage::U32(v) => v.len(),
            CpuStorage::I16(v) => v.len(),
            CpuStorage::I32(v) => v.len(),
            CpuStorage::I64(v) => v.len(),
            CpuStorage::BF16(v) => v.len(),
            CpuStorage::F16(v) => v.len(),
            CpuStorage::F32(v) => v.len(),
            CpuStorage::F64(v) => v.len(),
            CpuStorage::F8E4M3(v) => v.len(),
            _ => x.elem_count(),
        },
        _ => x.elem_count(),
    }
}

impl AsRef<Tensor> for Tensor {
    fn as_ref(&self) -> &Tensor {
        self
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.body {
            Body::Real(x) => x.fmt(f),
            Body::Shadow(x) => write!(f, "Shadow[{:?}; {}]", x.shape(), x.dtype.as_str()),
        }
    }
}

impl fmt::Display for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.body {
            Body::Real(x) => x.fmt(f),
            Body::Shadow(_) => fmt::Debug::fmt(self, f),
        }
    }
}
