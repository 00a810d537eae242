//! What a replica does in a step: micro-batches that are trained, and predictions of the base that some of them are held against.

use data::{DataConfig, Dataset, LearnFrom};

use crate::error::Result;
use crate::recipe::TrainConfig;

/// The work of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Work {
    /// Micro-batches of clips.
    pub accumulate: usize,
    /// Micro-batches with the priors beside them, at most.
    pub micro_batches: usize,
    /// Predictions of the base, at most.
    pub of_base: usize,
    /// Micro-batches on average.
    pub trained: f64,
    /// Predictions on average.
    pub predicted: f64,
}

impl Work {
    /// Of a replica whose share of the steps is `train`, over `dataset`, which is what `data` came to.
    ///
    /// # Errors
    /// A prior that does not fit the data.
    pub fn of(train: &TrainConfig, dataset: &Dataset, data: &DataConfig) -> Result<Self> {
        train.prior.check_class(data)?;
        let (accumulate, prior) = (train.accumulate, &train.prior);
        let beside = if prior.is_made() { accumulate } else { 0 };
        // Whether a clip has a mask is not known of every window.
        let is_outside =
            data.loss_masks.as_ref().is_some_and(|masks| masks.outside_target == LearnFrom::Base);
        let of_sets = share_of_sets(dataset);
        let own = if is_outside { 1.0 } else { of_sets };
        let priors = beside as f64 * prior.share * (1.0 - of_sets);
        Ok(Self {
            accumulate,
            micro_batches: accumulate + beside,
            of_base: beside + if own > 0.0 { accumulate } else { 0 },
            trained: accumulate as f64 + priors,
            predicted: accumulate as f64 * own + priors,
        })
    }

    /// What of it is for the base's predictions; nothing where there are none. `[seconds, of_call]` are those of a micro-batch that is
    /// trained, and of a prediction.
    pub fn note(&self, [seconds, of_call]: [f64; 2]) -> Option<String> {
        if self.of_base == 0 {
            return None;
        }
        let beside = self.trained - self.accumulate as f64;
        let priors = match beside > 0.0 {
            true => format!("{beside:.2} priors beside its micro-batches and "),
            false => String::new(),
        };
        let own = self.accumulate as f64 * seconds;
        let times = (self.trained * seconds + self.predicted * of_call) / own;
        Some(format!(
            "a step has {priors}{:.2} predictions of the base on average: about {times:.2} times the work of a step without them",
            self.predicted
        ))
    }
}

/// The fraction of the micro-batches that are from sets whose targets are the base's.
fn share_of_sets(dataset: &Dataset) -> f64 {
    let (mut counted, mut of_base) = (0.0, 0.0);
    for window in &dataset.windows {
        let item = &dataset.sources[window.source].item;
        let set = &dataset.sets[item.set];
        if !item.held_out && set.share.is_none() {
            let repeats = f64::from(item.repeats);
            counted += repeats;
            of_base += if set.target.is_clip() { 0.0 } else { repeats };
        }
    }
    let claimed: f64 = dataset.sets.iter().filter_map(|set| set.share).sum();
    let claimed_of_base: f64 =
        dataset.sets.iter().filter(|set| !set.target.is_clip()).filter_map(|set| set.share).sum();
    claimed_of_base + if counted > 0.0 { (1.0 - claimed) * of_base / counted } else { 0.0 }
}
