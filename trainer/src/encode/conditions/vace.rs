//! The context of VACE's side chain: latents of what is kept and of what is generated, the mask, and reference pictures.

use kernels::{DType, Device, Tensor};
use models::vae::{TEMPORAL_RATIO, Vae};

use super::{HALF, latents};
use crate::error::{Error, Result};

/// Side of the squares of pixels that the mask's channels are made of; it is the stride of the VAE.
const SQUARE: usize = 8;

/// The context [1, 2c + 64, k + t, h, w] of `video` and `mask`, with `references` [1, 3, 1, h, w] each as a latent frame in front,
/// in their order. Without a clip everything is generated.
///
/// # Errors
/// Sizes that the VAE does not take, and a mask or references of another size than the clip's.
pub fn context(vae: &Vae, (video, mask): (&Tensor, &Tensor), references: &[Tensor]) -> Result<Tensor> {
    let references = references.iter().map(|one| latents(vae, one)).collect::<Result<Vec<_>>>()?;
    assembled(&kept_and_made(vae, video, mask)?, &mask_channels(mask)?, &references)
}

/// [`context`] from the parts that are cached: latents of [`kept_and_made`], channels of [`mask_channels`], and the latents
/// [1, c, 1, h, w] of each reference.
///
/// # Errors
/// Parts of different sizes.
pub fn assembled(kept_and_made: &Tensor, mask: &Tensor, references: &[Tensor]) -> Result<Tensor> {
    let whole = Tensor::cat(&[kept_and_made, mask], 1)?;
    let channels = whole.dim(1)?;
    let in_front = |reference: &Tensor| reference.pad_with_zeros(1, 0, channels - reference.dim(1)?);
    let mut frames = references.iter().map(in_front).collect::<kernels::Result<Vec<_>>>()?;
    frames.push(whole);
    Ok(Tensor::cat(&frames, 2)?)
}

/// The latents [1, 2c, t, h, w] of `video` with what is generated in grey, then of what is generated with the rest in grey.
///
/// # Errors
/// Sizes that the VAE does not take.
pub fn kept_and_made(vae: &Vae, video: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let made = mask.gt(HALF)?.to_dtype(DType::F32)?;
    let kept = made.affine(-1.0, 1.0)?;
    let of = |part: &Tensor| latents(vae, &video.broadcast_mul(part)?);
    Ok(Tensor::cat(&[of(&kept)?, of(&made)?], 1)?)
}

/// The clip whose context a model learns from: `clip` where it is kept, and where `mask` lets it be generated the control clip, or
/// grey without one. The model must not see what it is to generate.
///
/// # Errors
/// Videos or a mask of different sizes.
pub fn edited(clip: &Tensor, mask: &Tensor, control: Option<&Tensor>) -> Result<Tensor> {
    let made = mask.gt(HALF)?.to_dtype(DType::F32)?;
    let kept = clip.broadcast_mul(&made.affine(-1.0, 1.0)?)?;
    Ok(match control {
        Some(control) => (kept + control.broadcast_mul(&made)?)?,
        None => kept,
    })
}

/// The channels [1, 64, t, h/8, w/8] of a mask of pixels [1, 1, f, h, w]: a channel for each place in a square of pixels; of the
/// frames, the nearest to each latent frame's middle.
///
/// # Errors
/// Sides that are not multiples of 8.
pub fn mask_channels(mask: &Tensor) -> Result<Tensor> {
    let (_, _, frames, height, width) = mask.dims5()?;
    if height % SQUARE != 0 || width % SQUARE != 0 {
        let why = format!("{width}x{height}: both sides must be multiples of {SQUARE}");
        return Err(Error::Setting { key: "size of a mask".into(), why });
    }
    let (rows, columns) = (height / SQUARE, width / SQUARE);
    let count = frames.div_ceil(TEMPORAL_RATIO);
    let nearest = |frame: usize| ((2 * frame + 1) * frames / (2 * count)).min(frames - 1);
    let of_frame = |frame: usize| -> Result<Tensor> {
        let plane = mask.narrow(2, nearest(frame), 1)?.reshape(&[rows, SQUARE, columns, SQUARE][..])?;
        Ok(plane.permute([1, 3, 0, 2])?.contiguous()?.reshape((1, SQUARE * SQUARE, 1, rows, columns))?)
    };
    let frames = (0..count).map(of_frame).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&frames, 2)?)
}

/// The colour around a picture that is scaled to fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Canvas {
    /// As VACE has it.
    White,
    /// As Animate has it.
    Black,
}

/// A reference picture [1, 3, h, w] scaled to fit into `size` = (height, width), bilinearly without antialiasing, in the middle
/// of a canvas: [1, 3, 1, height, width].
///
/// # Errors
/// When the tensor library fails.
pub fn on_canvas(picture: &Tensor, (height, width): (usize, usize), colour: Canvas) -> Result<Tensor> {
    let (_, channels, own_height, own_width) = picture.dims4()?;
    let scale = (height as f64 / own_height as f64).min(width as f64 / own_width as f64);
    let fit = |own: usize, most: usize| ((own as f64 * scale) as usize).clamp(1, most);
    let (tall, wide) = (fit(own_height, height), fit(own_width, width));
    let values: Vec<f32> = picture.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
    let (top, left) = ((height - tall) / 2, (width - wide) / 2);
    let around = if colour == Canvas::White { 1f32 } else { -1f32 };
    let mut canvas = vec![around; channels * height * width];
    let (rows, columns) = (taps(own_height, tall), taps(own_width, wide));
    for channel in 0..channels {
        let plane = &values[channel * own_height * own_width..][..own_height * own_width];
        for (row, &(y0, y1, dy)) in rows.iter().enumerate() {
            for (column, &(x0, x1, dx)) in columns.iter().enumerate() {
                let at = |y: usize, x: usize| plane[y * own_width + x];
                let above = at(y0, x0) * (1.0 - dx) + at(y0, x1) * dx;
                let below = at(y1, x0) * (1.0 - dx) + at(y1, x1) * dx;
                let place = (channel * height + top + row) * width + left + column;
                canvas[place] = above * (1.0 - dy) + below * dy;
            }
        }
    }
    Ok(Tensor::from_vec(canvas, (1, channels, 1, height, width), &Device::Cpu)?)
}

/// The two old lines that each new one is between, and its distance from the first.
fn taps(from: usize, to: usize) -> Vec<(usize, usize, f32)> {
    let scale = from as f32 / to as f32;
    let tap = |line: usize| {
        let at = (scale * (line as f32 + 0.5) - 0.5).max(0.0);
        let first = (at.floor() as usize).min(from - 1);
        (first, (first + 1).min(from - 1), at - first as f32)
    };
    (0..to).map(tap).collect()
}
