//! Views: the same memory in another shape, or a copy where a view is impossible.

use candle_core::shape::{Dim, Dims, ShapeWithOneHole};
use candle_core::{D, Error, Layout, Result, Shape};

use super::{Body, Tensor};

impl Tensor {
    /// A view: candle's on a tensor, the layout's on a shadow.
    fn view(
        &self,
        real: impl FnOnce(&candle_core::Tensor) -> Result<candle_core::Tensor>,
        layout: impl FnOnce(&Layout) -> Result<Layout>,
    ) -> Result<Self> {
        match &self.body {
            Body::Real(x) => Ok(self.with_body(Body::Real(real(x)?))),
            Body::Shadow(x) => Ok(self.with_layout(x, layout(&x.layout)?)),
        }
    }

    /// Some of the positions along a dimension.
    pub fn narrow(&self, dim: impl Dim, start: usize, len: usize) -> Result<Self> {
        let dim = dim.to_index(self.shape(), "narrow")?;
        self.view(|x| x.narrow(dim, start, len), |layout| layout.narrow(dim, start, len))
    }

    /// The position `index` of the first dimension.
    pub fn get(&self, index: usize) -> Result<Self> {
        if self.rank() == 0 { Ok(self.clone()) } else { self.narrow(0, index, 1)?.squeeze(0) }
    }

    /// The position `index` along a dimension.
    pub fn get_on_dim(&self, dim: impl Dim, index: usize) -> Result<Self> {
        let dim = dim.to_index(self.shape(), "get_on_dim")?;
        self.narrow(dim, index, 1)?.squeeze(dim)
    }

    /// The last two dimensions exchanged.
    pub fn t(&self) -> Result<Self> {
        if self.rank() < 2 {
            let (expected, got, shape) = (2, self.rank(), self.shape().clone());
            return Err(Error::UnexpectedNumberOfDims { expected, got, shape }.bt());
        }
        self.transpose(D::Minus2, D::Minus1)
    }

    /// Two dimensions exchanged.
    pub fn transpose(&self, a: impl Dim, b: impl Dim) -> Result<Self> {
        let (a, b) = (a.to_index(self.shape(), "transpose")?, b.to_index(self.shape(), "transpose")?);
        self.view(|x| x.transpose(a, b), |layout| layout.transpose(a, b))
    }

    /// All dimensions in another order.
    pub fn permute(&self, dims: impl Dims) -> Result<Self> {
        let dims = dims.to_indexes(self.shape(), "permute")?;
        self.view(|x| x.permute(dims.as_slice()), |layout| layout.permute(&dims))
    }

    /// Dimensions of size one repeated up to `shape`, and new ones in front.
    pub fn broadcast_as(&self, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        self.view(|x| x.broadcast_as(&shape), |layout| layout.broadcast_as(&shape))
    }

    /// Without a dimension, where its size is one.
    pub fn squeeze(&self, dim: impl Dim) -> Result<Self> {
        let dim = dim.to_index(self.shape(), "squeeze")?;
        let squeezed = |layout: &Layout| {
            let (mut dims, mut strides) = (layout.dims().to_vec(), layout.stride().to_vec());
            if dims[dim] == 1 {
                dims.remove(dim);
                strides.remove(dim);
            }
            Ok(Layout::new(dims.into(), strides, layout.start_offset()))
        };
        self.view(|x| x.squeeze(dim), squeezed)
    }

    /// With a new dimension of size one.
    pub fn unsqueeze(&self, dim: impl Dim) -> Result<Self> {
        let dim = dim.to_index_plus_one(self.shape(), "unsqueeze")?;
        let with = |layout: &Layout| {
            let (mut dims, mut strides) = (layout.dims().to_vec(), layout.stride().to_vec());
            dims.insert(dim, 1);
            strides.insert(dim, strides.get(dim).copied().unwrap_or(1));
            Ok(Layout::new(dims.into(), strides, layout.start_offset()))
        };
        self.view(|x| x.unsqueeze(dim), with)
    }

    /// In another shape of as many elements; a copy where the elements are not in row-major order.
    pub fn reshape(&self, shape: impl ShapeWithOneHole) -> Result<Self> {
        let shape = shape.into_shape(self.elem_count())?;
        match &self.body {
            Body::Real(x) => Ok(self.result(x.reshape(shape)?)),
            Body::Shadow(_) if shape.elem_count() != self.elem_count() => {
                let lhs = self.shape().clone();
                Err(Error::ShapeMismatchBinaryOp { lhs, rhs: shape, op: "reshape" }.bt())
            }
            Body::Shadow(x) if self.is_contiguous() => {
                let layout = Layout::contiguous_with_offset(shape, x.layout.start_offset());
                Ok(self.with_layout(x, layout))
            }
            Body::Shadow(x) => Ok(Self::shadow(shape, x.dtype, &self.device)),
        }
    }

    /// The dimensions from one to another as one.
    pub fn flatten(&self, start: impl Dim, end: impl Dim) -> Result<Self> {
        let start = start.to_index(self.shape(), "flatten")?;
        let end = end.to_index(self.shape(), "flatten")?;
        if start >= end {
            return Ok(self.clone());
        }
        let dims = self.dims();
        let joined: usize = dims[start..=end].iter().product();
        self.reshape([&dims[..start], &[joined], &dims[end + 1..]].concat())
    }

    /// The dimensions from one on as one.
    pub fn flatten_from(&self, start: impl Dim) -> Result<Self> {
        self.flatten(start, D::Minus1)
    }

    /// All dimensions as one.
    pub fn flatten_all(&self) -> Result<Self> {
        self.reshape(self.elem_count())
    }

    /// In row-major order: the same where it is so already.
    pub fn contiguous(&self) -> Result<Self> {
        if self.is_contiguous() { Ok(self.clone()) } else { self.force_contiguous() }
    }

    /// In row-major order, in memory of its own.
    pub fn force_contiguous(&self) -> Result<Self> {
        match &self.body {
            Body::Real(x) => Ok(self.result(x.force_contiguous()?)),
            Body::Shadow(x) => Ok(Self::shadow(x.shape(), x.dtype, &self.device)),
        }
    }

    /// The same in memory of its own, with all of the memory that it is a view of.
    pub fn copy(&self) -> Result<Self> {
        match &self.body {
            Body::Real(x) => Ok(self.result(x.copy()?)),
            Body::Shadow(x) => Ok(Self::shadow(x.stored, x.dtype, &self.device).with_body_of(self)),
        }
    }

    /// A copy on another device, of all of the memory that it is a view of; the same tensor if it is on that device already. Between
    /// GPUs it goes through the host, which waits: see [`crate::transfer::Link`] for copies that do not.
    ///
    /// # Errors
    /// A shadow cannot become a tensor.
    pub fn to_device(&self, device: &super::Device) -> Result<Self> {
        if self.device.same_device(device) {
            return Ok(self.clone());
        }
        match (&self.body, device.candle()) {
            // Two memories with ledgers of their own may be one device to candle, which would not copy.
            (Body::Real(x), Some(candle_core::Device::Cpu)) if x.device().is_cpu() => {
                Ok(Self::from_candle(if device.ledger().is_some() { x.copy()? } else { x.clone() }, device))
            }
            // candle copies from GPU to GPU on the receiver's stream, which does not wait for the sender's: through the host both do.
            (Body::Real(x), Some(candle)) if x.device().is_cuda() && candle.is_cuda() => {
                let host = x.to_device(&candle_core::Device::Cpu)?;
                Ok(Self::from_candle(host.to_device(&candle)?, device))
            }
            (Body::Real(x), Some(candle)) => Ok(Self::from_candle(x.to_device(&candle)?, device)),
            (Body::Real(x), None) => Ok(Self::shadow(super::stored(x), x.dtype(), device).with_body_of(self)),
            (Body::Shadow(x), None) => Ok(Self::shadow(x.stored, x.dtype, device).with_body_of(self)),
            (Body::Shadow(_), Some(_)) => Err(Error::wrap(super::NoNumbers)),
        }
    }

    /// This shadow, with the memory and the shape of `other`.
    fn with_body_of(self, other: &Self) -> Self {
        match self.body.clone() {
            Body::Shadow(own) => self.with_layout(&own, other.layout().clone()),
            Body::Real(_) => self,
        }
    }
}
