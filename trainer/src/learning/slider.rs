//! `[[train.sliders]]` of a recipe: directions between prompts, learnt from the base's own predictions.
//!
//! At the noised latents of a clip the adapter is to predict for a prompt what the base predicts for it, moved by the difference of what
//! the base predicts for two other prompts: `base(prompt) + scale (base(positive) - base(negative))`, as in Gandikota et al. 2023, Concept
//! Sliders, arXiv 2311.12092. The strength of the adapter then moves clips along the direction, and a negative one the other way.

use data::{DataConfig, LearnFrom};
use serde::{Deserialize, Serialize};

use super::prior::PriorConfig;
use crate::error::{Error, Result};

/// A scale above this is a mistake.
const MOST: f64 = 100.0;

/// A direction between two prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SliderConfig {
    /// What the slider changes, such as `"a person"`.
    pub prompt: String,
    /// Where it moves to, such as `"a smiling person"`.
    pub positive: String,
    /// Where it moves away from, such as `"a person with a straight face"`.
    pub negative: String,
    /// What the difference of both is multiplied by, above 0 to 100. Default 1.
    #[serde(default = "one")]
    pub scale: f64,
}

fn one() -> f64 {
    1.0
}

impl SliderConfig {
    /// Its three prompts.
    pub fn prompts(&self) -> [&str; 3] {
        [&self.prompt, &self.positive, &self.negative]
    }
}

/// Checks `sliders`, beside this `prior` and `data`.
///
/// # Errors
/// Sliders without a direction, and settings that they leave without a meaning.
pub fn check(sliders: &[SliderConfig], prior: &PriorConfig, data: &DataConfig) -> Result<()> {
    let refuse = |key: &str, why: String| Err(Error::Setting { key: key.into(), why });
    for (number, slider) in sliders.iter().enumerate() {
        let number = number + 1;
        if slider.positive.trim() == slider.negative.trim() {
            let why = format!("{number}: positive and negative are the same, so there is no direction");
            return refuse("train.sliders", why);
        }
        if !(f64::MIN_POSITIVE..=MOST).contains(&slider.scale) {
            let why = format!("{number}: scale is {}; it must be above 0 and at most {MOST}", slider.scale);
            return refuse("train.sliders", why);
        }
    }
    if sliders.is_empty() {
        return Ok(());
    }
    if prior.class.is_some() {
        let why = "is for captions, and train.sliders trains its own prompts: leave it out, or the sliders";
        return refuse("train.prior.class", why.into());
    }
    let of_masks = data.loss_masks.as_ref().map(|masks| masks.outside_target);
    let mut targets = data.sets.iter().map(|set| set.target).chain(of_masks);
    match targets.any(|target| target == LearnFrom::Base) {
        true => refuse(
            "train.sliders",
            "have targets of their own: leave out target = \"base\" of sets and outside_target of masks"
                .into(),
        ),
        false => Ok(()),
    }
}
