//! The memory that a plan needs, device by device, before anything is loaded.

use std::collections::BTreeMap;
use std::fmt;

use models::dit::DitConfig;
use serde::Serialize;

use crate::bytes::Bytes;
use crate::error::Result;
use crate::memory::KeepConfig;
use crate::plan::Planned;

/// Bytes of an f32.
const F32: u64 = 4;

/// What one stage holds at its peak, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StageMemory {
    /// The device.
    pub device: String,
    /// First block and the one behind the last.
    pub blocks: (usize, usize),
    /// Frozen weights.
    pub weights: u64,
    /// Adapters with two moments and a gradient each.
    pub adapters: u64,
    /// What is kept between forward and backward, in the largest bucket.
    pub kept: u64,
    /// What one block's replay and backward need on top, in the largest bucket.
    pub replay: u64,
}

impl StageMemory {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights + self.adapters + self.kept + self.replay
    }
}

/// The forecast of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Forecast {
    /// Tokens of a sample of the largest bucket.
    pub tokens: u64,
    /// Samples of a micro-batch.
    pub batch: u64,
    /// The stages, first to last.
    pub stages: Vec<StageMemory>,
}

/// Forecasts the peak of each stage in the largest bucket.
///
/// # Errors
/// When the model's headers cannot be read.
pub fn forecast(planned: &Planned) -> Result<Forecast> {
    let (plan, dit) = (&planned.plan, &planned.dit);
    let latent = |pixels: u32| pixels as usize / crate::base::LATENT_STRIDE;
    let tokens = planned.dataset.windows.iter().map(|window| {
        let bucket = window.bucket;
        let frames = models::vae::latent_frames(bucket.frames as usize);
        dit.tokens(frames, latent(bucket.height), latent(bucket.width)) as u64
    });
    let (tokens, batch) = (tokens.max().unwrap_or(0), plan.train.batch as u64);
    let mut stages = Vec::new();
    let (mut first, count) = (0, plan.devices.stages.len());
    for (index, (device, blocks)) in plan.devices.stages.iter().zip(&plan.devices.split).enumerate() {
        let range = first..first + blocks;
        // A stage of 1F1B holds as many micro-batches as there are stages from it to the end.
        let in_flight = (count - index).min(plan.train.accumulate) as u64;
        let stream = tokens * dit.dim as u64;
        let per_block = match plan.memory.keep {
            KeepConfig::Auto | KeepConfig::Inputs => batch * stream * F32,
            KeepConfig::Attention => batch * (2 * stream + tokens * dit.heads as u64) * F32,
            KeepConfig::All => batch * saved_of_block(dit, tokens),
        };
        let adapted = planned.targets.iter().filter(|target| {
            models::names::split_block(&target.module).is_some_and(|(n, _)| range.contains(&n))
        });
        let factors: u64 = adapted.map(|t| ((t.out + t.input) * plan.adapter.rank) as u64).sum();
        stages.push(StageMemory {
            device: device.clone(),
            blocks: (range.start, range.end),
            weights: plan.model.precision.dit().bytes(dit, &range),
            adapters: factors * 4 * F32,
            kept: in_flight * *blocks as u64 * per_block,
            replay: batch * replay_of_block(dit, tokens, plan.memory.ffn_tokens as u64),
        });
        first = range.end;
    }
    Ok(Forecast { tokens, batch, stages })
}

/// Bytes that [`models::dit::Keep::All`] keeps of one sample: the input, three projections, two outputs of heads with
/// their products, the queries of the text and its keys and values, the row sums of two softmaxes.
fn saved_of_block(dit: &DitConfig, tokens: u64) -> u64 {
    let (dim, heads, text) = (dit.dim as u64, dit.heads as u64, dit.text_len as u64);
    (9 * tokens * dim + 2 * text * dim + 2 * heads * tokens) * F32
}

/// Bytes of one block's replay and backward of one sample: what is saved, the stream and its gradient before and behind
/// the part that is under way, and the larger of that part's own: a chunk of the feed-forward's inner layer with its
/// gradient and slope, or queries, keys and their gradients with the score blocks of chunked attention.
fn replay_of_block(dit: &DitConfig, tokens: u64, ffn_tokens: u64) -> u64 {
    let stream = tokens * dit.dim as u64 * F32;
    let inner = 6 * tokens.min(ffn_tokens) * dit.ffn_dim as u64 * F32;
    let scores =
        (4 * kernels::attention::MAX_SCORES as u64).min(4 * dit.heads as u64 * tokens * tokens) * F32;
    saved_of_block(dit, tokens) + 4 * stream + inner.max(6 * stream + scores)
}

impl fmt::Display for Forecast {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "memory of a step in the largest bucket ({} tokens x {}):", self.tokens, self.batch)?;
        let mut by_device: BTreeMap<&str, u64> = BTreeMap::new();
        for stage in &self.stages {
            writeln!(
                f,
                "  {:<8} blocks {:>2}..{:<2}  weights {}  adapters {}  kept {}  replay {}",
                stage.device,
                stage.blocks.0,
                stage.blocks.1,
                Bytes(stage.weights),
                Bytes(stage.adapters),
                Bytes(stage.kept),
                Bytes(stage.replay),
            )?;
            *by_device.entry(&stage.device).or_default() += stage.total();
        }
        let totals: Vec<String> =
            by_device.iter().map(|(device, bytes)| format!("{device} {}", Bytes(*bytes))).collect();
        write!(f, "  in all: {}", totals.join(", "))
    }
}
