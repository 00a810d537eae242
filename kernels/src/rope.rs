//! Rotary position embedding over interleaved pairs (2j, 2j+1) of each head.

use crate::Result;
use crate::Tensor;
use crate::profile::{self, Class};
use candle_core::D;

/// Rotates each pair (a, b) of `x` [b, l, n, h] to (a cos - b sin, a sin + b cos).
///
/// `cos_lp`, `sin_lp` [l, h/2], in the dtype of `x`; the same for every head and sample.
pub fn forward(x: &Tensor, cos_lp: &Tensor, sin_lp: &Tensor) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x.device());
    let (batch, tokens, heads, size) = x.dims4()?;
    let pairs = x.contiguous()?.reshape((batch, tokens, heads, size / 2, 2))?;
    let (a, b) = (
        pairs.narrow(D::Minus1, 0, 1)?.squeeze(D::Minus1)?,
        pairs.narrow(D::Minus1, 1, 1)?.squeeze(D::Minus1)?,
    );
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    let (cos, sin) = (cos_lp.unsqueeze(1)?, sin_lp.unsqueeze(1)?);
    let turned_a = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let turned_b = (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?;
    Tensor::stack(&[turned_a, turned_b], D::Minus1)?.reshape((batch, tokens, heads, size))
}

/// The gradient of the input of [`forward`]: the rotation by the opposite angle.
pub fn backward(dy: &Tensor, cos_lp: &Tensor, sin_lp: &Tensor) -> Result<Tensor> {
    forward(dy, cos_lp, &sin_lp.neg()?)
}
