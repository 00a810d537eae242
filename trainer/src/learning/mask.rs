//! Masks of a clip as weights of its latents.

use data::{LossMasks, MaskReduction};
use kernels::Tensor;
use kernels::loss::Reduction;

use crate::error::Result;

/// Pixel frames of each latent frame behind the first.
const FRAMES: usize = 4;

/// The mask of latents, [b, 1 + k, h / cell, w / cell], of a mask of pixels [b, 1 + 4k, h, w] in 0..1: the mean over cells of
/// `cell` x `cell` pixels, and behind the first frame over the four frames of each latent frame, as the causal VAE has them.
///
/// # Errors
/// A length other than 1 + 4k, and sizes that are no multiple of `cell`.
pub fn of_latents(pixels_bfhw: &Tensor, cell: usize) -> Result<Tensor> {
    let (batch, frames, height, width) = pixels_bfhw.dims4()?;
    if frames % FRAMES != 1 || height % cell != 0 || width % cell != 0 {
        let why = format!(
            "a mask of {frames} frames of {width} x {height} pixels: 1 + 4k frames and a size in {cell}s are expected"
        );
        return Err(kernels::Error::msg(why).into());
    }
    let (rows, columns) = (height / cell, width / cell);
    let cells = pixels_bfhw.reshape((batch * frames, rows, cell, columns, cell))?;
    let mean = cells.mean(4)?.mean(2)?.reshape((batch, frames, rows, columns))?;
    let first = mean.narrow(1, 0, 1)?;
    if frames == 1 {
        return Ok(first);
    }
    let rest = mean.narrow(1, 1, frames - 1)?.contiguous()?;
    let rest = rest.reshape((batch, (frames - 1) / FRAMES, FRAMES, rows, columns))?.mean(2)?;
    Ok(Tensor::cat(&[first, rest], 1)?)
}

/// The weights `max(mask, outside)` of latents, [b, 1, t, h, w], of a mask [b, t, h, w] in 0..1.
///
/// # Errors
/// A device that fails.
pub fn weights(mask_bthw: &Tensor, outside: f64) -> Result<Tensor> {
    Ok(mask_bthw.maximum(outside)?.unsqueeze(1)?)
}

/// How the weighted errors of masked clips become one number.
pub fn reduction(masks: &LossMasks) -> Reduction {
    match masks.reduction {
        MaskReduction::None => Reduction::Elements,
        MaskReduction::Sample => Reduction::Samples,
        MaskReduction::Batch => Reduction::Batch,
    }
}
