//! The order in which items are trained: a function of seed and epoch, so that only a position has to be saved.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::bucket::Bucket;
use crate::random::Random;

/// One training item, as far as the order depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OrderItem {
    /// Items of one batch share it.
    pub bucket: Bucket,
    /// How often the item is trained per epoch, at least once.
    pub repeats: u32,
}

/// Items that are trained together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Size and length of all of them.
    pub bucket: Bucket,
    /// Indices into the items of the [`Order`]. Never empty; shorter than the batch size at the end of a bucket.
    pub items: Vec<usize>,
}

/// The position in the order: enough to resume exactly there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// Epoch, counted from 0.
    pub epoch: u64,
    /// Batches of that epoch already trained.
    pub position: u64,
}

/// The order of all epochs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    items: Vec<OrderItem>,
    seed: u64,
    batch_size: usize,
}

impl Order {
    /// An order over `items`; a `batch_size` of 0 is taken as 1.
    pub fn new(items: Vec<OrderItem>, seed: u64, batch_size: usize) -> Self {
        Self { items, seed, batch_size: batch_size.max(1) }
    }

    /// Batches of one epoch. Each item occurs as often as it repeats, batches never mix buckets, and none is dropped.
    /// The first batch of epoch 0 is one of the largest bucket: if memory does not suffice, that shows at once.
    pub fn batches(&self, epoch: u64) -> Vec<Batch> {
        let mut by_bucket: BTreeMap<Bucket, Vec<usize>> = BTreeMap::new();
        for (index, item) in self.items.iter().enumerate() {
            let entries = by_bucket.entry(item.bucket).or_default();
            entries.extend(std::iter::repeat_n(index, item.repeats.max(1) as usize));
        }
        let mut random = Random::new(self.seed, epoch);
        let mut batches = Vec::new();
        for (bucket, mut entries) in by_bucket {
            random.shuffle(&mut entries);
            batches
                .extend(entries.chunks(self.batch_size).map(|items| Batch { bucket, items: items.to_vec() }));
        }
        random.shuffle(&mut batches);
        if epoch == 0
            && let Some(largest) = largest(&batches)
        {
            batches.swap(0, largest);
        }
        batches
    }

    /// Batches an epoch.
    pub fn batches_per_epoch(&self) -> u64 {
        let mut counts: BTreeMap<Bucket, u64> = BTreeMap::new();
        for item in &self.items {
            *counts.entry(item.bucket).or_default() += u64::from(item.repeats.max(1));
        }
        counts.values().map(|count| count.div_ceil(self.batch_size as u64)).sum()
    }

    /// Batches from `cursor` on, epoch after epoch without end, each with the cursor that follows it.
    /// Ends at once when there is no item.
    pub fn from(&self, cursor: Cursor) -> impl Iterator<Item = (Batch, Cursor)> + '_ {
        let mut epoch = cursor.epoch;
        let mut batches = self.batches(epoch);
        let mut position = usize::try_from(cursor.position).unwrap_or(usize::MAX);
        std::iter::from_fn(move || {
            if position >= batches.len() {
                epoch += 1;
                position = 0;
                batches = self.batches(epoch);
            }
            let batch = batches.get(position)?.clone();
            position += 1;
            let after = if position < batches.len() {
                Cursor { epoch, position: position as u64 }
            } else {
                Cursor { epoch: epoch + 1, position: 0 }
            };
            Some((batch, after))
        })
    }
}

/// The first of the batches with the most pixels.
fn largest(batches: &[Batch]) -> Option<usize> {
    let pixels = |batch: &Batch| batch.bucket.volume() * batch.items.len() as u64;
    (0..batches.len()).rev().max_by_key(|&index| pixels(&batches[index]))
}
