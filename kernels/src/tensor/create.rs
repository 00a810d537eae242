//! New tensors.

use candle_core::backend::BackendStorage;
use candle_core::shape::ShapeWithOneHole;
use candle_core::{DType, NdArray, Result, Shape, WithDType};

use super::{Device, Tensor};

impl Tensor {
    /// A new tensor: candle's on a device of tensors, else a shadow of this shape and dtype.
    fn made(
        device: &Device,
        shape: impl Into<Shape>,
        dtype: DType,
        real: impl FnOnce(Shape, &candle_core::Device) -> Result<candle_core::Tensor>,
    ) -> Result<Self> {
        match device.candle() {
            Some(candle) => Ok(Self::from_candle(real(shape.into(), &candle)?, device)),
            None => Ok(Self::shadow(shape, dtype, device)),
        }
    }

    /// The numbers of an array.
    pub fn new(array: impl NdArray, device: &Device) -> Result<Self> {
        match device.candle() {
            Some(candle) => Ok(Self::from_candle(candle_core::Tensor::new(array, &candle)?, device)),
            None => {
                let shape = array.shape()?;
                Ok(Self::shadow(shape, array.to_cpu_storage().dtype(), device))
            }
        }
    }

    /// The numbers of a list, in row-major order.
    ///
    /// # Errors
    /// Where there are not as many as `shape` has.
    pub fn from_vec<T: WithDType>(
        values: Vec<T>,
        shape: impl ShapeWithOneHole,
        device: &Device,
    ) -> Result<Self> {
        let shape = shape.into_shape(values.len())?;
        Self::made(device, shape, T::DTYPE, |shape, device| {
            candle_core::Tensor::from_vec(values, shape, device)
        })
    }

    /// The numbers that `make` returns, in row-major order; not called for a shadow.
    ///
    /// # Errors
    /// Where there are not as many as `shape` has.
    pub fn from_fn<T: WithDType>(
        shape: impl Into<Shape>,
        device: &Device,
        make: impl FnOnce() -> Vec<T>,
    ) -> Result<Self> {
        Self::made(device, shape, T::DTYPE, |shape, device| {
            candle_core::Tensor::from_vec(make(), shape, device)
        })
    }

    /// The numbers of a slice, in row-major order.
    ///
    /// # Errors
    /// Where there are not as many as `shape` has.
    pub fn from_slice<T: WithDType>(
        values: &[T],
        shape: impl ShapeWithOneHole,
        device: &Device,
    ) -> Result<Self> {
        Self::from_vec(values.to_vec(), shape, device)
    }

    /// The little-endian numbers in `bytes`.
    ///
    /// # Errors
    /// Where there are not as many as `shape` has.
    pub fn from_raw_buffer(bytes: &[u8], dtype: DType, shape: &[usize], device: &Device) -> Result<Self> {
        Self::made(device, shape, dtype, |shape, device| {
            candle_core::Tensor::from_raw_buffer(bytes, dtype, shape.dims(), device)
        })
    }

    /// Zeros.
    pub fn zeros(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Self> {
        Self::made(device, shape, dtype, |shape, device| candle_core::Tensor::zeros(shape, dtype, device))
    }

    /// Ones.
    pub fn ones(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Self> {
        Self::made(device, shape, dtype, |shape, device| candle_core::Tensor::ones(shape, dtype, device))
    }

    /// The same number everywhere.
    pub fn full<T: WithDType>(value: T, shape: impl Into<Shape>, device: &Device) -> Result<Self> {
        Self::made(device, shape, T::DTYPE, |shape, device| candle_core::Tensor::full(value, shape, device))
    }

    /// The numbers from `start` on below `end`.
    pub fn arange<T: WithDType>(start: T, end: T, device: &Device) -> Result<Self> {
        let host = candle_core::Tensor::arange(start, end, &candle_core::Device::Cpu)?;
        Self::from_candle(host, &Device::Cpu).to_device(device)
    }

    /// Zeros in the shape and dtype of `self`.
    pub fn zeros_like(&self) -> Result<Self> {
        Self::zeros(self.shape(), self.dtype(), &self.device)
    }

    /// Ones in the shape and dtype of `self`.
    pub fn ones_like(&self) -> Result<Self> {
        Self::ones(self.shape(), self.dtype(), &self.device)
    }
}
