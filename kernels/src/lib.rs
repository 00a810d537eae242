//! The operations of Tandem's models, on tensors of candle or their shadows ([`Tensor`]).
//!
//! Each file has one op, its forward and its backward. The reference implementations are plain tensor expressions, which
//! run on every device and define what an accelerated version must equal. candle's own autograd is not used: its norms,
//! softmax and RoPE drop gradients silently, and its matmul keeps gradients of frozen weights.
//!
//! Letters of shapes: `b` batch, `l` tokens, `d` model width, `n` heads, `h` head size, `r` rank,
//! `g` groups of tokens that share a timestep (1, latent frames, or tokens), `c` channels, `t` frames.

/// Returns the result of the GPU implementation if the tensor is on a GPU, or the shadow of one, and the implementation
/// supports it; otherwise execution continues after the macro.
macro_rules! on_gpu {
    ($x:expr, |$gpu:ident| $body:expr) => {
        if let Some($gpu) = crate::gpu::Gpu::of(($x).device()) {
            if let Some(result) = $body {
                return Ok(result);
            }
        }
    };
}

pub mod adamw;
pub mod arena;
pub mod attention;
pub mod channel_norm;
pub mod clock;
pub mod collective;
pub mod conv3d;
pub mod device;
pub mod dora;
pub mod dropout;
pub mod fault;
pub mod fill;
pub mod frame_attention;
pub mod gelu;
pub mod int8;
pub mod inventory;
pub mod ledger;
pub mod linear;
pub mod loha;
pub mod lokr;
pub mod loss;
pub mod low_rank;
pub mod norm;
pub mod norm_rope;
pub mod optimiser;
pub mod profile;
pub mod random;
pub mod replay;
pub mod resample;
pub mod residual;
pub mod rope;
pub mod tokens;
pub mod transfer;
pub mod video;
pub mod weight;

mod cpu;
mod cpu_gemm;
#[cfg(feature = "cuda")]
#[allow(
    unsafe_code,
    reason = "the driver, cuBLASLt and cuDNN are C libraries; every block says why it is sound"
)]
mod cuda;
mod gpu;
mod library;
mod product;
mod settings;
pub mod softmax;
mod tensor;

pub use candle_core::{D, DType, DeviceLocation, Error, Result, Shape, WithDType, bail};
pub use tensor::{Device, NoNumbers, ShadowAttention, ShadowGpu, Tensor};

/// Files of named tensors.
pub mod safetensors {
    use std::collections::HashMap;
    use std::path::Path;

    use crate::{Device, Result, Tensor};

    /// All tensors of the file at `path`, on `device`.
    ///
    /// # Errors
    /// If it cannot be read, or is not a safetensors file.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<HashMap<String, Tensor>> {
        let read = candle_core::safetensors::load(path, &candle_core::Device::Cpu)?;
        let placed = |(name, x)| Ok((name, Tensor::from_candle(x, &Device::Cpu).to_device(device)?));
        read.into_iter().map(placed).collect()
    }

    /// Writes `tensors` to a new file at `path`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save<K: AsRef<str> + Ord + std::fmt::Display>(
        tensors: &HashMap<K, Tensor>,
        path: impl AsRef<Path>,
    ) -> Result<()> {
        let named = tensors.iter().map(|(name, x)| Ok((name.as_ref(), x.as_candle()?.clone())));
        candle_core::safetensors::save(&named.collect::<Result<HashMap<_, _>>>()?, path)
    }
}
