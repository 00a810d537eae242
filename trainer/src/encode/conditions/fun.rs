//! What Fun's models are shown beside the noise: a control clip, a start picture, given frames or pixels, a reference.

use kernels::{DType, Device, Tensor};
use models::dit::config::MASK_CHANNELS;
use models::published::Beside;
use models::vae::Vae;

use super::{HALF, by_latent_frame, latents};
use crate::error::Result;

/// Latents [1, c, t, h, w] of the conditions of a clip; zeros stand for those that it has not.
#[derive(Debug, Clone, Default)]
pub struct FunLatents {
    /// Of the control clip.
    pub control: Option<Tensor>,
    /// Of the start picture alone, one frame.
    pub start: Option<Tensor>,
    /// The mask (4 channels, 1 = given) and the latents of the clip with everything else in grey.
    pub given: Option<(Tensor, Tensor)>,
}

impl FunLatents {
    /// The channels after the noisy ones, in the order of `beside`, for latents [c, t, h, w].
    ///
    /// # Errors
    /// Conditions of another size than the latents'.
    pub fn beside(
        &self,
        beside: &[Beside],
        [channels, frames, height, width]: [usize; 4],
    ) -> Result<Option<Tensor>> {
        let zeros = |channels| Tensor::zeros((1, channels, frames, height, width), DType::F32, &Device::Cpu);
        let part = |part: &Beside| -> Result<Tensor> {
            let given = self.given.as_ref();
            let own = match part {
                Beside::Control => self.control.clone(),
                Beside::Start => self.start.as_ref().map(|start| in_front(start, frames)).transpose()?,
                Beside::Mask => given.map(|(mask, _)| mask.clone()),
                Beside::Given => given.map(|(_, latents)| latents.clone()),
            };
            let nothing = || zeros(if *part == Beside::Mask { MASK_CHANNELS } else { channels });
            Ok(own.map_or_else(nothing, Ok)?)
        };
        let parts = beside.iter().map(part).collect::<Result<Vec<_>>>()?;
        Ok(if parts.is_empty() { None } else { Some(Tensor::cat(&parts, 1)?) })
    }
}

/// `start` [1, c, 1, h, w] as the first of `frames` latent frames, zeros behind it.
fn in_front(start: &Tensor, frames: usize) -> Result<Tensor> {
    Ok(start.pad_with_zeros(2, 0, frames - 1)?)
}

/// The mask [1, 4, t, h/s, w/s] (1 = given) of a mask of pixels [1, 1, f, h, w] (1 = to be generated), where a latent is `stride`
/// pixels wide: the mean of the four pixels in its middle, as a bilinear scaling without antialiasing has it.
///
/// # Errors
/// A number of frames that is not of the form 4n + 1.
pub fn mask_latents(mask: &Tensor, stride: usize) -> Result<Tensor> {
    let (_, _, _, height, width) = mask.dims5()?;
    let given = by_latent_frame(mask)?.affine(-1.0, 1.0)?;
    let frames = given.dim(2)?;
    let (rows, columns, middle) = (height / stride, width / stride, stride / 2 - 1);
    let cells = given.reshape(&[MASK_CHANNELS * frames, rows, stride, columns, stride][..])?;
    let cells = cells.narrow(2, middle, 2)?.narrow(4, middle, 2)?.contiguous()?;
    Ok(cells.mean([2, 4])?.reshape((1, MASK_CHANNELS, frames, rows, columns))?)
}

/// The latents of `video` with all that `mask` lets be generated in grey.
///
/// # Errors
/// Sizes that the VAE does not take.
pub fn given_latents(vae: &Vae, video: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let kept = mask.affine(-1.0, 0.0)?.gt(-HALF)?.to_dtype(DType::F32)?;
    latents(vae, &video.broadcast_mul(&kept)?)
}
