//! The memory that a training step needs, device by device, before anything is loaded.
//!
//! Nothing is estimated by formulas: the step is played by the model's own code on shadows of tensors ([`Rehearsal`]), whose
//! memory is counted in a ledger, and the peak is what was alive at once. On a GPU every operation writes a new tensor
//! and memory is freed in the order of the stream, so the order of the host's calls is all there is to it.

mod memo;
mod rehearsal;
mod task;

use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;

use kernels::arena::GRAIN;
use kernels::ledger::{Allocation, Label, Ledger};
use kernels::transfer::{HOST_GRAIN, Route};
use kernels::{Device, ShadowAttention, ShadowGpu};
use models::dit::BlockPlan;
use models::weights::Weights;
use serde::Serialize;

use memo::Memo;
pub use rehearsal::{Rehearsal, Scene};
pub use task::{Decoding, Engine, Networks, Task};

use crate::error::Result;

/// What the allocator takes on top of what tensors hold, as a share of their peak: up to two chunks for each hole, and the
/// holes between small tensors. On H200s the steps of a 14B on two cards ran under their limits with 0.05 to spare, and with
/// 0.03 before that.
const SLACK: f64 = 0.05;
/// The driver hands out multiples of this.
const DEVICE_GRAIN: u64 = 512;
/// Bytes of an f32.
const F32: u64 = 4;

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Way {
    /// It lies in the same memory.
    Same,
    /// Straight from GPU to GPU.
    Peer,
    /// Through pinned host memory.
    Host,
}

/// A stage's place in the pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
#[derive(Debug)]
pub struct Forecaster<'a> {
    task: &'a Task<'a>,
    weights: Weights,
    /// Stages that were set up, by engine, blocks and neighbours: what differs is played on them again.
    stages: RefCell<HashMap<StageKey, Staged>>,
    /// What is known of layers.
    memos: RefCell<HashMap<Engine, Memo>>,
}

type StageKey = (Engine, Range<usize>, Neighbours);

/// A stage with all that its device holds besides.
#[derive(Debug)]
struct Staged {
    rehearsal: Rehearsal,
    device: Ledger,
    host: Ledger,
    _held: Vec<Allocation>,
}

impl<'a> Forecaster<'a> {
    /// Of `task`.
    pub fn new(task: &'a Task<'a>) -> Self {
        // Numbers are never made of it.
        let weights = Weights::seeded(task.dit.tensors(), 0);
        Self { task, weights, stages: RefCell::default(), memos: RefCell::default() }
    }

    /// What the stage `plan` holds at its peak in a training step on `engine`.
    ///
    /// # Errors
    /// Sizes that the model's code does not take.
    pub fn stage(&self, engine: Engine, plan: &StagePlan, at: Neighbours) -> Result<StageMemory> {
        let mut stages = self.stages.borrow_mut();
        let key = (engine, plan.blocks.clone(), at);
        let staged = match stages.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let mut staged = Staged::new(self.task, &self.weights, engine, plan.blocks.clone(), at)?;
                let memo = self.memos.borrow_mut().entry(engine).or_default().clone();
                staged.rehearsal.remember(&memo);
                new.insert(staged)
            }
        };
        staged.played(engine, plan)
    }
}

impl Staged {
    fn new(
        task: &Task,
        weights: &Weights,
        engine: Engine,
        blocks: Range<usize>,
        at: Neighbours,
    ) -> Result<Self> {
        let grain = if engine.is_gpu() { DEVICE_GRAIN } else { 1 };
        let (device, host) = (Ledger::new(grain), Ledger::with_sizes(GRAIN));
        let scene = scene(engine, at, &device, &host);
        let rehearsal = Rehearsal::new(task, weights, blocks.clone(), scene)?;
        let (networks, trained) = (task.networks, rehearsal.trained());
        let all = task.base.bytes(task.dit, &blocks);
        // One that rests leaves its embeddings, norms and head; all optimisers stay.
        let beside = match networks {
            Networks::One | Networks::MakesRoom => 0,
            Networks::InTurn if engine.is_gpu() => all - task.base.matrix_bytes(task.dit, &blocks),
            Networks::InTurn | Networks::SideBySide => all,
        };
        // The adapters of the stage itself are there already.
        let states = task.rule.bytes(trained) * networks.count() - F32 * trained;
        let mut held = vec![device.take_as("weights", beside), device.take_as("adapters", states)];
        if engine.is_gpu() {
            held.extend(resting(task, &host, &blocks));
        }
        Ok(Self { rehearsal, device, host, _held: held })
    }

    fn played(&mut self, engine: Engine, plan: &StagePlan) -> Result<StageMemory> {
        let outcome = self.rehearsal.step(&plan.keep, plan.ffn_tokens)?;
        // The new parameters stand beside the old ones until they are handed to the stages.
        drop(self.device.take_as("adapters", F32 * self.rehearsal.trained()));
        drop(outcome);
        let (peak, at_peak) = (self.device.peak(), self.device.at_peak());
        let of = |names: &[Label]| {
            at_peak.iter().filter(|(name, _)| names.contains(name)).map(|(_, bytes)| bytes).sum::<u64>()
        };
        let weights = of(&["weights"]);
        let adapters = of(&["adapters", "gradients"]);
        let kept = of(&["kept", "leaving", "coming back"]);
        let mut alive = at_peak.clone();
        alive.retain(|(_, bytes)| *bytes > 0);
        alive.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        let slack = if engine.is_gpu() { (peak as f64 * SLACK) as u64 } else { 0 };
        Ok(StageMemory {
            weights,
            adapters,
            kept,
            replay: peak - weights - adapters - kept,
            peak,
            needed: peak + slack,
            host: self.host.peak(),
            parked: self.host.sizes("parked"),
            alive,
        })
    }
}

/// The devices of a stage on `engine` with its neighbours, all shadows; its own is counted in `device`, and pinned host memory
/// beside it in `host`.
fn scene(engine: Engine, at: Neighbours, device: &Ledger, host: &Ledger) -> Scene {
    let shadow = |index: usize, device: Ledger, host: Ledger| {
        let attention = match engine {
            Engine::Cpu => return Device::shadow_cpu(Some(device)),
            Engine::Chunked => ShadowAttention::Chunked,
            Engine::Cudnn(repeatability) => ShadowAttention::Cudnn(repeatability),
        };
        Device::shadow_gpu(ShadowGpu { index, attention }, device, host)
    };
    // A neighbour in the same memory is counted apart, as each stage is.
    let beside = |way: Way, index: usize| {
        let index = if way == Way::Same { at.index } else { index };
        let route = if way == Way::Host { Route::Host } else { Route::Auto };
        (shadow(index, Ledger::new(1), Ledger::new(1)), route)
    };
    Scene {
        index: at.index,
        count: at.count,
        own: shadow(at.index, device.clone(), host.clone()),
        previous: at.previous.map(|way| beside(way, at.index.saturating_sub(1))),
        next: at.next.map(|way| beside(way, at.index + 1)),
        host: Device::shadow_cpu(None),
    }
}

/// `WeightParking`: the matrices of the network that rests, each pinned by itself.
fn resting(task: &Task, host: &Ledger, blocks: &Range<usize>) -> Vec<Allocation> {
    // A block leaves before the one that it changes places with has given its buffers back.
    let on_their_way = match task.networks {
        Networks::One | Networks::SideBySide => return Vec::new(),
        // What the blocks kept in host memory is not given back for the time of the clips.
        Networks::MakesRoom => None,
        Networks::InTurn => Some(blocks.start),
    };
    let matrices = blocks.clone().chain(on_their_way).flat_map(|n| task.base.matrices(task.dit, n));
    matrices.map(|bytes| host.take_as("resting", bytes.next_multiple_of(HOST_GRAIN))).collect()
}
