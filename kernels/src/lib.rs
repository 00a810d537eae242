//! The operations of Tandem's models, on candle tensors.
//!
//! An op is born with its twin: each file here holds one op, its forward and its backward. The bodies are plain
//! tensor expressions, which run on every device and define what an accelerated version must equal.
//! candle's own autograd is not used: stock norms, softmax and RoPE drop gradients without a word, and its
//! matmul keeps gradients of frozen weights.
//!
//! Letters of shapes: `b` batch, `l` tokens, `d` model width, `n` heads, `h` head size, `r` rank,
//! `g` groups of tokens that share a timestep (1, latent frames, or tokens), `c` channels, `t` frames.

pub mod adamw;
pub mod attention;
pub mod channel_norm;
pub mod clock;
pub mod conv3d;
pub mod device;
pub mod dropout;
pub mod gelu;
pub mod linear;
pub mod loss;
pub mod low_rank;
pub mod norm;
pub mod profile;
pub mod norm_rope;
pub mod random;
pub mod resample;
pub mod residual;
pub mod rope;
pub mod transfer;

mod cpu;
mod cpu_gemm;

pub use candle_core::{Error, Result};
