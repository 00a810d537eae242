//! The operations of Tandem's models on candle tensors.

pub mod channel_norm;
pub mod conv3d;
pub mod resample;

mod cpu;
mod cpu_gemm;
