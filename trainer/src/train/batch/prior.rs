//! What of a step is trained on the base's own predictions: priors beside micro-batches, sliders, sets, and what is outside of masks.

use data::{Batch, LearnFrom};
use kernels::{DType, Device, Tensor};
use models::dit::Role;

use super::{Batches, Sample};
use crate::error::Result;
use crate::learning::slider::SliderConfig;

impl Batches<'_> {
    /// Whether a prior is beside the micro-batch `index` of step `step`, which has the samples of `batch`.
    pub(super) fn has_prior(&self, step: u64, index: usize, batch: &Batch) -> bool {
        // Batches do not mix sets that differ in it.
        let of_set = batch.items.first().map(|item| self.set(self.trained[*item]).target);
        let is_of_clips = of_set.is_none_or(|target| target.is_clip());
        self.prior.is_made() && is_of_clips && self.streams.has_prior(step, index as u64, self.prior.share)
    }

    /// The priors of `samples`, which are of `items`: the same at the same noise, with other texts, and all of their targets are the
    /// base's.
    pub(super) fn priors(&self, samples: Vec<Sample>, items: &[usize]) -> Result<Vec<Sample>> {
        let of = |(sample, item): (Sample, &usize)| -> Result<Sample> {
            let trigger = self.set(self.trained[*item]).trigger.as_deref();
            let caption = self.prior.text(&sample.caption, trigger).into_owned();
            Ok(Sample {
                weight: sample.weight * self.prior.weight,
                loss_weights: None,
                of_base: Some(whole()?),
                guides: Vec::new(),
                cond: sample.cond.with(Role::TEXT, self.encoded.text(&caption)?),
                caption,
                ..sample
            })
        };
        samples.into_iter().zip(items).map(of).collect()
    }

    /// The slider of a sample, where there are sliders.
    pub(super) fn slider(&self, step: u64, slot: u64) -> Option<&SliderConfig> {
        let drawn = self.streams.slider(step, slot).uniform(0);
        self.sliders.get((drawn * self.sliders.len() as f64) as usize)
    }

    /// `sample`, whose text is the prompt of `slider`, with the target of that.
    pub(super) fn on_slider(&self, sample: Sample, slider: &SliderConfig) -> Result<Sample> {
        let guides = vec![
            (slider.scale, self.encoded.text(&slider.positive)?),
            (-slider.scale, self.encoded.text(&slider.negative)?),
        ];
        Ok(Sample { of_base: Some(whole()?), guides, ..sample })
    }

    /// The share of the base's prediction in the target of a sample of `window` with the mask of its loss [1, t, h, w].
    pub(super) fn of_base(&self, window: usize, mask: Option<Tensor>) -> Result<Option<Tensor>> {
        if self.set(window).target == LearnFrom::Base {
            return whole().map(Some);
        }
        let is_outside =
            self.loss_masks.as_ref().is_some_and(|masks| masks.outside_target == LearnFrom::Base);
        match mask.filter(|_| is_outside) {
            Some(mask) => Ok(Some(((mask * -1.0)? + 1.0)?)),
            None => Ok(None),
        }
    }
}

/// A target that is all the base's.
fn whole() -> Result<Tensor> {
    Ok(Tensor::ones((1, 1, 1, 1), DType::F32, &Device::Cpu)?)
}
