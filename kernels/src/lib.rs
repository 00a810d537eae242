//! The operations of Tandem's models, on candle tensors.
//!
//! An op is born with its twin: each file here holds one op, its forward and its backward. The bodies are plain
//! tensor expressions, which run on every device and define what an accelerated version must equal.
//! candle's own autograd is not used: stock norms, softmax and RoPE drop gradients without a word, and its
//! matmul keeps gradients of frozen weights.
//!
//! Letters of shapes: `b` batch, `l` tokens, `d` model width, `n` heads, `h` head size, `r` rank,
//! `g` groups of tokens that share a timestep (1, latent frames, or tokens), `c` channels, `t` frames.

/// Gives the result of a GPU's own body where the tensor lies on a GPU that has one for it; else goes on behind it.
macro_rules! on_gpu {
    ($x:expr, |$gpu:ident| $body:expr) => {
        #[cfg(feature = "cuda")]
        if let Some($gpu) = crate::cuda::of($x)? {
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
pub mod conv3d;
pub mod device;
pub mod dora;
pub mod dropout;
pub mod fault;
pub mod gelu;
pub mod inventory;
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
    reason = "the driver, cuBLASLt and cuDNN are C libraries; every block says who promises what"
)]
mod cuda;
mod product;
mod softmax;

pub use candle_core::{Error, Result};
