//! Long clips in pieces, each of which continues the one before: the last frames of what is there, decoded and encoded again, are the past
//! of the next.
//!
//! Sources: Wan-Video/Wan2.2 wan/speech2video.py `WanS2V.generate`, wan/animate.py `WanAnimate.generate`.

use kernels::random::Key;
use kernels::{DType, Device, Tensor};
use models::dit::speech::PAST;
use models::vae::{TEMPORAL_RATIO, Tiling, Vae};

use super::Prompted;
use crate::encode::conditions::latents as encoded;
use crate::encode::length::{DROPPED, SHARED};
use crate::error::{Error, Result};

/// Frames that a piece continues.
pub const PAST_PIXELS: usize = 73;

/// A stretch of a clip as it is decoded.
#[derive(Debug, Clone)]
pub struct Piece {
    /// [1, c, t, h, w].
    pub latents: Tensor,
    /// Frames at its start that are not the clip's.
    pub before: usize,
    /// Frames behind these that are the clip's, at most.
    pub frames: usize,
}

impl Piece {
    /// A whole clip.
    pub fn whole(latents: Tensor) -> Self {
        Self { latents, before: 0, frames: usize::MAX }
    }
}

/// A clip that is made piece by piece.
pub(super) struct Growing {
    /// The pieces that are there.
    pub pieces: Vec<Piece>,
    /// The latents of each, [1, c, t, h, w].
    pub latents: Vec<Tensor>,
    /// The last frames of what is there, [1, 3, 73, h, w] f32 on the host; grey where there are fewer.
    tail: Option<Tensor>,
    /// What the next piece continues: S2V's past [1, c, 19, h, w], or Animate's channels [1, 4 + c, 1 + t, h, w]; f32 on the host.
    past: Option<Past>,
    /// Frames of the clip that are there.
    frames: usize,
}

/// What a piece continues.
enum Past {
    Latents(Tensor),
    Beside(Tensor),
}

impl Growing {
    /// Of `clip`, whose first piece has these latents.
    ///
    /// # Errors
    /// When the tensor library fails.
    pub fn begun(clip: &Prompted, latents: Tensor) -> Result<Self> {
        let mut growing = Self { pieces: Vec::new(), latents: Vec::new(), tail: None, past: None, frames: 0 };
        let Some(lead) = &clip.shown.lead_bcthw else {
            let frames = TEMPORAL_RATIO * (latents.dim(2)? - 1) + 1;
            let piece = match clip.shown.later.is_empty() {
                true => Piece::whole(latents.clone()),
                false => Piece { latents: latents.clone(), before: 0, frames },
            };
            growing.frames = frames;
            growing.pieces.push(piece);
            growing.latents.push(latents);
            return Ok(growing);
        };
        // The frame of the lead, and those that are dropped.
        let before = 1 + DROPPED as usize;
        let frames = TEMPORAL_RATIO * latents.dim(2)? - DROPPED as usize;
        growing.add(clip, (Some(lead), latents), (before, frames))?;
        Ok(growing)
    }

    /// Adds a piece that is decoded, behind the latents `front` where there are some: of its frames, those behind the first `before` are the clip's.
    fn add(
        &mut self,
        clip: &Prompted,
        (front, own): (Option<&Tensor>, Tensor),
        (before, frames): (usize, usize),
    ) -> Result<()> {
        let latents = match front {
            Some(front) => Tensor::cat(&[&front.to_device(own.device())?, &own], 2)?,
            None => own.clone(),
        };
        let frames = frames.min(clip.request.frames as usize - self.frames);
        self.frames += frames;
        self.pieces.push(Piece { latents, before, frames });
        self.latents.push(own);
        Ok(())
    }

    /// Decodes the last piece, and encodes the last frames of the clip for the piece `index`, the next.
    ///
    /// # Errors
    /// What the VAE does not take, and frames that are not finite.
    pub fn look_back(&mut self, clip: &Prompted, vae: &Vae, index: usize) -> Result<()> {
        let Some(piece) = self.pieces.last() else { return Ok(()) };
        let video =
            vae.decode_to_host(&piece.latents, Tiling::Off, &Device::Cpu).map_err(|error| match error {
                models::Error::NotFinite { .. } => {
                    Error::NonFiniteVideo { clip: clip.request.prompt.clone() }
                }
                other => other.into(),
            })?;
        let (_, channels, all, height, width) = video.dims5()?;
        if let Some(scene) = clip.shown.later.get(index - 1).and_then(|later| later.scene.as_ref()) {
            let shared = SHARED as usize;
            let known = video.narrow(2, all - shared, shared)?.contiguous()?;
            self.past = Some(Past::Beside(scene.beside(vae, &known)?));
            return Ok(());
        }
        let own = video.narrow(2, piece.before, all - piece.before)?;
        let before = match self.tail.take() {
            Some(tail) => tail,
            None => Tensor::zeros((1, channels, PAST_PIXELS, height, width), DType::F32, &Device::Cpu)?,
        };
        let all = Tensor::cat(&[before, own], 2)?;
        let tail = all.narrow(2, all.dim(2)? - PAST_PIXELS, PAST_PIXELS)?.contiguous()?;
        self.past = Some(Past::Latents(encoded(vae, &tail)?));
        self.tail = Some(tail);
        Ok(())
    }

    /// `clip` as its piece `index` starts, from 1: with the sound and the poses of that piece, behind what is there, from noise of its own.
    ///
    /// # Errors
    /// A piece that the clip does not have.
    pub fn next(&self, clip: &Prompted, index: usize) -> Result<Prompted> {
        let gone = || kernels::Error::msg("a clip is continued that has no piece left");
        let own = clip.shown.later.get(index - 1).ok_or_else(gone)?;
        let past = self.past.as_ref().ok_or_else(gone)?;
        let mut next = clip.clone();
        let device = clip.noise_bcthw.device();
        let cond = match past {
            Past::Latents(past) => own.cond.clone().with(PAST, past.clone()).to_device(device)?,
            Past::Beside(beside) => {
                next.shown.beside_bcthw = Some(beside.to_device(device)?);
                own.cond.to_device(device)?
            }
        };
        next.shown.cond = clip.shown.cond.clone().merged(cond);
        next.shown.later = Vec::new();
        let key = Key::new(clip.request.seed, "sample", &[index as u64]);
        let noise = key.normals(clip.noise_bcthw.elem_count());
        next.noise_bcthw =
            Tensor::from_vec(noise, clip.noise_bcthw.shape(), &Device::Cpu)?.to_device(device)?;
        Ok(next)
    }

    /// Adds the piece that was made with [`Self::next`].
    ///
    /// # Errors
    /// When the tensor library fails.
    pub fn continued(&mut self, clip: &Prompted, latents: Tensor) -> Result<()> {
        let frames = TEMPORAL_RATIO * latents.dim(2)?;
        match self.past.take() {
            None => Ok(()),
            Some(Past::Latents(past)) => self.add(clip, (Some(&past), latents), (PAST_PIXELS, frames)),
            Some(Past::Beside(_)) => {
                let shared = SHARED as usize;
                self.add(clip, (None, latents), (shared, frames - TEMPORAL_RATIO + 1 - shared))
            }
        }
    }
}
