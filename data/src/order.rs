//! The order in which items are trained: a function of seed and epoch, so that only a position has to be saved.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::bucket::Bucket;
use crate::random::Random;

/// One training item, as far as the order depends on it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OrderItem {
    /// Items of one batch share it.
    pub bucket: Bucket,
    /// How often the item is trained per epoch, at least once.
    pub repeats: u32,
    /// Items of different pools are not put into one batch.
    pub pool: usize,
    /// Fraction of the batches that are taken from the item's pool, the same for all of its items; without one, each item is
    /// trained as often as it repeats.
    pub share: Option<f64>,
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
#[derive(Debug, Clone, PartialEq)]
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

    /// Batches of one epoch. Each item of a pool without a share occurs as often as it repeats, batches never mix buckets or
    /// pools, and none is dropped; those of pools with a share are mixed in.
    /// The first batch of epoch 0 is one of the largest bucket: if memory does not suffice, that shows at once.
    pub fn batches(&self, epoch: u64) -> Vec<Batch> {
        let mut random = Random::new(self.seed, epoch);
        let mut batches = self.shuffled(&mut random, |item| item.share.is_none());
        let counted = batches.len();
        for (pool, share) in self.claims() {
            let first = taken(counted, share, epoch);
            let count = taken(counted, share, epoch + 1) - first;
            batches.extend(self.of_pool(pool, first).take(count as usize));
        }
        if batches.len() > counted {
            random.shuffle(&mut batches);
        }
        if epoch == 0
            && let Some(largest) = largest(&batches)
        {
            batches.swap(0, largest);
        }
        batches
    }

    /// The batches of the items that `are_in`, in an order of their own.
    fn shuffled(&self, random: &mut Random, are_in: impl Fn(&OrderItem) -> bool) -> Vec<Batch> {
        let mut by_bucket: BTreeMap<(Bucket, usize), Vec<usize>> = BTreeMap::new();
        for (index, item) in self.items.iter().enumerate().filter(|(_, item)| are_in(item)) {
            let entries = by_bucket.entry((item.bucket, item.pool)).or_default();
            entries.extend(std::iter::repeat_n(index, item.repeats.max(1) as usize));
        }
        let mut batches = Vec::new();
        for ((bucket, _), mut entries) in by_bucket {
            random.shuffle(&mut entries);
            batches
                .extend(entries.chunks(self.batch_size).map(|items| Batch { bucket, items: items.to_vec() }));
        }
        random.shuffle(&mut batches);
        batches
    }

    /// The pools with a share, and what each takes for every batch of those without: of all batches its share.
    fn claims(&self) -> BTreeMap<usize, f64> {
        let shares: BTreeMap<usize, f64> =
            self.items.iter().filter_map(|item| Some((item.pool, item.share?))).collect();
        let rest = 1.0 - shares.values().sum::<f64>();
        shares.into_iter().map(|(pool, share)| (pool, share / rest)).collect()
    }

    /// The batches of a pool with a share, round after round without end, from the one of this number on.
    fn of_pool(&self, pool: usize, first: u64) -> impl Iterator<Item = Batch> + '_ {
        // The numbers of a pool are apart from those of the epochs.
        let round = move |number: u64| {
            let mut random = Random::new(self.seed ^ ((pool as u64) << 32), number);
            self.shuffled(&mut random, |item| item.pool == pool)
        };
        let of_round = round(0).len().max(1) as u64;
        (first / of_round..).flat_map(round).skip((first % of_round) as usize)
    }

    /// Batches of the first `epochs` epochs; `None` where they are too many to be counted.
    pub fn batches_of(&self, epochs: u64) -> Option<u64> {
        let mut counts: BTreeMap<(Bucket, usize), u64> = BTreeMap::new();
        for item in self.items.iter().filter(|item| item.share.is_none()) {
            *counts.entry((item.bucket, item.pool)).or_default() += u64::from(item.repeats.max(1));
        }
        let counted: u64 = counts.values().map(|count| count.div_ceil(self.batch_size as u64)).sum();
        let claimed: u64 = self.claims().values().map(|share| taken(counted as usize, *share, epochs)).sum();
        counted.checked_mul(epochs)?.checked_add(claimed)
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

/// Batches that a pool has given in so many epochs, at `claim` for each of the `counted` batches of an epoch.
fn taken(counted: usize, claim: f64, epochs: u64) -> u64 {
    (counted as f64 * claim * epochs as f64).round() as u64
}

/// The first of the batches with the most pixels.
fn largest(batches: &[Batch]) -> Option<usize> {
    let pixels = |batch: &Batch| batch.bucket.volume() * batch.items.len() as u64;
    (0..batches.len()).rev().max_by_key(|&index| pixels(&batches[index]))
}
