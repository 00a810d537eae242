//! The CUDA implementation: what a GPU needs besides candle's own device.
//!
//! Every launch is on the single stream of the tensors' device, so stream order alone makes it safe: memory is allocated and
//! freed in that order, and nothing here waits for the GPU.

mod chunk;
pub(crate) mod clock;
pub(crate) mod copies;
pub(crate) mod gemm;
pub(crate) mod launch;
pub(crate) mod nccl;
mod pinned;
pub(crate) mod pool;
pub(crate) mod reading;
mod region;
mod ring;
pub(crate) mod sdpa;
pub(crate) mod tensor;
pub(crate) mod upload;

use std::sync::Arc;

use candle_core::Result;
use candle_core::cuda_backend::CudaDevice;
use cudarc::driver::{CudaContext, CudaStream};

use crate::settings::{Allocator, Settings};
use crate::tensor::{Device, Kind, Other};
pub(crate) use launch::Launch;
pub(crate) use tensor::address;

/// An opened GPU: its stream, loaded kernels, cuBLASLt and cuDNN handles, plans and workspace.
pub(crate) struct Card {
    pub device: CudaDevice,
    pub context: Arc<CudaContext>,
    pub stream: Arc<CudaStream>,
    pub modules: launch::Modules,
    pub gemm: gemm::Gemm,
    pub sdpa: sdpa::Sdpa,
    pub allocator: Allocator,
    /// The pool of small tensors.
    pub pool: pool::Pool,
    pub upload: upload::Upload,
}

impl Card {
    /// The card of `device`, which is open and has its allocator and its pool.
    pub(crate) fn new(
        device: CudaDevice,
        settings: Settings,
        allocator: Allocator,
        pool: pool::Pool,
    ) -> Result<Self> {
        let stream = device.cuda_stream();
        let context = stream.context().clone();
        Ok(Self {
            modules: launch::Modules::default(),
            gemm: gemm::Gemm::new(&stream, settings.repeatability)?,
            sdpa: sdpa::Sdpa::new(&context, settings.repeatability),
            upload: upload::Upload::default(),
            allocator,
            pool,
            device,
            context,
            stream,
        })
    }
}

/// The device of tensors on `card`.
pub(crate) fn device_of(card: &Arc<Card>) -> Device {
    Device::Other(Other(Kind::Card(card.clone())))
}

/// The driver's error as candle's.
pub(crate) fn told<T>(result: std::result::Result<T, cudarc::driver::DriverError>) -> Result<T> {
    result.map_err(|why| candle_core::Error::Cuda(Box::new(candle_core::cuda_backend::CudaError::Cuda(why))))
}
