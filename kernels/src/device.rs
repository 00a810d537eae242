//! Devices: how a GPU is opened, and what its memory holds.

use std::collections::BTreeMap;

use crate::{Device, Result};

pub use crate::settings::{Allocator, Memory, Repeatability, Settings};

/// Where tensors on `device` get their memory.
pub fn allocator(device: &Device) -> Allocator {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = device.card() {
        return gpu.allocator.clone();
    }
    let _ = device;
    Allocator::Driver { why: "it is not a GPU that Tandem opened" }
}

/// Opens GPU `index`, with a stream of its own, a memory pool that keeps what it has reserved, and event tracking off.
///
/// # Errors
/// When this build has no CUDA, or the driver or the GPU does not answer.
pub fn open_gpu(index: usize, settings: &Settings) -> Result<Device> {
    #[cfg(feature = "cuda")]
    return crate::cuda::pool::open(index, settings);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (index, settings);
        Err(candle_core::Error::NotCompiledWithCudaSupport)
    }
}

/// Which of cuBLASLt's algorithms each large product on `device` uses, by the product's sizes and layout: the fastest when
/// measured, which may differ from one measurement to the next. A resumed run restores them with [`keep_product_choices`].
pub fn product_choices(device: &Device) -> BTreeMap<String, usize> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = device.card() {
        return gpu.product_choices();
    }
    let _ = device;
    BTreeMap::new()
}

/// Makes products on `device` use the algorithms that [`product_choices`] returned, on a GPU of the same kind and with the
/// same cuBLASLt.
pub fn keep_product_choices(device: &Device, choices: BTreeMap<String, usize>) {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = device.card() {
        gpu.keep_product_choices(choices);
    }
    #[cfg(not(feature = "cuda"))]
    let _ = (device, choices);
}

/// Waits until everything queued on `device` has run.
pub fn synchronize(device: &Device) -> Result<()> {
    device.synchronize()
}

/// The memory statistics of `device`; `None` for the CPU.
pub fn memory(device: &Device) -> Result<Option<Memory>> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = device.card() {
        return gpu.memory().map(Some);
    }
    let _ = device;
    Ok(None)
}

/// Resets the peaks of [`memory`] to the current values.
pub fn reset_peak(device: &Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = device.card() {
        return gpu.reset_peak();
    }
    let _ = device;
    Ok(())
}
