//! What a network is shown of a picture: made from pixels, the same way for training and for sampling.

use kernels::{DType, Device, Tensor};
use models::dit::config::MASK_CHANNELS;
use models::dit::{Conditioning, Raw};
use models::vae::{TEMPORAL_RATIO, Tiling, Vae};

use super::animated::LaterScene;
use crate::error::Result;

/// What a network is shown of a picture, besides noisy latents and text; nothing where it takes none.
#[derive(Debug, Clone, Default)]
pub struct PictureInputs {
    /// Mask and latents [b, 4 + c, t, h, w] f32 that go behind the noisy channels.
    pub beside_bcthw: Option<Tensor>,
    /// Clean latents [b, c, 1, h, w] f32 in place of the first frame's.
    pub first_bcthw: Option<Tensor>,
    /// Clean latents [b, c, k, h, w] f32 of reference pictures that are frames before the clip's own (VACE): they are noised and
    /// learnt as its frames are, and a finished clip is without them.
    pub in_front_bcthw: Option<Tensor>,
    /// What encoders made of it besides, such as CLIP's states.
    pub cond: Conditioning<Raw>,
    /// What takes the place of some of [`Self::cond`] beside the negative prompt.
    pub negative: Conditioning<Raw>,
    /// Clean latents [b, c, 1, h, w] f32 that a clip is decoded behind (S2V: its reference picture).
    pub lead_bcthw: Option<Tensor>,
    /// What each piece of the clip behind the first is shown; it stays on the host until then.
    pub later: Vec<Later>,
}

/// What a piece of a clip behind the first is shown.
#[derive(Debug, Clone)]
pub struct Later {
    /// What takes the place of some of [`PictureInputs::cond`].
    pub cond: Conditioning<Raw>,
    /// What Animate is given behind the last frames of the piece before.
    pub scene: Option<LaterScene>,
}

impl PictureInputs {
    /// The same on `device`.
    ///
    /// # Errors
    /// When a copy fails.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let there = |x: &Option<Tensor>| x.as_ref().map(|x| x.to_device(device)).transpose();
        Ok(Self {
            beside_bcthw: there(&self.beside_bcthw)?,
            first_bcthw: there(&self.first_bcthw)?,
            in_front_bcthw: there(&self.in_front_bcthw)?,
            cond: self.cond.to_device(device)?,
            negative: self.negative.to_device(device)?,
            lead_bcthw: self.lead_bcthw.clone(),
            later: self.later.clone(),
        })
    }
}

impl PictureInputs {
    /// Latent frames before those of the clip.
    ///
    /// # Errors
    /// If they have no axis of frames.
    pub fn frames_in_front(&self) -> Result<usize> {
        Ok(self.in_front_bcthw.as_ref().map_or(Ok(0), |latents| latents.dim(2))?)
    }
}

/// Which frames of a clip are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GivenFrames {
    /// The first one.
    First,
    /// The first and the last one.
    Both,
}

impl GivenFrames {
    /// Its name in the keys of cache entries, which must never change.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::First => "First",
            Self::Both => "Both",
        }
    }
}

/// The mask [4, t, h, w] f32 that says which frames of latents [t, h, w] are given: a latent frame holds four frames, the
/// first latent frame four times the first one.
///
/// # Errors
/// When the tensor library fails.
pub fn mask(ends: GivenFrames, (frames, height, width): (usize, usize, usize)) -> Result<Tensor> {
    let is_given = |channel: usize, frame: usize| {
        frame == 0 || (ends == GivenFrames::Both && frame + 1 == frames && channel + 1 == MASK_CHANNELS)
    };
    let values: Vec<f32> = (0..MASK_CHANNELS)
        .flat_map(|channel| (0..frames).map(move |frame| (channel, frame)))
        .flat_map(|(channel, frame)| {
            std::iter::repeat_n(f32::from(u8::from(is_given(channel, frame))), height * width)
        })
        .collect();
    Ok(Tensor::from_vec(values, (MASK_CHANNELS, frames, height, width), &Device::Cpu)?)
}

/// The latents [c, t, h, w] f32 on the host of a clip of `frames` frames of which only the first, and maybe the `last`,
/// [3, h, w] in -1..1 each, is known: the rest is grey.
///
/// # Errors
/// Sizes that the VAE does not take.
pub fn condition(vae: &Vae, first: &Tensor, last: Option<&Tensor>, frames: usize) -> Result<Tensor> {
    let latents = condition_there(vae, first, last, frames)?;
    Ok(latents.squeeze(0)?.to_device(&Device::Cpu)?)
}

/// [`condition`] before it goes to the host, [1, c, t, h, w] on the VAE's device.
pub(crate) fn condition_there(
    vae: &Vae,
    first: &Tensor,
    last: Option<&Tensor>,
    frames: usize,
) -> Result<Tensor> {
    let (_, height, width) = first.dims3()?;
    let grey = |frames: usize| Tensor::zeros((3, frames, height, width), DType::F32, first.device());
    let mut parts = vec![first.unsqueeze(1)?];
    match last {
        Some(last) if frames > 1 => {
            parts.extend([grey(frames - 2)?, last.unsqueeze(1)?]);
        }
        _ => parts.push(grey(frames - 1)?),
    }
    parts.retain(|part| part.elem_count() > 0);
    let video = Tensor::cat(&parts, 1)?.unsqueeze(0)?;
    Ok(vae.encode(&video.to_device(vae.device())?, Tiling::Off)?)
}

/// Mask and latents [4 + c, t, h, w], from the latents of [`condition`].
///
/// # Errors
/// When the tensor library fails.
pub fn with_mask(latents: &Tensor, ends: GivenFrames) -> Result<Tensor> {
    let (_, frames, height, width) = latents.dims4()?;
    Ok(Tensor::cat(&[&mask(ends, (frames, height, width))?, latents], 0)?)
}

const _: () = assert!(MASK_CHANNELS == TEMPORAL_RATIO);
