//! The audio of a clip as Wan 2.2 S2V hears it: states of the speech encoder at the rate of frames.
//!
//! Source: Wan-Video/Wan2.2 wan/modules/s2v/audio_encoder.py `extract_audio_feat`, `get_audio_embed_bucket_fps`.

use kernels::{Device, Tensor};
use models::vae::Vae;
use models::wav2vec::STATE_RATE;

use super::latents;
use crate::error::Result;

/// The rate that states are resampled to before frames pick theirs.
pub const MIDDLE_RATE: f64 = 30.0;

/// `states` [l, n, c] f32 at the speech encoder's rate, as f32 at [`MIDDLE_RATE`]: linear, the ends on the ends.
///
/// # Errors
/// When the tensor library fails.
pub fn at_middle_rate(states: &Tensor) -> Result<Tensor> {
    let (layers, count, width) = states.dims3()?;
    let wanted = (count as f64 / STATE_RATE * MIDDLE_RATE) as usize;
    let values: Vec<f32> = states.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
    let scale = if wanted > 1 { (count as f32 - 1.0) / (wanted as f32 - 1.0) } else { 0.0 };
    let mut out = Vec::with_capacity(layers * wanted * width);
    for layer in 0..layers {
        let row = |frame: usize| &values[(layer * count + frame) * width..][..width];
        for frame in 0..wanted {
            let at = scale * frame as f32;
            let first = (at as usize).min(count - 1);
            let (a, b, share) = (row(first), row((first + 1).min(count - 1)), at - first as f32);
            out.extend(a.iter().zip(b).map(|(a, b)| (1.0 - share) * a + share * b));
        }
    }
    Ok(Tensor::from_vec(out, (layers, wanted, width), &Device::Cpu)?)
}

/// A column of `states` [l, n, c] at [`MIDDLE_RATE`] for each of `count` frames from number `start` on, at `fps` frames a second:
/// [l, c, count]; zeros behind the end of the audio.
///
/// # Errors
/// When the tensor library fails.
pub fn of_frames(states: &Tensor, (start, count): (usize, usize), fps: f64) -> Result<Tensor> {
    let (layers, there, width) = states.dims3()?;
    let values: Vec<f32> = states.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
    // Half to even, as Python rounds.
    let place = |frame: usize| ((start + frame) as f64 / fps * MIDDLE_RATE).round_ties_even() as usize;
    let places: Vec<usize> = (0..count).map(place).collect();
    let mut out = Vec::with_capacity(layers * width * count);
    for layer in 0..layers {
        for channel in 0..width {
            let at = |place: &usize| match *place < there {
                true => values[(layer * there + place) * width + channel],
                false => 0.0,
            };
            out.extend(places.iter().map(at));
        }
    }
    Ok(Tensor::from_vec(out, (layers, width, count), &Device::Cpu)?)
}

/// The latents [1, c, t, h, w] of a pose clip [1, 3, 4t, h, w]: the first frame is repeated in front, and its latent dropped, so that
/// four frames are in each.
///
/// # Errors
/// Sizes that the VAE does not take.
pub fn pose_latents(vae: &Vae, poses: &Tensor) -> Result<Tensor> {
    let first = poses.narrow(2, 0, 1)?.contiguous()?;
    let latents = latents(vae, &Tensor::cat(&[&first, poses], 2)?)?;
    let frames = latents.dim(2)?;
    Ok(latents.narrow(2, 1, frames - 1)?.contiguous()?)
}

/// Clips of `frames` frames that the audio of `states` [l, n, c] at [`MIDDLE_RATE`] lasts for, the last one possibly silent.
pub fn clips(states: usize, frames: usize, fps: f64) -> usize {
    (states as f64 / (frames as f64 * (MIDDLE_RATE / fps))) as usize + 1
}
