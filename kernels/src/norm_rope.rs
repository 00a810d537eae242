//! What queries and keys of the self-attention go through: RMSNorm over the model width, then rotary positions.

use crate::Result;
use crate::{norm, rope};
use candle_core::{DType, Tensor};

/// The rotated heads [b, l, n, h] of `x` [b, l, d], in the dtype of `x`.
///
/// [`norm::rms_norm`] over d with `weight` `[d]`, then [`rope::forward`] by `cos_lp`, `sin_lp` [l, h/2] f32, all in f32
/// but for the norm's own rounding, and rounded once at the end.
pub fn forward(
    x_bld: &Tensor,
    weight: &Tensor,
    cos_lp: &Tensor,
    sin_lp: &Tensor,
    heads: usize,
    eps: f64,
) -> Result<Tensor> {
    let (batch, tokens, width) = x_bld.dims3()?;
    let y = norm::rms_norm(x_bld, weight, eps, DType::F32)?.reshape((batch, tokens, heads, width / heads))?;
    rope::forward(&y, cos_lp, sin_lp)?.to_dtype(x_bld.dtype())
}

/// The gradient of the input of [`forward`], [b, l, d] in the dtype of `x_bld`; `dy_blnh` [b, l, n, h].
pub fn backward(
    x_bld: &Tensor,
    dy_blnh: &Tensor,
    weight: &Tensor,
    cos_lp: &Tensor,
    sin_lp: &Tensor,
    eps: f64,
) -> Result<Tensor> {
    let dy = rope::backward(&dy_blnh.to_dtype(DType::F32)?, cos_lp, sin_lp)?;
    norm::rms_norm_backward(x_bld, &dy.reshape(x_bld.shape())?, weight, eps)
}
