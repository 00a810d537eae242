//! Causal convolutions over frames, three taps each, as the encoders of faces (Animate) and audio (S2V) use them.
//!
//! Source: Wan-Video/Wan2.2 wan/modules/animate/face_blocks.py `CausalConv1d`, wan/modules/s2v/auxi_blocks.py.

use kernels::weight::Weight;
use kernels::{DType, Tensor, norm};

use super::reader::Reader;
use crate::{Result, taps};

/// Taps of a convolution.
pub(super) const TAPS: usize = 3;

/// The epsilon of the norms between the convolutions.
const EPS: f64 = 1e-6;

/// A convolution that reads a frame and the two before it; before the first frame the first is repeated.
#[derive(Debug, Clone)]
pub(super) struct CausalConv {
    /// `[out, 3 in]`, the earliest tap first.
    weight: Weight,
    bias: Tensor,
}

impl CausalConv {
    /// Loads `module`, whose weight is `[out, in, 3]`.
    pub fn load(read: &Reader, module: &str) -> Result<Self> {
        let weight = taps::matrix(&read.tensor(module, ".weight")?)?;
        Ok(Self { weight: Weight::Dense(weight), bias: read.tensor(module, ".bias")? })
    }

    /// `x` [b, f, in] to [b, 1 + (f - 1) / stride, out].
    pub fn forward(&self, x: &Tensor, stride: usize) -> Result<Tensor> {
        let first = x.narrow(1, 0, 1)?.contiguous()?;
        let windows = taps::windows(&Tensor::cat(&[&first, &first, x], 1)?, TAPS, stride)?;
        Ok(kernels::linear::forward(&windows, &self.weight, Some(&self.bias), None)?)
    }

    /// The tensors of the convolution.
    pub fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        self.weight.tensors_mut().into_iter().chain([&mut self.bias]).collect()
    }
}

/// LayerNorm of `x` [b, l, d] without gains, rounded to `dtype`.
pub(super) fn plain_norm(x: &Tensor, eps: f64, dtype: DType) -> Result<Tensor> {
    let zeros = no_modulation(x)?;
    Ok(norm::modulated_layer_norm(x, &zeros, &zeros, eps, dtype)?)
}

/// Shift and scale of a norm without modulation.
pub(super) fn no_modulation(x: &Tensor) -> Result<Tensor> {
    let (batch, _, width) = x.dims3()?;
    Ok(Tensor::zeros((batch, 1, 1, width), DType::F32, x.device())?)
}

/// SiLU of [`plain_norm`], what is between two convolutions.
pub(super) fn activated(x: &Tensor) -> Result<Tensor> {
    Ok(plain_norm(x, EPS, x.dtype())?.silu()?)
}

/// `x` [b, f, heads c] as heads in the batch, [b heads, f, c].
pub(super) fn heads_apart(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, frames, width) = x.dims3()?;
    let split = x.reshape((batch, frames, heads, width / heads))?;
    Ok(split.transpose(1, 2)?.contiguous()?.reshape((batch * heads, frames, width / heads))?)
}

/// The inverse, each head a token of its frame: `x` [b heads, f, c] to [b, f, heads, c].
pub(super) fn heads_together(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (all, frames, width) = x.dims3()?;
    let split = x.reshape((all / heads, heads, frames, width))?;
    Ok(split.transpose(1, 2)?.contiguous()?)
}

/// `tokens` [b, f, n, c] with `padding` [1, 1, 1, c] as one more token of each frame.
pub(super) fn with_padding_token(tokens: &Tensor, padding: &Tensor) -> Result<Tensor> {
    let (batch, frames, _, width) = tokens.dims4()?;
    let padding = padding.to_dtype(tokens.dtype())?.broadcast_as((batch, frames, 1, width))?.contiguous()?;
    Ok(Tensor::cat(&[tokens, &padding], 2)?)
}
