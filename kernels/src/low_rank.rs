//! The low-rank adapter pair: delta = scale * (x A^T) B^T, as two thin products, never as a full matrix.

use crate::Result;
use crate::linear::{flat, product};
use candle_core::{DType, Tensor};

/// The factors of one adapter, f32 masters. In the GEMM they are cast to the dtype of the input.
#[derive(Debug, Clone)]
pub struct Factors {
    /// Down factor A [r, in].
    pub a: Tensor,
    /// Up factor B [out, r].
    pub b: Tensor,
    /// What the product is multiplied by: strength * alpha / rank (or alpha / sqrt(rank), rsLoRA).
    pub scale: f64,
}

/// The gradients of [`forward`].
#[derive(Debug, Clone)]
pub struct Gradients {
    /// Of the input, [.., in], in the dtype of `x`.
    pub dx: Tensor,
    /// Of A, [r, in], f32.
    pub da: Tensor,
    /// Of B, [out, r], f32.
    pub db: Tensor,
}

/// delta = scale * (x A^T) B^T: `x` [.., in] -> [.., out], in the dtype of `x`.
pub fn forward(x: &Tensor, factors: &Factors) -> Result<Tensor> {
    let (a, b) = (factors.a.to_dtype(x.dtype())?, factors.b.to_dtype(x.dtype())?);
    product(&product(x, &a)?, &b)? * factors.scale
}

/// The gradients of [`forward`] for `x` [.., in] and `dy` [.., out].
///
/// With h = x A^T and dh = scale * dy B: dB = scale * dy^T h, dA = dh^T x, dx = dh A. h is made again from `x`.
pub fn backward(x: &Tensor, dy: &Tensor, factors: &Factors) -> Result<Gradients> {
    let (a, b) = (factors.a.to_dtype(x.dtype())?, factors.b.to_dtype(x.dtype())?);
    let (x_flat, dy_flat) = (flat(x)?, (flat(&dy.to_dtype(x.dtype())?)? * factors.scale)?);
    let h = x_flat.matmul(&a.t()?)?;
    let dh = dy_flat.matmul(&b)?;
    let db = dy_flat.t()?.matmul(&h)?.to_dtype(DType::F32)?;
    let da = dh.t()?.matmul(&x_flat)?.to_dtype(DType::F32)?;
    let dx = dh.matmul(&a)?.reshape(x.shape())?;
    Ok(Gradients { dx, da, db })
}
