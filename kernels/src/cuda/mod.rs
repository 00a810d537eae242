//! The CUDA half of the kernels: what a GPU needs beside candle's own device.
//!
//! Every launch is on the one stream of the device that the tensors lie on, so order alone makes it safe: memory is
//! allocated and freed in the order of the stream, and nothing here waits for the GPU.

mod chunk;
pub(crate) mod clock;
pub(crate) mod copies;
pub(crate) mod gemm;
pub(crate) mod launch;
mod pinned;
pub(crate) mod pool;
mod region;
pub(crate) mod sdpa;
pub(crate) mod tensor;

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::{CudaDevice, DeviceId};
use candle_core::{Device, Result, Tensor};
use cudarc::driver::{CudaContext, CudaStream};

use crate::device::Allocator;
pub(crate) use launch::{File, Launch};
pub(crate) use tensor::{fits, suffix};

/// What one opened GPU has: its stream, loaded kernels, cuBLASLt and cuDNN handles, plans and workspace.
pub(crate) struct Gpu {
    pub device: CudaDevice,
    pub context: Arc<CudaContext>,
    pub stream: Arc<CudaStream>,
    pub modules: launch::Modules,
    pub gemm: gemm::Gemm,
    pub sdpa: sdpa::Sdpa,
    pub allocator: Allocator,
}

/// The GPUs that are open. Global, since candle's device has no room for what is ours, and the driver's own state
/// that it stands for (contexts, pools) is global too.
static OPEN: Mutex<Vec<(DeviceId, Arc<Gpu>)>> = Mutex::new(Vec::new());

/// What belongs to `device`; a device that was not opened through [`crate::device::open_gpu`] gets default settings.
pub(crate) fn gpu(device: &CudaDevice) -> Result<Arc<Gpu>> {
    let allocator = Allocator::Driver { why: "the GPU was opened by other code" };
    with_settings(device, crate::device::Settings::default(), allocator)
}

/// [`gpu`] with the settings and the allocator that hold if it is new.
pub(crate) fn with_settings(
    device: &CudaDevice,
    settings: crate::device::Settings,
    allocator: Allocator,
) -> Result<Arc<Gpu>> {
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, gpu)) = open.iter().find(|(id, _)| *id == device.id()) {
        return Ok(gpu.clone());
    }
    let stream = device.cuda_stream();
    let context = stream.context().clone();
    let gpu = Arc::new(Gpu {
        modules: launch::Modules::default(),
        gemm: gemm::Gemm::new(&stream, settings.repeatability)?,
        sdpa: sdpa::Sdpa::new(&context, settings.repeatability),
        allocator,
        device: device.clone(),
        context,
        stream,
    });
    open.push((device.id(), gpu.clone()));
    Ok(gpu)
}

/// The GPU that `x` lies on, or nothing where it lies in host memory.
pub(crate) fn of(x: &Tensor) -> Result<Option<Arc<Gpu>>> {
    match x.device() {
        Device::Cuda(device) => gpu(device).map(Some),
        _ => Ok(None),
    }
}

/// The driver's error in candle's words.
pub(crate) fn told<T>(result: std::result::Result<T, cudarc::driver::DriverError>) -> Result<T> {
    result.map_err(|why| candle_core::Error::Cuda(Box::new(candle_core::cuda_backend::CudaError::Cuda(why))))
}
