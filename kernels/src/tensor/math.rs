//! Sums, extremes, products, and picking by index.

use candle_core::shape::{Dim, Dims};
use candle_core::{Error, Result};

use super::{Body, Tensor};

impl Tensor {
    /// A reduction over `dims`, whose sizes become one.
    fn reduced(
        &self,
        dims: &[usize],
        real: impl FnOnce(&candle_core::Tensor) -> Result<candle_core::Tensor>,
    ) -> Result<Self> {
        match &self.body {
            Body::Real(x) => Ok(self.result(real(x)?)),
            Body::Shadow(x) => {
                let mut shape = self.dims().to_vec();
                dims.iter().for_each(|&dim| shape[dim] = 1);
                Ok(Self::shadow(shape, x.dtype, &self.device))
            }
        }
    }

    /// Without `dims`, whose sizes are one.
    fn without(&self, dims: &[usize]) -> Result<Self> {
        let all = self.dims().iter().enumerate();
        let rest: Vec<usize> = all.filter(|(i, _)| !dims.contains(i)).map(|(_, &size)| size).collect();
        self.reshape(rest)
    }

    /// The sum over some dimensions, which stay with size one.
    pub fn sum_keepdim(&self, dims: impl Dims) -> Result<Self> {
        let dims = dims.to_indexes(self.shape(), "sum")?;
        self.reduced(&dims, |x| x.sum_keepdim(dims.as_slice()))
    }

    /// The sum over some dimensions.
    pub fn sum(&self, dims: impl Dims) -> Result<Self> {
        let dims = dims.to_indexes(self.shape(), "sum")?;
        self.sum_keepdim(dims.as_slice())?.without(&dims)
    }

    /// The sum of all elements, a scalar.
    pub fn sum_all(&self) -> Result<Self> {
        self.sum((0..self.rank()).collect::<Vec<_>>())
    }

    /// The mean over some dimensions, which stay with size one.
    pub fn mean_keepdim(&self, dims: impl Dims) -> Result<Self> {
        let dims = dims.to_indexes(self.shape(), "mean")?;
        let count: usize = dims.iter().map(|&dim| self.dims()[dim]).product();
        self.sum_keepdim(dims.as_slice())? * (1.0 / count as f64)
    }

    /// The mean over some dimensions.
    pub fn mean(&self, dims: impl Dims) -> Result<Self> {
        let dims = dims.to_indexes(self.shape(), "mean")?;
        let count: usize = dims.iter().map(|&dim| self.dims()[dim]).product();
        self.sum(dims.as_slice())? * (1.0 / count as f64)
    }

    /// The mean of all elements, a scalar.
    pub fn mean_all(&self) -> Result<Self> {
        self.sum_all()? / self.elem_count() as f64
    }

    /// The largest along a dimension, which stays with size one.
    pub fn max_keepdim(&self, dim: impl Dim) -> Result<Self> {
        let dim = dim.to_index(self.shape(), "max")?;
        self.reduced(&[dim], |x| x.max_keepdim(dim))
    }

    /// The largest along a dimension.
    pub fn max(&self, dim: impl Dim) -> Result<Self> {
        let dim = dim.to_index(self.shape(), "max")?;
        self.max_keepdim(dim)?.squeeze(dim)
    }

    /// The smallest along a dimension, which stays with size one.
    pub fn min_keepdim(&self, dim: impl Dim) -> Result<Self> {
        let dim = dim.to_index(self.shape(), "min")?;
        self.reduced(&[dim], |x| x.min_keepdim(dim))
    }

    /// The smallest along a dimension.
    pub fn min(&self, dim: impl Dim) -> Result<Self> {
        let dim = dim.to_index(self.shape(), "min")?;
        self.min_keepdim(dim)?.squeeze(dim)
    }

    /// The largest element, a scalar.
    pub fn max_all(&self) -> Result<Self> {
        if self.rank() == 0 { Ok(self.clone()) } else { self.flatten_all()?.max(0) }
    }

    /// The smallest element, a scalar.
    pub fn min_all(&self) -> Result<Self> {
        if self.rank() == 0 { Ok(self.clone()) } else { self.flatten_all()?.min(0) }
    }

    /// The product of matrices [.., m, k] and [.., k, n], pair by pair.
    ///
    /// # Errors
    /// Where sizes or dtypes do not fit.
    pub fn matmul(&self, other: &Self) -> Result<Self> {
        self.check_beside(other, "matmul")?;
        if let (Body::Real(x), Body::Real(y)) = (&self.body, &other.body) {
            return Ok(self.result(x.matmul(y)?));
        }
        let misfit = || {
            let (lhs, rhs) = (self.shape().clone(), other.shape().clone());
            Error::ShapeMismatchBinaryOp { lhs, rhs, op: "matmul" }.bt()
        };
        let ([outer @ .., m, k], [outer_b @ .., k_b, n]) = (self.dims(), other.dims()) else {
            return Err(misfit());
        };
        let pairs = |outer: &[usize]| outer.iter().product::<usize>();
        if k != k_b || outer.len() != outer_b.len() || pairs(outer) != pairs(outer_b) {
            return Err(misfit());
        }
        Ok(Self::shadow([outer, &[*m, *n]].concat(), self.dtype(), &self.device))
    }

    /// [`Tensor::matmul`] with batch dimensions broadcast.
    ///
    /// # Errors
    /// As [`Tensor::matmul`], and where either is a shadow.
    pub fn broadcast_matmul(&self, other: &Self) -> Result<Self> {
        self.check_beside(other, "matmul")?;
        Ok(self.result(self.as_candle()?.broadcast_matmul(other.as_candle()?)?))
    }

    /// The positions `indexes` `[n]` along a dimension.
    pub fn index_select(&self, indexes: &Self, dim: impl Dim) -> Result<Self> {
        let dim = dim.to_index(self.shape(), "index_select")?;
        self.check_beside(indexes, "index_select")?;
        if let (Body::Real(x), Body::Real(indexes)) = (&self.body, &indexes.body) {
            return Ok(self.result(x.index_select(indexes, dim)?));
        }
        let mut shape = self.dims().to_vec();
        shape[dim] = indexes.dims1()?;
        Ok(Self::shadow(shape, self.dtype(), &self.device))
    }

    /// The 2D convolution of pictures [b, i, h, w] with `kernels` [o, i, kh, kw], without groups and dilation.
    pub fn conv2d(&self, kernels: &Self, padding: usize, stride: usize) -> Result<Self> {
        self.check_beside(kernels, "conv2d")?;
        if let (Body::Real(x), Body::Real(kernels)) = (&self.body, &kernels.body) {
            return Ok(self.result(x.conv2d(kernels, padding, stride, 1, 1)?));
        }
        let ((batch, _, height, width), (out, _, kh, kw)) = (self.dims4()?, kernels.dims4()?);
        let steps = |size: usize, kernel: usize| (size + 2 * padding - kernel) / stride + 1;
        Ok(Self::shadow((batch, out, steps(height, kh), steps(width, kw)), self.dtype(), &self.device))
    }
}
