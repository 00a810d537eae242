//! Several tensors in one.

use candle_core::shape::Dim;
use candle_core::{Error, Layout, Result, Shape};

use super::{Body, Tensor};

impl Tensor {
    /// Concatenates tensors along a dimension.
    ///
    /// # Errors
    /// If there are none, or their other sizes or dtypes differ.
    pub fn cat<T: AsRef<Self>>(parts: &[T], dim: impl Dim) -> Result<Self> {
        let Some(first) = parts.first().map(AsRef::as_ref) else {
            return Err(Error::OpRequiresAtLeastOneTensor { op: "cat" }.bt());
        };
        let dim = dim.to_index(first.shape(), "cat")?;
        if parts.len() == 1 {
            return Ok(first.clone());
        }
        parts.iter().try_for_each(|part| first.check_beside(part.as_ref(), "cat"))?;
        if !first.is_shadow() {
            let parts = parts.iter().map(|part| part.as_ref().as_candle());
            return Ok(first.result(candle_core::Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, dim)?));
        }
        let mut shape = first.dims().to_vec();
        shape[dim] = 0;
        for (n, part) in parts.iter().map(AsRef::as_ref).enumerate() {
            let is_beside = |(i, (a, b)): (usize, (&usize, &usize))| i == dim || a == b;
            if part.rank() != first.rank() || !first.dims().iter().zip(part.dims()).enumerate().all(is_beside)
            {
                let (first_shape, nth_shape) = (first.shape().clone(), part.shape().clone());
                return Err(Error::ShapeMismatchCat { dim, first_shape, n: n + 1, nth_shape }.bt());
            }
            if part.dtype() != first.dtype() {
                let (lhs, rhs) = (first.dtype(), part.dtype());
                return Err(Error::DTypeMismatchBinaryOp { lhs, rhs, op: "cat" }.bt());
            }
            shape[dim] += part.dims()[dim];
        }
        let is_copied_by_rows =
            |part: &T| part.as_ref().is_contiguous() || has_rows(part.as_ref().layout(), dim);
        if dim == 0 || parts.iter().all(is_copied_by_rows) {
            return Ok(Self::shadow(shape, first.dtype(), &first.device));
        }
        // candle joins what has no rows along the first dimension, and turns the result back.
        shape.swap(0, dim);
        Self::shadow(Shape::from(shape), first.dtype(), &first.device).transpose(0, dim)
    }

    /// Tensors of one shape along a new dimension.
    pub fn stack<T: AsRef<Self>>(parts: &[T], dim: impl Dim) -> Result<Self> {
        let Some(first) = parts.first().map(AsRef::as_ref) else {
            return Err(Error::OpRequiresAtLeastOneTensor { op: "stack" }.bt());
        };
        let dim = dim.to_index_plus_one(first.shape(), "stack")?;
        let parts = parts.iter().map(|part| part.as_ref().unsqueeze(dim));
        Self::cat(&parts.collect::<Result<Vec<_>>>()?, dim)
    }

    /// With `left` zeros before and `right` zeros after, along a dimension.
    pub fn pad_with_zeros(&self, dim: impl Dim, left: usize, right: usize) -> Result<Self> {
        let dim = dim.to_index(self.shape(), "pad_with_zeros")?;
        let zeros = |count: usize| {
            let mut shape = self.dims().to_vec();
            shape[dim] = count;
            Self::zeros(shape, self.dtype(), &self.device)
        };
        let mut parts = Vec::new();
        if left > 0 {
            parts.push(zeros(left)?);
        }
        parts.push(self.clone());
        if right > 0 {
            parts.push(zeros(right)?);
        }
        Self::cat(&parts, dim)
    }

    /// Repeated along each dimension as often as `repeats` says.
    pub fn repeat(&self, counts: impl Into<Shape>) -> Result<Self> {
        let counts = counts.into();
        let new = counts.rank().saturating_sub(self.rank());
        let mut whole = self.reshape([vec![1; new].as_slice(), self.dims()].concat())?;
        for (dim, &count) in counts.dims().iter().enumerate() {
            whole = match count {
                0 => whole.narrow(dim, 0, 0)?,
                1 => whole,
                count => Self::cat(&vec![&whole; count], dim)?,
            };
        }
        Ok(whole)
    }

    /// Writes `part` over the positions along a dimension from `start` on, in the memory of `self`.
    ///
    /// # Errors
    /// Where either is not contiguous, or they share memory, or `part` does not fit.
    pub fn slice_set(&self, part: &Self, dim: impl Dim, start: usize) -> Result<()> {
        self.check_beside(part, "slice_set")?;
        let dim = dim.to_index(self.shape(), "slice_set")?;
        match (&self.body, &part.body) {
            (Body::Real(x), Body::Real(part)) => x.slice_set(part, dim, start),
            _ if !(self.is_contiguous() && part.is_contiguous()) => {
                Err(Error::RequiresContiguous { op: "slice_set" }.bt())
            }
            _ => Ok(()),
        }
    }
}

/// Whether the dimensions inside `dim` are contiguous and those outside have uniform steps: then candle copies row by row.
fn has_rows(layout: &Layout, dim: usize) -> bool {
    let (dims, strides) = (layout.dims(), layout.stride());
    let mut expected = 1;
    for i in (dim..dims.len()).rev() {
        if strides[i] != expected {
            return false;
        }
        expected *= dims[i];
    }
    (1..dim).all(|i| strides[i - 1] == dims[i] * strides[i])
}
