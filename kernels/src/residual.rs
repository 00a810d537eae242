//! The residual adds of a block: gated, x + gate * h, and plain, x + h.

use crate::Result;
use crate::norm::{by_group, from_group};
use candle_core::{DType, Tensor};

/// y = x + gate * h, in the dtype of the stream `x`.
///
/// `x`, `h` [b, l, d]; `gate_bg1d` [b, g, 1, d] f32, one row for each group of l/g tokens.
pub fn forward(x: &Tensor, h: &Tensor, gate_bg1d: &Tensor) -> Result<Tensor> {
    let gated = by_group(&h.to_dtype(gate_bg1d.dtype())?, gate_bg1d)?.broadcast_mul(gate_bg1d)?;
    x + from_group(&gated, x)?.to_dtype(x.dtype())?
}

/// dh = gate * dy, made in f32 and rounded to `dtype`; the gradient of `x` is `dy` itself.
pub fn backward(dy: &Tensor, gate_bg1d: &Tensor, dtype: DType) -> Result<Tensor> {
    let dh = by_group(&dy.to_dtype(gate_bg1d.dtype())?, gate_bg1d)?.broadcast_mul(gate_bg1d)?;
    from_group(&dh, dy)?.to_dtype(dtype)
}

/// y = x + h, in the dtype of the stream `x`.
pub fn add(x: &Tensor, h: &Tensor) -> Result<Tensor> {
    x + h.to_dtype(x.dtype())?
}
