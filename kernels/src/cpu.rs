//! Access to the elements of a tensor that lies on the CPU.

use std::ops::Deref;

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor};

/// Whether the fast CPU path of an operation applies.
pub(crate) fn is_cpu_f32(x: &Tensor) -> bool {
    x.dtype() == DType::F32 && matches!(x.device(), Device::Cpu)
}

/// Calls `f` with the elements of an f32 CPU tensor in row-major order.
pub(crate) fn with_slice<T>(x: &Tensor, f: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    match (storage.deref(), layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => f(&values[start..end]),
        _ => candle_core::bail!("expected an f32 tensor on the CPU"),
    }
}
