//! The memory that a training step needs, and what a run does besides, device by device, before anything is loaded.
//!
//! Nothing is estimated by formulas: the work is played by the model's own code on shadows of tensors ([`Rehearsal`]), whose
//! memory is counted in a ledger, and the peak is what was alive at once. On a GPU every operation writes a new tensor
//! and memory is freed in the order of the stream, so the order of the host's calls is all there is to it.

mod calls;
mod device;
mod memo;
mod rehearsal;
mod task;

use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;

use kernels::arena::GRAIN;
use kernels::ledger::{Allocation, Label, Ledger};
use kernels::transfer::HOST_GRAIN;
use models::adapter::Adapters;
use models::dit::BlockPlan;
use models::weights::Weights;
use serde::Serialize;

use device::{device_ledger, resident, scene};
use memo::Memo;

pub use calls::{Calls, ClipShape};
pub use device::{DeviceMemory, ShadowDevice};
pub use rehearsal::{Rehearsal, Scene};
pub use task::{Decoding, Engine, Networks, Task};

use crate::error::Result;

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

/// What a device holds of a stage between steps, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resident {
    /// All of it: weights, and adapters with what the optimiser keeps of them.
    pub bytes: u64,
    /// Of these the matrices that can wait in host memory; none where that is the same memory.
    pub matrices: u64,
}

/// Forecasts tasks of one kind: one model, one adapter, one micro-batch.
#[derive(Debug)]
pub struct Forecaster<'a> {
    task: &'a Task<'a>,
    /// Adapters that are applied and not trained.
    attached: Option<&'a Adapters>,
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
        Self { task, attached: None, weights, stages: RefCell::default(), memos: RefCell::default() }
    }

    /// The same with `adapters` that are applied and not trained.
    pub fn with_attached(self, adapters: &'a Adapters) -> Self {
        Self { attached: Some(adapters), ..self }
    }

    /// What the stage `plan` holds at its peak in a training step on `engine`.
    ///
    /// # Errors
    /// Sizes that the model's code does not take.
    pub fn stage(&self, engine: Engine, plan: &StagePlan, at: Neighbours) -> Result<StageMemory> {
        self.with_stage(engine, &plan.blocks, at, |staged| staged.played(engine, plan))
    }

    /// What the stage of `blocks` holds at its peak while it takes part in `calls` on `engine`, with at most `ffn_tokens`
    /// tokens in a feed-forward layer.
    ///
    /// # Errors
    /// Sizes that the model's code does not take.
    pub fn calls(
        &self,
        engine: Engine,
        (blocks, ffn_tokens): (&Range<usize>, usize),
        at: Neighbours,
        calls: &Calls,
    ) -> Result<StageMemory> {
        let Task { base, dit, networks, .. } = *self.task;
        // Clips go through the expert that is not trained too, while the trained one is there without its matrices.
        let beside = match (calls, networks) {
            (Calls::Clips(_), Networks::MakesRoom) if engine.is_gpu() => {
                base.bytes(dit, blocks) - base.matrix_bytes(dit, blocks)
            }
            (Calls::Clips(_), Networks::MakesRoom) => base.bytes(dit, blocks),
            _ => 0,
        };
        self.with_stage(engine, blocks, at, |staged| {
            let _beside = staged.device.take_as("weights", beside);
            staged.rehearsal.calls(calls, ffn_tokens)?;
            Ok(staged.memory(engine))
        })
    }

    /// What the stage of `blocks` holds between steps on `engine`.
    ///
    /// # Errors
    /// Sizes that the model's code does not take.
    pub fn resident(&self, engine: Engine, blocks: &Range<usize>, at: Neighbours) -> Result<Resident> {
        let Task { base, dit, networks, .. } = *self.task;
        let matrices = match engine.is_gpu() {
            true => base.matrix_bytes(dit, blocks) * networks.on_devices(),
            false => 0,
        };
        self.with_stage(engine, blocks, at, |staged| {
            Ok(Resident { bytes: resident(&staged.device), matrices })
        })
    }

    /// Does `work` on a stage, which is set up once.
    fn with_stage<T>(
        &self,
        engine: Engine,
        blocks: &Range<usize>,
        at: Neighbours,
        work: impl FnOnce(&mut Staged) -> Result<T>,
    ) -> Result<T> {
        let mut stages = self.stages.borrow_mut();
        let staged = match stages.entry((engine, blocks.clone(), at)) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let mut staged = Staged::new(self.task, &self.weights, engine, blocks.clone(), at)?;
                if let Some(adapters) = self.attached {
                    staged.device.set_label("adapters");
                    staged.rehearsal.attach(adapters)?;
                }
                let memo = self.memos.borrow_mut().entry(engine).or_default().clone();
                staged.rehearsal.remember(&memo);
                new.insert(staged)
            }
        };
        work(staged)
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
        let (device, host) = (device_ledger(engine), Ledger::with_sizes(GRAIN));
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
        Ok(self.memory(engine))
    }

    /// What the devices held at the peak of what was played last.
    fn memory(&self, engine: Engine) -> StageMemory {
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
        StageMemory {
            weights,
            adapters,
            kept,
            replay: peak - weights - adapters - kept,
            peak,
            needed: DeviceMemory::of(engine, peak).needed,
            host: self.host.peak(),
            parked: self.host.sizes("parked"),
            alive,
        }
    }
}

/// `WeightParking`: the matrices of the networks that rest at once, each pinned by itself.
fn resting(task: &Task, host: &Ledger, blocks: &Range<usize>) -> Vec<Allocation> {
    // What the blocks kept in host memory is not given back for the time of the clips.
    let [for_clips, in_turn] = [
        match (task.decoding, task.networks) {
            // The trained network makes room for the other expert before clips are decoded, and comes back in between.
            (Decoding::Beside, Networks::MakesRoom) => 1,
            (Decoding::Beside, _) => 0,
            (Decoding::Alone, networks) => networks.on_devices(),
        },
        u64::from(task.networks == Networks::InTurn),
    ];
    let networks = (0..for_clips + in_turn).flat_map(|_| blocks.clone());
    // A block leaves before the one that it changes places with has given its buffers back.
    let on_their_way = (in_turn > 0 && for_clips == 0).then_some(blocks.start);
    let matrices = networks.chain(on_their_way).flat_map(|n| task.base.matrices(task.dit, n));
    matrices.map(|bytes| host.take_as("resting", bytes.next_multiple_of(HOST_GRAIN))).collect()
}
