//! Tensors as kernel arguments: addresses, and uninitialised tensors.

use std::sync::Arc;

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::{CudaStorage, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::{DType, Result, Shape, Storage};
use cudarc::driver::DevicePtr;

use super::{Card, device_of};
use crate::Tensor;

/// The address of a contiguous tensor's first number. It is good for as long as the tensor lives; a tensor that is
/// dropped after the launch frees its memory after it in stream order.
pub(crate) fn pointer(x: &Tensor) -> Result<u64> {
    if !x.is_contiguous() {
        candle_core::bail!("a kernel got a tensor {:?} that is not contiguous", x.shape());
    }
    address(x)
}

/// The address of a tensor's first number, whatever its strides.
pub(crate) fn address(x: &Tensor) -> Result<u64> {
    candle_address(x.as_candle()?)
}

/// [`address`] of a tensor of candle.
pub(crate) fn candle_address(x: &candle_core::Tensor) -> Result<u64> {
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        candle_core::bail!("a kernel got a tensor in host memory")
    };
    let start = (layout.start_offset() * x.dtype().size_in_bytes()) as u64;
    Ok(base(storage)? + start)
}

fn base(storage: &CudaStorage) -> Result<u64> {
    let stream = storage.device.cuda_stream();
    Ok(match &storage.slice {
        CudaStorageSlice::U8(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::U32(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::I64(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::BF16(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::F16(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::F32(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::F64(s) => s.device_ptr(&stream).0,
        _ => candle_core::bail!("no kernel takes this dtype"),
    })
}

impl Card {
    /// An uninitialised tensor.
    pub(crate) fn empty(self: &Arc<Self>, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        Ok(Tensor::from_candle(self.raw(shape, dtype)?, &device_of(self)))
    }

    /// [`Self::empty`], as candle's.
    pub(crate) fn raw(&self, shape: impl Into<Shape>, dtype: DType) -> Result<candle_core::Tensor> {
        let shape = shape.into();
        // SAFETY: the caller, in this crate, writes every number in the launch that follows.
        let storage = unsafe { self.device.alloc_uninit(&shape, dtype)? };
        Ok(candle_core::Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false))
    }
}
