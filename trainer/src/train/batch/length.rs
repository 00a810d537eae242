//! How long a step is: a number of micro-batches, or as many as bring it to a number of tokens.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use data::{Batch, Bucket, Cursor, Dataset};

use super::Batches;
use crate::encode::LatentStore;
use crate::error::Result;
use crate::learning::step_size::{MeanOver, tokens_of};
use crate::recipe::TrainConfig;

/// Where steps end, and what their micro-batches count for.
#[derive(Debug)]
pub(super) struct Length {
    /// Tokens with which a step ends.
    tokens_per_step: Option<usize>,
    mean_over: MeanOver,
    /// Tokens of a clip of each bucket, where they are counted.
    tokens: BTreeMap<Bucket, usize>,
}

impl Length {
    /// As `train` says, for the clips of `dataset`.
    ///
    /// # Errors
    /// Latents that cannot be read.
    pub fn of(train: &TrainConfig, dataset: &Dataset, encoded: &LatentStore) -> Result<Self> {
        let (tokens_per_step, mean_over) = (train.tokens_per_step, train.mean_over());
        let mut tokens = BTreeMap::new();
        if tokens_per_step.is_some() || mean_over == MeanOver::Tokens {
            for (index, window) in dataset.windows.iter().enumerate() {
                if let Entry::Vacant(entry) = tokens.entry(window.bucket) {
                    let (_, frames, height, width) = encoded.latents(index)?.dims4()?;
                    entry.insert(tokens_of((frames, height, width)));
                }
            }
        }
        Ok(Self { tokens_per_step: tokens_per_step.map(|tokens| tokens as usize), mean_over, tokens })
    }

    /// Tokens of all clips of `batch`; 0 where none are counted.
    fn tokens(&self, batch: &Batch) -> usize {
        self.tokens.get(&batch.bucket).map_or(0, |tokens| tokens * batch.items.len())
    }

    /// What `batch` counts for in the mean of its step.
    pub fn counts(&self, batch: &Batch) -> usize {
        match self.mean_over {
            MeanOver::Samples => batch.items.len(),
            MeanOver::Tokens => self.tokens(batch),
        }
    }

    /// Tokens of all `batches` of a step, where steps end by them.
    pub fn all_tokens(&self, batches: &[(Batch, Cursor)]) -> Option<usize> {
        self.tokens_per_step.map(|_| batches.iter().map(|(batch, _)| self.tokens(batch)).sum())
    }
}

impl Batches<'_> {
    /// The batches of a step from `cursor` on: `accumulate` of them, or up to the one with which their tokens reach those of a step.
    pub(super) fn batches_from(&self, cursor: Cursor, accumulate: usize) -> Vec<(Batch, Cursor)> {
        let order = self.order.from(cursor);
        let Some(enough) = self.length.tokens_per_step else { return order.take(accumulate).collect() };
        let before = |sum: &mut usize, next: (Batch, Cursor)| {
            let is_in = *sum < enough;
            *sum += self.length.tokens(&next.0);
            is_in.then_some(next)
        };
        order.scan(0, before).collect()
    }
}
