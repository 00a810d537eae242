//! What Wan 2.2 Animate is shown beside the noise: a reference picture as the first latent frame, and behind it the frames
//! and pixels of the clip that are given.
//!
//! Source: Wan-Video/Wan2.2 wan/animate.py `WanAnimate.generate`.

use kernels::{DType, Device, Tensor};
use models::dit::config::MASK_CHANNELS;

use super::{HALF, by_latent_frame};
use crate::error::Result;

/// The channels [1, 4 + c, 1 + t, h, w] after the noisy ones: the latents `reference` [1, c, 1, h, w], which are given, then
/// `mask` [1, 4, t, h, w] (1 = given) and the latents `video` [1, c, t, h, w] of what is given.
///
/// # Errors
/// Parts of different sizes.
pub fn beside(reference: &Tensor, mask: &Tensor, video: &Tensor) -> Result<Tensor> {
    let (_, _, frames, height, width) = reference.dims5()?;
    let given = Tensor::ones((1, MASK_CHANNELS, frames, height, width), DType::F32, &Device::Cpu)?;
    let reference = Tensor::cat(&[&given, reference], 1)?;
    Ok(Tensor::cat(&[reference, Tensor::cat(&[mask, video], 1)?], 2)?)
}

/// The mask [1, 4, t, h, w] (1 = given) of a clip of `frames` frames whose latents are `height` x `width`: the first `known` frames
/// are given, and where there is a mask of the `character` [1, 1, f, H, W] (1 = character) everything around it.
///
/// # Errors
/// A number of frames that is not of the form 4n + 1, and a mask that is no multiple of the latents' size.
pub fn mask(
    character: Option<&Tensor>,
    (frames, height, width): (usize, usize, usize),
    known: usize,
) -> Result<Tensor> {
    let given = match character {
        Some(character) => nearest(character, (height, width))?.affine(-1.0, 1.0)?,
        None => Tensor::zeros((1, 1, frames, height, width), DType::F32, &Device::Cpu)?,
    };
    let first = Tensor::ones((1, 1, known, height, width), DType::F32, &Device::Cpu)?;
    let parts = [(known > 0).then_some(first), behind(&given, known)?];
    by_latent_frame(&Tensor::cat(&parts.into_iter().flatten().collect::<Vec<_>>(), 2)?)
}

/// `video` [1, 3, f, h, w] with the frames `known` [1, 3, k, h, w] in place of its first ones.
///
/// # Errors
/// Videos of different sizes.
pub fn continued(known: &Tensor, video: &Tensor) -> Result<Tensor> {
    let parts = [Some(known.clone()), behind(video, known.dim(2)?)?];
    Ok(Tensor::cat(&parts.into_iter().flatten().collect::<Vec<_>>(), 2)?)
}

/// `mask` in 0..1 as 0 and 1: a mask that was scaled is grey at its edges.
///
/// # Errors
/// When the tensor library fails.
pub fn hard(mask: &Tensor) -> Result<Tensor> {
    Ok(mask.gt(HALF)?.to_dtype(DType::F32)?)
}

/// What is around the character of `video` [1, 3, f, h, w]: black where `mask` [1, 1, f, h, w] is 1.
///
/// # Errors
/// A mask of another size than the video.
pub fn background(video: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let around = mask.affine(-1.0, 1.0)?;
    // In -1..1 black is -1.
    Ok(video.affine(1.0, 1.0)?.broadcast_mul(&around)?.affine(1.0, -1.0)?)
}

/// The frames of `x` from number `start` on, if there are any.
fn behind(x: &Tensor, start: usize) -> Result<Option<Tensor>> {
    let frames = x.dim(2)?;
    Ok(if start < frames { Some(x.narrow(2, start, frames - start)?.contiguous()?) } else { None })
}

/// `mask` [1, 1, f, H, W] at the size of latents, the first pixel of each cell.
fn nearest(mask: &Tensor, (height, width): (usize, usize)) -> Result<Tensor> {
    let (_, _, frames, tall, wide) = mask.dims5()?;
    let cells = mask.contiguous()?.reshape(&[frames, height, tall / height, width, wide / width][..])?;
    let first = cells.narrow(2, 0, 1)?.narrow(4, 0, 1)?.contiguous()?;
    Ok(first.reshape((1, 1, frames, height, width))?)
}
