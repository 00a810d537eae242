//! The gated residual add of a block: x + gate * h.

use crate::Result;
use crate::norm::{by_group, from_group};
use candle_core::Tensor;

/// y = x + gate * h, in the dtype of the stream `x`.
///
/// `x`, `h` [b, l, d]; `gate_bg1d` [b, g, 1, d] f32, one row for each group of l/g tokens.
pub fn forward(x: &Tensor, h: &Tensor, gate_bg1d: &Tensor) -> Result<Tensor> {
    let gated = by_group(&h.to_dtype(gate_bg1d.dtype())?, gate_bg1d)?.broadcast_mul(gate_bg1d)?;
    x + from_group(&gated, x)?.to_dtype(x.dtype())?
}

/// dh = gate * dy, f32; the gradient of `x` is `dy` itself.
pub fn backward(dy: &Tensor, gate_bg1d: &Tensor) -> Result<Tensor> {
    let dh = by_group(&dy.to_dtype(gate_bg1d.dtype())?, gate_bg1d)?.broadcast_mul(gate_bg1d)?;
    from_group(&dh, dy)
}
