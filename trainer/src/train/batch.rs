//! From cached items to micro-batches: which items a step sees, and what noise they get.

mod length;
mod prior;
mod sample;
mod stack;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use data::{Batch, Cursor, Dataset, ForExpert, Item, LossMasks, Order, SetFacts};
use kernels::loss::Reduction;
use kernels::random::Key;
use models::dit::Dropout;
use models::dit::config::PATCH;
use models::expert::Expert;

use crate::encode::{LatentStore, LeftOut};
use crate::error::Result;
use crate::learning::loss::LossConfig;
use crate::learning::noise::{Place, Streams, TimestepConfig};
use crate::learning::prior::PriorConfig;
use crate::learning::slider::SliderConfig;
use crate::learning::{NoiseRange, mask};
use crate::pipeline::{MicroBatch, Objective};
use crate::plan::Plan;
use crate::recipe::ConditionDropout;
use crate::replicas::Share;
use length::Length;
use sample::{Given, Sample};
use stack::{guides, loss_weights, of_base, stack};

/// What is trained on, in its order.
pub struct Batches<'a> {
    dataset: &'a Dataset,
    encoded: &'a LatentStore,
    /// Windows of the dataset that are trained on; an order's items are indices into this.
    trained: Vec<usize>,
    /// Windows of the held-out loss.
    held_out: Vec<usize>,
    order: Order,
    length: Length,
    streams: Streams,
    /// The networks that are trained, each with the distribution of its noise levels.
    networks: Vec<(NoiseRange, TimestepConfig)>,
    /// Tokens of a frame of each size in pixels, where noise levels depend on them.
    tokens: BTreeMap<(u32, u32), usize>,
    /// Of two experts, the share of the micro-batches that goes to the one for high noise.
    high_share: f64,
    loss: LossConfig,
    /// Masks by which the loss is weighted.
    loss_masks: Option<LossMasks>,
    /// What is trained on the base's own predictions besides.
    prior: PriorConfig,
    /// Directions between prompts, in place of the clips and their captions.
    sliders: Vec<SliderConfig>,
    caption_dropout: f64,
    adapter_dropout: f64,
    /// Share of the samples that are shown their first frame in place of a noisy one.
    picture_share: f64,
    /// Share of the samples of a control model without each of its conditions.
    drop: ConditionDropout,
}

/// The micro-batches of one step with what the log says of them; of a run on several replicas, one's share of them.
pub struct StepData {
    /// What goes into the pipeline; a prior is behind the micro-batch that it is beside.
    pub micro_batches: Vec<MicroBatch>,
    /// The expert that each micro-batch goes to; nothing where the model is whole.
    pub experts: Vec<Option<Expert>>,
    /// All micro-batches of the step, those of other replicas too.
    pub parts: Vec<Part>,
    /// Tokens of the clips of the step, where it ends by them.
    pub tokens: Option<usize>,
    /// Sigma of each sample of the step.
    pub sigmas: Vec<f64>,
    /// Name of the clip of each sample of the step.
    pub items: Vec<String>,
    /// The position from which the next step continues.
    pub cursor: Cursor,
}

/// A micro-batch of a step, wherever it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// The expert that it goes to; nothing where the model is whole.
    pub expert: Option<Expert>,
    /// How many samples it has.
    pub samples: usize,
    /// What it counts for in the mean of its network's step: its samples or their tokens.
    pub counts: usize,
    /// Whether a prior is made beside it, by the same replica.
    pub has_prior: bool,
    /// The replica that makes it.
    pub rank: usize,
}

impl From<Cursor> for StepData {
    /// Of a step that begins at `cursor` and has nothing yet.
    fn from(cursor: Cursor) -> Self {
        let (micro_batches, experts, parts) = (Vec::new(), Vec::new(), Vec::new());
        let (sigmas, items) = (Vec::new(), Vec::new());
        Self { micro_batches, experts, parts, tokens: None, sigmas, items, cursor }
    }
}

impl StepData {
    /// The micro-batches of one network, in their order.
    pub fn of(&self, expert: Option<Expert>) -> Vec<MicroBatch> {
        let all = self.micro_batches.iter().zip(&self.experts);
        all.filter(|(_, own)| **own == expert).map(|(batch, _)| batch.clone()).collect()
    }

    /// The micro-batches of one network on all replicas, in their order.
    pub fn parts_of(&self, expert: Option<Expert>) -> Vec<Part> {
        self.parts.iter().copied().filter(|part| part.expert == expert).collect()
    }
}

/// A sample of the held-out loss.
pub struct HeldOut<'a> {
    /// Name of its clip.
    pub item: &'a str,
    /// Which of the nine sigmas.
    pub level: usize,
    /// Sigma.
    pub sigma: f64,
    /// What goes into the pipeline, a batch of one.
    pub batch: MicroBatch,
}

impl<'a> Batches<'a> {
    /// The items of `dataset`, in the order that the plan's seed gives.
    ///
    /// # Errors
    /// Noise levels that the distribution does not reach.
    pub fn new(plan: &Plan, dataset: &'a Dataset, encoded: &'a LatentStore) -> Result<Self> {
        let cut = |share: NoiseRange| Ok((share, plan.train.timesteps.within(share)?));
        let (trained, held_out) = dataset.split();
        let order = Order::new(dataset.order_items(&trained), plan.run.seed, plan.train.batch);
        Ok(Self {
            dataset,
            encoded,
            trained,
            held_out,
            order,
            length: Length::of(&plan.train, dataset, encoded)?,
            streams: Streams::new(plan.run.seed),
            networks: plan.trained_ranges().into_iter().map(cut).collect::<Result<_>>()?,
            tokens: match plan.train.timesteps.is_by_size() {
                true => tokens_by_size(dataset, encoded)?,
                false => BTreeMap::new(),
            },
            high_share: plan.train.high_share.unwrap_or(0.0),
            loss: plan.train.loss.clone(),
            loss_masks: plan.data.loss_masks.clone(),
            prior: plan.train.prior.clone(),
            sliders: plan.train.sliders.clone(),
            caption_dropout: plan.train.caption_dropout,
            adapter_dropout: plan.adapter.dropout,
            picture_share: plan.train.picture_share.unwrap_or(0.0),
            drop: plan.train.drop.clone(),
        })
    }

    /// The network of the micro-batch `index` of step `step`, which has the samples of `batch`.
    fn network(&self, step: u64, index: usize, batch: &Batch) -> &(NoiseRange, TimestepConfig) {
        let first = &self.networks[0]; // a plan trains something
        // Batches do not mix sets that differ in it.
        let of_set = batch.items.first().and_then(|item| self.set(self.trained[*item]).expert);
        let drawn = || self.streams.expert(step, index as u64, self.high_share);
        let expert = of_set.map_or_else(drawn, |expert| match expert {
            ForExpert::High => Expert::High,
            ForExpert::Low => Expert::Low,
        });
        match &self.networks[..] {
            [_, second] if expert == Expert::Low => second,
            _ => first,
        }
    }

    /// The `accumulate` micro-batches of step `step` (from 0), from `cursor` on. Where two experts are trained, each
    /// micro-batch belongs to one, and counts for its share of that one's samples.
    pub fn step(&self, step: u64, cursor: Cursor, accumulate: usize) -> Result<StepData> {
        self.share_of_step(step, cursor, accumulate, Share::WHOLE)
    }

    /// The micro-batches of [`Self::step`] that are `share`'s, with the noise and the weights that they have there: dealt out in
    /// turn, those of each network one behind the other, so that no replica has two more of them than another.
    pub fn share_of_step(
        &self,
        step: u64,
        cursor: Cursor,
        accumulate: usize,
        share: Share,
    ) -> Result<StepData> {
        let batches = self.batches_from(cursor, accumulate);
        let mut data = StepData::from(cursor);
        data.parts = self.dealt(step, &batches, share);
        data.tokens = self.length.all_tokens(&batches);
        for (index, (batch, after)) in batches.iter().enumerate() {
            let part = data.parts[index];
            let total: usize = data.parts_of(part.expert).iter().map(|part| part.samples).sum();
            let before = data.parts[..index].iter().filter(|other| other.expert == part.expert);
            let before: usize = before.map(|part| part.samples).sum();
            let first_slot = data.sigmas.len() as u64;
            for (i, &item) in batch.items.iter().enumerate() {
                // Of all samples of the network in this step, so that strata go round.
                let place =
                    Place { index: (before + i + (step % total as u64) as usize) % total, count: total };
                let timesteps = &self.network(step, index, batch).1;
                let key = self.streams.sigma(step, first_slot + i as u64);
                data.sigmas.push(self.sigma(self.trained[item], timesteps, key, place)?);
                data.items.push(self.name(self.trained[item]).to_owned());
            }
            if part.rank == share.rank {
                let sigmas = &data.sigmas[first_slot as usize..];
                let counts: usize = data.parts_of(part.expert).iter().map(|part| part.counts).sum();
                let own = self.with_prior(step, (index, first_slot), (batch, sigmas), (part, counts))?;
                data.experts.extend(own.iter().map(|_| part.expert));
                data.micro_batches.extend(own);
            }
            data.cursor = *after;
        }
        Ok(data)
    }

    /// The sigma that `key` draws of `timesteps` for a sample of `window`, which has `place` among those of its network.
    fn sigma(&self, window: usize, timesteps: &TimestepConfig, key: Key, place: Place) -> Result<f64> {
        let bucket = self.dataset.windows[window].bucket;
        match self.tokens.get(&(bucket.width, bucket.height)) {
            Some(&tokens) => timesteps.for_tokens(tokens).sigma_at(key, place),
            None => timesteps.sigma_at(key, place),
        }
    }

    /// Who makes which of `batches`.
    fn dealt(&self, step: u64, batches: &[(Batch, Cursor)], share: Share) -> Vec<Part> {
        let part = |(index, (batch, _)): (usize, &(Batch, Cursor))| Part {
            expert: self.network(step, index, batch).0.expert(),
            samples: batch.items.len(),
            counts: self.length.counts(batch),
            has_prior: self.has_prior(step, index, batch),
            rank: 0,
        };
        let mut parts: Vec<Part> = batches.iter().enumerate().map(part).collect();
        let mut turns = (0..share.world).cycle();
        for (range, _) in &self.networks {
            let own = parts.iter_mut().filter(|part| part.expert == range.expert());
            own.zip(&mut turns).for_each(|(part, rank)| part.rank = rank);
        }
        parts
    }

    /// Micro-batch `index` of step `step`, whose first sample is number `first_slot` of the step, at `sigmas`; those of its network
    /// count for `all` together. Behind it the prior beside it, where `part` says that it has one.
    fn with_prior(
        &self,
        step: u64,
        (index, first_slot): (usize, u64),
        (batch, sigmas): (&Batch, &[f64]),
        (part, all): (Part, usize),
    ) -> Result<Vec<MicroBatch>> {
        let timesteps = &self.network(step, index, batch).1;
        let slots = (first_slot..).zip(sigmas).zip(&batch.items);
        let sample = |((slot, &sigma), &item)| self.sample(self.trained[item], sigma, step, slot);
        let samples: Vec<Sample> = slots.map(sample).collect::<Result<_>>()?;
        // The loss of a micro-batch is a mean over its samples; its share of the step makes that one of the step's.
        let share = part.counts as f64 / all as f64;
        let mut own = vec![self.micro_batch(&samples, (step, first_slot), timesteps, share)?];
        if part.has_prior {
            let samples = self.priors(samples, &batch.items)?;
            own.push(self.micro_batch(&samples, (step, first_slot), timesteps, share)?);
        }
        Ok(own)
    }

    /// `samples`, the first of which is number `first_slot` of step `step`, as a micro-batch that has this share of the step.
    fn micro_batch(
        &self,
        samples: &[Sample],
        (step, first_slot): (u64, u64),
        timesteps: &TimestepConfig,
        share: f64,
    ) -> Result<MicroBatch> {
        let weight = |sample: &Sample| {
            timesteps.weight(sample.sigma) * self.loss.factor_at(sample.sigma) * sample.weight * share
        };
        let mut micro_batch = stack(samples, weight)?;
        let (penalty, scales) =
            (self.loss.penalty(), samples.iter().map(|s| self.loss.scale_at(s.sigma) as f32));
        let scale = if penalty.has_scale() { scales.collect() } else { Vec::new() };
        let (weights, of_base, guides) = (loss_weights(samples)?, of_base(samples)?, guides(samples)?);
        let reduction = self.loss_masks.as_ref().map_or_else(Reduction::default, mask::reduction);
        micro_batch.objective = Objective { penalty, scale, weights, reduction, of_base, guides };
        if self.adapter_dropout > 0.0 {
            let keys =
                (0..samples.len() as u64).map(|i| self.streams.dropout(step, first_slot + i)).collect();
            micro_batch.dropout = Some(Dropout { p: self.adapter_dropout, keys });
        }
        Ok(micro_batch)
    }

    /// The samples of the held-out loss of a network: each item at each of its nine sigmas, with the same noise every time.
    /// Each is made when it is asked for.
    pub fn held_out(&self, range: NoiseRange) -> impl Iterator<Item = Result<HeldOut<'_>>> {
        self.share_of_held_out(range, Share::WHOLE)
    }

    /// The same samples of the first `count` items, held out ones before those that are trained on.
    pub fn at_levels(&self, range: NoiseRange, count: usize) -> impl Iterator<Item = Result<MicroBatch>> {
        let first = self.held_out.len().min(count);
        let trained = &self.trained[..self.trained.len().min(count - first)];
        let held_out = self.levels(range, &self.held_out[..first], Share::WHOLE);
        held_out.chain(self.levels(range, trained, Share::WHOLE)).map(|sample| Ok(sample?.batch))
    }

    /// Those of [`Self::held_out`] that are `share`'s.
    pub fn share_of_held_out(
        &self,
        range: NoiseRange,
        share: Share,
    ) -> impl Iterator<Item = Result<HeldOut<'_>>> {
        self.levels(range, &self.held_out, share)
    }

    fn levels<'b>(
        &'b self,
        range: NoiseRange,
        windows: &'b [usize],
        share: Share,
    ) -> impl Iterator<Item = Result<HeldOut<'b>>> {
        let sigmas = range.eval_sigmas();
        let items = windows.iter().enumerate();
        let all = items.flat_map(move |(item, &window)| {
            sigmas.into_iter().enumerate().map(move |(level, sigma)| (item, window, level, sigma))
        });
        let own = all.enumerate().filter(move |(index, _)| share.has(*index));
        own.map(|(_, (item, window, level, sigma))| {
            let key = self.streams.eval(item as u64, level as u64);
            let sample = self.noised(
                window,
                (sigma, key),
                &self.item(window).caption,
                Given::Nothing,
                LeftOut::default(),
            )?;
            Ok(HeldOut { item: self.name(window), level, sigma, batch: stack(&[sample], |_| 1.0)? })
        })
    }

    /// How many items are held out.
    pub fn held_out_items(&self) -> usize {
        self.held_out.len()
    }

    fn set(&self, window: usize) -> &SetFacts {
        &self.dataset.sets[self.item(window).set]
    }

    fn item(&self, window: usize) -> &Item {
        &self.dataset.sources[self.dataset.windows[window].source].item
    }

    fn name(&self, window: usize) -> &str {
        &self.item(window).id
    }
}

/// Tokens of a frame of each size of the windows of `dataset`, counted as FLUX does: latents of two by two each.
fn tokens_by_size(dataset: &Dataset, encoded: &LatentStore) -> Result<BTreeMap<(u32, u32), usize>> {
    let mut tokens = BTreeMap::new();
    for (index, window) in dataset.windows.iter().enumerate() {
        let size = (window.bucket.width, window.bucket.height);
        if let Entry::Vacant(entry) = tokens.entry(size) {
            let (_, _, height, width) = encoded.latents(index)?.dims4()?;
            entry.insert((height / PATCH) * (width / PATCH));
        }
    }
    Ok(tokens)
}
