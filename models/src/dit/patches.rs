//! Latents as the patches that become tokens.

use kernels::Tensor;

use super::config::PATCH;
use crate::Result;

/// Latents [b, c, t, h, w] as patches of `scale` frames and sides of twice `scale`: [b, l, c * scale * (2 scale)^2], ordered (frame, row,
/// column), each the values of a patch ordered (channel, frame, dy, dx).
pub(super) fn patches_of(x: &Tensor, scale: usize) -> Result<Tensor> {
    let (batch, channels, frames, height, width) = x.dims5()?;
    let side = PATCH * scale;
    let (count, rows, columns) = (frames / scale, height / side, width / side);
    Ok(x.reshape(&[batch, channels, count, scale, rows, side, columns, side][..])?
        .permute([0, 2, 4, 6, 1, 3, 5, 7])?
        .contiguous()?
        .reshape((batch, count * rows * columns, channels * scale * side * side))?)
}
