//! The `[train.prior]` section of a recipe: what the base model knows is kept, by training on its own predictions.
//!
//! Beside a micro-batch of clips a second one is trained: the same latents at the same noise, with a text that is not about what is
//! learnt. Its target is what the base predicts for it without the adapter. As in ai-toolkit `SDTrainer.py` ("differential output
//! preservation", "blank prompt preservation").

use std::borrow::Cow;
use std::collections::BTreeSet;

use data::{DataConfig, Dataset, has_trigger, with_class};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A weight above this is a mistake.
const MOST: f64 = 100.0;

/// How much of what the base predicts is trained on besides the clips.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PriorConfig {
    /// What the prior's loss is multiplied by, beside that of the same clip, 0 to 100. Default 0: there is no prior.
    pub weight: f64,
    /// Fraction of the micro-batches that have a prior beside them, above 0 to 1; drawn by the seed. Default 1.
    pub share: f64,
    /// What stands in the place of the trigger in the prior's captions, such as `"a man"`. Default: none, the prior is about the
    /// empty prompt.
    pub class: Option<String>,
}

impl Default for PriorConfig {
    fn default() -> Self {
        Self { weight: 0.0, share: 1.0, class: None }
    }
}

impl PriorConfig {
    /// Checks the values.
    ///
    /// # Errors
    /// Naming the key and what it must be.
    pub fn check(&self) -> Result<()> {
        let refuse = |key: &str, why: String| Err(Error::Setting { key: format!("train.prior.{key}"), why });
        if !(0.0..=MOST).contains(&self.weight) {
            return refuse("weight", format!("{} must lie between 0 and {MOST}", self.weight));
        }
        if !(f64::MIN_POSITIVE..=1.0).contains(&self.share) {
            return refuse("share", format!("{} must be above 0 and at most 1", self.share));
        }
        if self.class.as_ref().is_some_and(|class| class.trim().is_empty()) {
            return refuse("class", "is empty: leave it out for the empty prompt".into());
        }
        let stray = match self {
            Self { share, .. } if *share < 1.0 => Some("share"),
            Self { class: Some(_), .. } => Some("class"),
            _ => None,
        };
        match stray {
            Some(key) if !self.is_made() => refuse(key, "there is no prior: set train.prior.weight".into()),
            _ => Ok(()),
        }
    }

    /// Checks that the class stands for a trigger of `data`, and does not hold it.
    ///
    /// # Errors
    /// A class without a trigger, or with the trigger in it.
    pub fn check_class(&self, data: &DataConfig) -> Result<()> {
        let Some(class) = &self.class else { return Ok(()) };
        let of_sets = data.sets.iter().filter_map(|set| set.trigger.as_ref());
        let triggers: Vec<&String> =
            data.trigger.iter().chain(of_sets).filter(|word| !word.is_empty()).collect();
        let refuse = |why: String| Err(Error::Setting { key: "train.prior.class".into(), why });
        if triggers.is_empty() {
            return refuse("stands in the place of the trigger, and there is none: set data.trigger".into());
        }
        match triggers.into_iter().find(|word| has_trigger(class, word)) {
            Some(word) => refuse(format!("\"{class}\" holds the trigger \"{word}\", which it is to replace")),
            None => Ok(()),
        }
    }

    /// Whether there is a prior.
    pub fn is_made(&self) -> bool {
        self.weight > 0.0
    }

    /// The prior's text for a sample with `caption` from clips with this `trigger`.
    pub fn text<'a>(&self, caption: &'a str, trigger: Option<&str>) -> Cow<'a, str> {
        match (&self.class, trigger) {
            (None, _) => Cow::Borrowed(""),
            (Some(class), Some(word)) => Cow::Owned(with_class(caption, word, class)),
            (Some(_), None) => Cow::Borrowed(caption),
        }
    }

    /// Every text that the priors of `dataset` may have, besides those that clips are trained with.
    pub fn texts(&self, dataset: &Dataset) -> BTreeSet<String> {
        if !self.is_made() {
            return BTreeSet::new();
        }
        let items = dataset.sources.iter().map(|source| &source.item).filter(|item| !item.held_out);
        let of = |item: &data::Item| -> Vec<String> {
            let trigger = dataset.sets[item.set].trigger.as_deref();
            item.texts().map(|text| self.text(text, trigger).into_owned()).collect()
        };
        items.flat_map(of).collect()
    }
}
