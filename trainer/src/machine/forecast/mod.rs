//! The memory that a training step needs, device by device, before anything is loaded.
//!
//! Nothing is estimated by formulas: the step is played on a pretend allocator (`ledger`) by code that mirrors the
//! model's (`block`, `stage`), tensor by tensor in the same order, and the peak is what was alive at once. On a GPU
//! every operation writes a new tensor and memory is freed in the order of the stream, so the order of the host's calls
//! is all there is to it. Tensors below a MiB (rows of modulation, the scales of a chunk) are left out.

mod block;
mod ledger;
mod ops;
mod stage;
mod task;

use std::ops::Range;

use models::dit::BlockPlan;
use serde::Serialize;

pub use task::{Engine, Networks, Task};

use ledger::Name;
use task::Sizes;

/// What the allocator takes on top of what tensors hold, as a share of their peak: up to two chunks for each hole, and the
/// holes between small tensors. On H200s the steps of a 14B on two cards ran under their limits with 0.05 to spare, and with
/// 0.03 before that.
const SLACK: f64 = 0.05;

/// A stage to be forecast.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StagePlan {
    /// Its blocks.
    pub blocks: Range<usize>,
    /// What becomes of each of them.
    pub keep: Vec<BlockPlan>,
    /// The most tokens that go through a feed-forward layer at once.
    pub ffn_tokens: usize,
}

/// How tensors go to a neighbour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// It lies in the same memory.
    Same,
    /// Straight from GPU to GPU.
    Peer,
    /// Through pinned host memory.
    Host,
}

/// A stage's place in the pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neighbours {
    /// Which stage it is.
    pub index: usize,
    /// How many there are.
    pub count: usize,
    /// To the stage before.
    pub previous: Option<Way>,
    /// To the stage behind.
    pub next: Option<Way>,
}

/// What one stage holds at its peak, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StageMemory {
    /// Frozen weights.
    pub weights: u64,
    /// Adapters with two moments, and gradients as far as they are there.
    pub adapters: u64,
    /// What is kept between forward and backward, on its way out or back too.
    pub kept: u64,
    /// What the work of one block needs on top, and what crosses boundaries.
    pub replay: u64,
    /// All of it: the most that tensors hold.
    pub peak: u64,
    /// The same with what the allocator takes on top: what must be there.
    pub needed: u64,
    /// Pinned host memory beside the device.
    pub host: u64,
    /// What blocks park there at once: bytes, and how many of that size.
    #[serde(skip)]
    pub parked: Vec<(u64, usize)>,
    /// What is alive at the peak, the largest first.
    pub alive: Vec<(&'static str, u64)>,
}

/// Forecasts tasks of one kind: one model, one adapter, one micro-batch.
#[derive(Debug, Clone)]
pub struct Forecaster<'a> {
    task: &'a Task<'a>,
    sizes: Sizes,
}

impl<'a> Forecaster<'a> {
    /// Of `task`.
    pub fn new(task: &'a Task<'a>) -> Self {
        Self { task, sizes: task.sizes() }
    }

    /// What the stage `plan` holds at its peak in a training step on `engine`.
    pub fn stage(&self, engine: Engine, plan: &StagePlan, at: Neighbours) -> StageMemory {
        let memories = stage::play(self.task, &self.sizes, engine, plan, at);
        let (peak, at_peak) = (memories.device.peak(), memories.device.at_peak());
        let of = |names: &[Name]| {
            at_peak.iter().filter(|(name, _)| names.contains(name)).map(|(_, bytes)| bytes).sum::<u64>()
        };
        let weights = of(&["weights"]);
        let adapters = of(&["adapters", "gradients"]);
        let kept = of(&["kept", "leaving", "coming back"]);
        let mut alive = at_peak.clone();
        alive.retain(|(_, bytes)| *bytes > 0);
        alive.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        let slack = if engine.is_gpu() { (peak as f64 * SLACK) as u64 } else { 0 };
        StageMemory {
            weights,
            adapters,
            kept,
            replay: peak - weights - adapters - kept,
            peak,
            needed: peak + slack,
            host: memories.host.peak(),
            parked: memories.host.sizes("parked"),
            alive,
        }
    }
}
