//! Access to the elements of tensors in host memory.

use candle_core::{CpuStorage, DType, Result, Shape, Storage};

use crate::Tensor;

/// Whether the fast CPU path of an operation applies.
pub(crate) fn is_cpu_f32(x: &Tensor) -> bool {
    x.dtype() == DType::F32 && x.device().is_cpu()
}

/// The f32 tensor of `shape` that `make` computes from the elements of `inputs`, f32 tensors of one CPU, each in row-major
/// order. Of shadows it is a shadow.
pub(crate) fn computed<const N: usize>(
    inputs: [&Tensor; N],
    shape: impl Into<Shape>,
    make: impl FnOnce([&[f32]; N]) -> Vec<f32>,
) -> Result<Tensor> {
    let mut rows = inputs.map(Tensor::clone);
    for x in &mut rows {
        *x = x.contiguous()?;
    }
    let device = rows[0].device().clone();
    if device.is_shadow() {
        return Ok(Tensor::shadow(shape, DType::F32, &device));
    }
    let mut storages = Vec::with_capacity(N);
    for x in &rows {
        storages.push(x.as_candle()?.storage_and_layout());
    }
    let mut slices: [&[f32]; N] = [&[]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&storages) {
        *slice = elements(storage, layout)?;
    }
    Tensor::from_vec(make(slices), shape.into(), &device)
}

/// Calls `f` with the elements of an f32 CPU tensor in row-major order.
pub(crate) fn with_slice<T>(x: &Tensor, f: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    let x = x.contiguous()?;
    let (storage, layout) = x.as_candle()?.storage_and_layout();
    f(elements(&storage, layout)?)
}

fn elements<'a>(storage: &'a Storage, layout: &candle_core::Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => Ok(&values[start..end]),
        _ => candle_core::bail!("expected an f32 tensor on the CPU"),
    }
}

/// The numbers of a tensor of any float dtype on any device, as f32 in row-major order.
pub(crate) fn numbers_of(x: &Tensor) -> Result<Vec<f32>> {
    x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

/// The bytes of a u8 tensor on any device, in row-major order.
pub(crate) fn codes_of(x: &Tensor) -> Result<Vec<u8>> {
    x.flatten_all()?.to_vec1()
}
