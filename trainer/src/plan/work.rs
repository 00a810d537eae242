//! What a replica does in a step: micro-batches that are trained, and predictions of the base that some of them are held against.

use data::{DataConfig, Dataset, LearnFrom};
use models::published::Defaults;

use crate::bounds::{self, ACCUMULATE};
use crate::error::Result;
use crate::learning::slider;
use crate::learning::step_size::tokens_of;
use crate::machine::forecast::SmallBatches;
use crate::recipe::TrainConfig;

/// Predictions for a slider besides that for its own prompt: for both ends.
const GUIDES: usize = 2;

/// The work of a step.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Work {
    /// Micro-batches of the largest clips with the priors beside them, at most.
    pub micro_batches: usize,
    /// Those of the smallest clips besides, at most.
    pub small: Option<SmallBatches>,
    /// Predictions of the base, at most.
    pub of_base: usize,
    /// Predictions of each for other texts, at most.
    pub guides: usize,
    /// Micro-batches of clips on average, as many of the largest clips as have their tokens.
    pub of_clips: f64,
    /// Micro-batches on average, likewise.
    pub trained: f64,
    /// Predictions on average, likewise.
    pub predicted: f64,
    /// What is to be said of steps of so many tokens.
    note: Option<String>,
}

/// The micro-batches of clips of a step.
struct OfClips {
    large: usize,
    small: Option<SmallBatches>,
    on_average: f64,
    note: Option<String>,
}

impl Work {
    /// Of one of `replicas` whose share of the steps is `train`, over `dataset`, which is what `data` came to, for a model with these
    /// `defaults`.
    ///
    /// # Errors
    /// A prior that does not fit the data, and a step of more micro-batches than are allowed.
    pub fn of(
        train: &TrainConfig,
        (dataset, data, defaults): (&Dataset, &DataConfig, &Defaults),
        replicas: usize,
    ) -> Result<Self> {
        train.prior.check_class(data)?;
        slider::check(&train.sliders, &train.prior, data)?;
        let OfClips { large, small, on_average, note } = match train.tokens_per_step {
            Some(tokens) => by_tokens(tokens, train.batch, (dataset, data, defaults), replicas)?,
            None => {
                let (large, on_average) = (train.accumulate, train.accumulate as f64);
                OfClips { large, small: None, on_average, note: None }
            }
        };
        let prior = &train.prior;
        let times = if prior.is_made() { 2 } else { 1 };
        let most = large + small.map_or(0, |small| small.count);
        // Whether a clip has a mask is not known of every window.
        let is_outside =
            data.loss_masks.as_ref().is_some_and(|masks| masks.outside_target == LearnFrom::Base);
        let of_sets = share_of_sets(dataset);
        let guides = if train.sliders.is_empty() { 0 } else { GUIDES };
        let own = match (guides, is_outside) {
            (0, true) => 1.0,
            (0, false) => of_sets,
            (guides, _) => (1 + guides) as f64,
        };
        let beside = if prior.is_made() { on_average * prior.share * (1.0 - of_sets) } else { 0.0 };
        Ok(Self {
            micro_batches: large * times,
            small: small.map(|small| SmallBatches { count: small.count * times, ..small }),
            of_base: most * (times - 1) + if own > 0.0 { most } else { 0 },
            guides,
            of_clips: on_average,
            trained: on_average + beside,
            predicted: on_average * own + beside,
            note,
        })
    }

    /// What is to be said of it, where `[seconds, of_call]` are those of a micro-batch that is trained, and of a prediction.
    pub fn notes(&self, [seconds, of_call]: [f64; 2]) -> Vec<String> {
        let mut notes: Vec<String> = self.note.iter().cloned().collect();
        if self.guides > 0 {
            notes.push("train.sliders: their prompts are trained, the captions of the clips are not".into());
        }
        if self.of_base > 0 {
            let beside = self.trained - self.of_clips;
            let priors = match beside > 0.0 {
                true => format!("{beside:.2} priors beside its micro-batches and "),
                false => String::new(),
            };
            let own = self.of_clips * seconds;
            let times = (self.trained * seconds + self.predicted * of_call) / own;
            notes.push(format!(
                "a step has {priors}{:.2} predictions of the base on average: about {times:.2} times the work of a step without them",
                self.predicted
            ));
        }
        notes
    }
}

/// The micro-batches of one of `replicas` in steps that end with this number of tokens, of batches of up to `batch` clips.
///
/// # Errors
/// More micro-batches than are allowed.
fn by_tokens(
    tokens: u64,
    batch: usize,
    (dataset, data, defaults): (&Dataset, &DataConfig, &Defaults),
    replicas: usize,
) -> Result<OfClips> {
    let shape = |width: u32, height: u32, frames: u32| defaults.latents(frames, height, width);
    let trained = dataset.windows.iter().filter(|window| !dataset.sources[window.source].item.held_out);
    let mut shapes: Vec<_> = trained
        .map(|window| shape(window.bucket.width, window.bucket.height, window.bucket.frames))
        .collect();
    if shapes.is_empty() {
        let sizes =
            data.sizes.iter().flat_map(|[w, h]| data.frames.iter().map(move |frames| (*w, *h, *frames)));
        shapes.extend(sizes.map(|(width, height, frames)| shape(width, height, frames)));
    }
    let smallest = shapes.iter().copied().min_by_key(|shape| tokens_of(*shape)).unwrap_or((1, 2, 2));
    let largest = shapes.iter().copied().max_by_key(|shape| tokens_of(*shape)).unwrap_or((1, 2, 2));
    // The last batch of a bucket may have one clip.
    let [least, most] =
        [tokens_of(smallest).max(1), tokens_of(largest).max(1) * batch].map(|count| count as u64);
    let fewest = tokens.div_ceil(most);
    let count = tokens.div_ceil(least);
    bounds::at_most(
        "train.tokens_per_step: micro-batches of the smallest clips in a step",
        count,
        ACCUMULATE,
    )?;
    // All but the last micro-batch of a step have fewer tokens than it.
    let own = count.div_ceil(replicas as u64);
    let large = own.min(fewest + 1);
    let range = |from: u64, to: u64| if from == to { from.to_string() } else { format!("{from} to {to}") };
    let note = format!(
        "a step ends with the micro-batch that brings it to {tokens} tokens: {} micro-batches of {} tokens each",
        range(fewest, count),
        range(least, most)
    );
    Ok(OfClips {
        large: large as usize,
        small: Some(SmallBatches { count: (own - large) as usize, latents: smallest }),
        on_average: (tokens as f64 / most as f64).max(1.0) / replicas as f64,
        note: Some(note),
    })
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
