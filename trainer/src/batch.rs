//! From cached items to micro-batches: which items a step sees, and what noise they get.

use candle_core::{DType, Device, Tensor};
use data::{Batch, Cursor, Dataset, Order};
use models::dit::Dropout;

use crate::encode::Encoded;
use crate::error::Result;
use crate::noise::{EVAL_SIGMAS, Streams, TimestepConfig};
use crate::pipeline::{MicroBatch, NetworkInput};
use crate::plan::Plan;

/// What is trained on, in its order.
pub struct Batches<'a> {
    dataset: &'a Dataset,
    encoded: &'a Encoded,
    /// Windows of the dataset that are trained on; an order's items are indices into this.
    trained: Vec<usize>,
    /// Windows of the held-out loss.
    held_out: Vec<usize>,
    order: Order,
    streams: Streams,
    timesteps: TimestepConfig,
    caption_dropout: f64,
    adapter_dropout: f64,
}

/// The micro-batches of one step with what the log says of them.
pub struct StepData {
    /// What goes into the pipeline.
    pub micro_batches: Vec<MicroBatch>,
    /// Sigma of each sample.
    pub sigmas: Vec<f64>,
    /// Name of each sample's clip.
    pub items: Vec<String>,
    /// Where the next step goes on.
    pub cursor: Cursor,
}

/// A sample before it is stacked with the others of its batch.
struct Sample {
    noisy: Tensor,
    target: Tensor,
    text: Tensor,
    sigma: f64,
}

impl<'a> Batches<'a> {
    /// The items of `dataset`, in the order that the plan's seed gives.
    pub fn new(plan: &Plan, dataset: &'a Dataset, encoded: &'a Encoded) -> Self {
        let (trained, held_out) = dataset.split();
        let order = Order::new(dataset.order_items(&trained), plan.run.seed, plan.train.batch);
        Self {
            dataset,
            encoded,
            trained,
            held_out,
            order,
            streams: Streams::new(plan.run.seed),
            timesteps: plan.train.timesteps.clone(),
            caption_dropout: plan.train.caption_dropout,
            adapter_dropout: plan.adapter.dropout,
        }
    }

    /// The `accumulate` micro-batches of step `step` (from 0), from `cursor` on.
    pub fn step(&self, step: u64, cursor: Cursor, accumulate: usize) -> Result<StepData> {
        let batches: Vec<(Batch, Cursor)> = self.order.from(cursor).take(accumulate).collect();
        let total: usize = batches.iter().map(|(batch, _)| batch.items.len()).sum();
        let mut data = StepData { micro_batches: Vec::new(), sigmas: Vec::new(), items: Vec::new(), cursor };
        for (batch, after) in batches {
            let mut samples = Vec::new();
            for &item in &batch.items {
                let slot = (data.sigmas.len()) as u64;
                let window = self.trained[item];
                let sample = self.sample(window, step, slot)?;
                data.sigmas.push(sample.sigma);
                data.items.push(self.name(window).to_owned());
                samples.push(sample);
            }
            let first_slot = (data.sigmas.len() - samples.len()) as u64;
            // The loss of a micro-batch is a mean over its samples; its share of the step makes that one of the step's.
            let share = samples.len() as f64 / total as f64;
            let mut micro_batch = stack(&samples, |sigma| self.timesteps.weight(sigma) * share)?;
            if self.adapter_dropout > 0.0 {
                let keys =
                    (0..samples.len() as u64).map(|i| self.streams.dropout(step, first_slot + i)).collect();
                micro_batch.dropout = Some(Dropout { p: self.adapter_dropout, keys });
            }
            data.micro_batches.push(micro_batch);
            data.cursor = after;
        }
        Ok(data)
    }

    /// The samples of the held-out loss: each item at each of the nine sigmas, with the same noise every time.
    pub fn held_out(&self) -> Result<Vec<(f64, MicroBatch)>> {
        let mut batches = Vec::new();
        for (item, &window) in self.held_out.iter().enumerate() {
            for (i, sigma) in EVAL_SIGMAS.into_iter().enumerate() {
                let key = self.streams.eval(item as u64, i as u64);
                let sample = self.noised(window, sigma, key, self.caption(window))?;
                batches.push((sigma, stack(&[sample], |_| 1.0)?));
            }
        }
        Ok(batches)
    }

    /// Whether anything is held out.
    pub fn has_held_out(&self) -> bool {
        !self.held_out.is_empty()
    }

    fn sample(&self, window: usize, step: u64, slot: u64) -> Result<Sample> {
        let sigma = self.timesteps.sigma(self.streams.sigma(step, slot))?;
        let is_dropped = self.streams.caption(step, slot).uniform(0) < self.caption_dropout;
        let caption = if is_dropped { "" } else { self.caption(window) };
        self.noised(window, sigma, self.streams.noise(step, slot), caption)
    }

    /// x = (1 - sigma) x0 + sigma noise, and the velocity noise - x0 that leads there.
    fn noised(
        &self,
        window: usize,
        sigma: f64,
        noise: kernels::random::Key,
        caption: &str,
    ) -> Result<Sample> {
        let x0 = self.encoded.latents(window)?;
        let noise = Tensor::from_vec(noise.normals(x0.elem_count()), x0.shape(), &Device::Cpu)?;
        let noisy = ((&x0 * (1.0 - sigma))? + (&noise * sigma)?)?;
        Ok(Sample { noisy, target: (noise - x0)?, text: self.encoded.text(caption)?, sigma })
    }

    fn caption(&self, window: usize) -> &str {
        &self.dataset.sources[self.dataset.windows[window].source].item.caption
    }

    fn name(&self, window: usize) -> &str {
        &self.dataset.sources[self.dataset.windows[window].source].item.id
    }
}

/// Samples of one size as a micro-batch; `weight` says what a sample at a sigma counts for.
fn stack(samples: &[Sample], weight: impl Fn(f64) -> f64) -> Result<MicroBatch> {
    let of = |part: fn(&Sample) -> &Tensor| samples.iter().map(part).collect::<Vec<_>>();
    let timesteps: Vec<f32> = samples.iter().map(|sample| (sample.sigma * 1000.0) as f32).collect();
    let input = NetworkInput {
        x_bcthw: Tensor::stack(&of(|s| &s.noisy), 0)?,
        timestep: Tensor::new(timesteps.as_slice(), &Device::Cpu)?,
        text_bsd: pad_text(&of(|s| &s.text))?,
        picture_bsd: None,
    };
    Ok(MicroBatch {
        input,
        target: Tensor::stack(&of(|s| &s.target), 0)?,
        weights: samples.iter().map(|sample| weight(sample.sigma) as f32).collect(),
        mask: None,
        dropout: None,
    })
}

/// Text states [s, width] of different lengths as one [b, s, width] with zero rows behind the shorter ones.
pub fn pad_text(texts: &[&Tensor]) -> Result<Tensor> {
    let longest = texts.iter().map(|text| text.dim(0)).collect::<candle_core::Result<Vec<_>>>()?;
    let longest = longest.into_iter().max().unwrap_or(0);
    let mut padded = Vec::new();
    for text in texts {
        let (rows, width) = text.dims2()?;
        let missing = Tensor::zeros((longest - rows, width), DType::F32, text.device())?;
        padded.push(if rows == longest { (*text).clone() } else { Tensor::cat(&[*text, &missing], 0)? });
    }
    Ok(Tensor::stack(&padded, 0)?)
}
