//! A sample: a clip at a noise level, with all that is drawn for it.

use kernels::random::Key;
use kernels::{DType, Device, Tensor};
use models::dit::{Conditioning, Raw, Role};

use super::Batches;
use crate::encode::{LeftOut, PictureInputs};
use crate::error::{Error, Result};
use crate::learning::mask;

/// A sample before it is stacked with the others of its batch.
#[derive(Clone)]
pub(super) struct Sample {
    pub noisy: Tensor,
    pub target: Tensor,
    pub sigma: f64,
    /// What its loss is multiplied by: its set's weight.
    pub weight: f64,
    /// Weights of its latents [1, t, h, w], where its clip has a mask.
    pub loss_weights: Option<Tensor>,
    /// The share of the base's prediction in its target, which broadcasts to [1, t, h, w], where it has one.
    pub of_base: Option<Tensor>,
    /// What the base predicts for these texts [s, width] is added to its target, times these factors.
    pub guides: Vec<(f64, Tensor)>,
    /// Its text.
    pub caption: String,
    /// All that it is conditioned on but its timestep, without a batch axis.
    pub cond: Conditioning<Raw>,
    pub given: Given,
}

/// Whether the first latent frame of a sample is given, in the place of a noisy one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Given {
    Nothing,
    FirstFrame,
}

impl Batches<'_> {
    /// The sample of `window` at `sigma` that has the number `slot` in step `step`, with all that is drawn for it.
    pub(super) fn sample(&self, window: usize, sigma: f64, step: u64, slot: u64) -> Result<Sample> {
        let drawn = self.streams.caption(step, slot);
        let is_dropped = drawn.uniform(0) < self.caption_dropout;
        let slider = self.slider(step, slot);
        let caption = match slider {
            Some(slider) => &slider.prompt,
            None if is_dropped => "",
            None => self.item(window).drawn(drawn.uniform(1)),
        };
        let given = match self.streams.picture(step, slot).uniform(0) < self.picture_share {
            true => Given::FirstFrame,
            false => Given::Nothing,
        };
        let drawn = self.streams.conditions(step, slot);
        let is_left_out = |index: u64, share: Option<f64>| drawn.uniform(index) < share.unwrap_or(0.0);
        let left_out = LeftOut {
            control: is_left_out(0, self.drop.control),
            start: is_left_out(1, self.drop.start),
            reference: is_left_out(2, self.drop.reference),
            clip: is_left_out(3, self.drop.clip),
            faces: is_left_out(4, self.drop.faces),
            audio: is_left_out(5, self.drop.audio),
        };
        let sample =
            self.noised(window, (sigma, self.streams.noise(step, slot)), caption, given, left_out)?;
        match slider {
            Some(slider) => self.on_slider(sample, slider),
            None => Ok(sample),
        }
    }

    /// x = (1 - sigma) x0 + sigma noise, and the velocity noise - x0 that leads there; behind x what an image-to-video model
    /// is shown of the clip's ends. A first frame that is given is clean; of a single frame nothing would be left to learn.
    pub(super) fn noised(
        &self,
        window: usize,
        (sigma, noise): (f64, Key),
        caption: &str,
        given: Given,
        left_out: LeftOut,
    ) -> Result<Sample> {
        let shown = self.encoded.shown_of_window(window, left_out)?;
        let PictureInputs { beside_bcthw, in_front_bcthw, cond, .. } = shown;
        let x0 = self.encoded.learnt(window)?;
        let x0 = match in_front_bcthw {
            Some(references) => Tensor::cat(&[references, x0], 1)?,
            None => x0,
        };
        let noise = Tensor::from_vec(noise.normals(x0.elem_count()), x0.shape(), &Device::Cpu)?;
        let mut noisy = ((&x0 * (1.0 - sigma))? + (&noise * sigma)?)?;
        let frames = x0.dim(1)?;
        let given = if self.encoded.is_first_in_place(left_out) { Given::FirstFrame } else { given };
        let given = if frames > 1 { given } else { Given::Nothing };
        if given == Given::FirstFrame {
            noisy = Tensor::cat(&[x0.narrow(1, 0, 1)?, noisy.narrow(1, 1, frames - 1)?], 1)?;
        }
        if let Some(beside) = beside_bcthw {
            noisy = Tensor::cat(&[noisy, beside], 0)?;
        }
        let cond = cond.with(Role::TEXT, self.encoded.text(caption)?);
        let weight = self.set(window).weight;
        let mask = self.loss_mask(window, frames)?;
        let loss_weights = self.loss_masks.as_ref().zip(mask.as_ref());
        let loss_weights =
            loss_weights.map(|(masks, mask)| Ok::<_, Error>(mask::weights(mask, masks.outside)?.squeeze(0)?));
        Ok(Sample {
            noisy,
            target: (noise - x0)?,
            sigma,
            weight,
            loss_weights: loss_weights.transpose()?,
            of_base: self.of_base(window, mask)?,
            guides: Vec::new(),
            caption: caption.to_owned(),
            cond,
            given,
        })
    }

    /// The mask [1, t, h, w] of the `frames` latent frames of a sample of `window`, 1 inside: those in front of the clip's own, of
    /// references, are. Where fewer are learnt than the clip has, they are its last.
    fn loss_mask(&self, window: usize, frames: usize) -> Result<Option<Tensor>> {
        let Some(mask_thw) = self.encoded.loss_mask(window)? else { return Ok(None) };
        let mask = mask_thw.unsqueeze(0)?;
        let (_, own, height, width) = mask.dims4()?;
        if frames <= own {
            return Ok(Some(mask.narrow(1, own - frames, frames)?));
        }
        let in_front = Tensor::ones((1, frames - own, height, width), DType::F32, &Device::Cpu)?;
        Ok(Some(Tensor::cat(&[in_front, mask], 1)?))
    }
}
