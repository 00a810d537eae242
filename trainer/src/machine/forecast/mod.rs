//! The memory that a training step needs, and what a run does besides, device by device, before anything is loaded.
//!
//! Nothing is estimated by formulas: the work is played by the model's own code on shadows of tensors ([`Rehearsal`]), whose
//! memory is counted in a ledger, and the peak is what was alive at once. On a GPU every operation writes a new tensor
//! and memory is freed in the order of the stream, so the order of the host's calls is all there is to it.

mod calls;
mod decoding;
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
use kernels::transfer::HostStore;
use models::adapter::Adapters;
use models::dit::BlockPlan;
use models::weights::Weights;
use serde::Serialize;

use device::{device_ledger, resident, scene};
use memo::Memo;

pub use calls::{Calls, ClipShape, Residuals};
pub use decoding::{continuing, decoding};
pub use device::{DeviceMemory, ShadowDevice};
pub use rehearsal::{Rehearsal, Scene};
pub use task::{Decoding, Engine, LossTask, Masks, Networks, SmallBatches, Task};

use crate::error::{Error, Result};
use crate::pipeline::ParkedStage;

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
    /// It is in the same memory.
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

/// The stages whose blocks a device holds: its own, or several where a network is on groups of devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Blocks of each.
    pub ranges: Vec<Range<usize>>,
    /// Which of them is the device's own.
    pub own: usize,
    /// The place of them together in their pipeline.
    pub at: Neighbours,
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
    /// The second trained network, on the device or parked.
    other: Option<Other>,
    parking: HostStore,
    device: Ledger,
    host: Ledger,
    _pinned: Allocation,
}

/// The stage of a network beside the one that is played.
#[derive(Debug)]
struct Other {
    rehearsal: Rehearsal,
    /// Its matrices, where they wait in host memory.
    parked: Option<ParkedStage>,
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

    /// Bytes of the matrices of `blocks`, of all networks, that stay in host memory.
    pub fn streamed_bytes(&self, blocks: &Range<usize>) -> u64 {
        self.task.networks.count() * self.task.base.streamed_bytes(self.task.dit.as_ref(), blocks)
    }

    /// What the stage `plan` holds at its peak in a training step on `engine`.
    ///
    /// # Errors
    /// Sizes that the model's code does not take.
    pub fn stage(&self, engine: Engine, plan: &StagePlan, at: Neighbours) -> Result<StageMemory> {
        self.with_stage(engine, &plan.blocks, at, |staged| staged.played(engine, plan))
    }

    /// What the device of the stage `at` holds at its peak while it takes part in `calls` on `engine` with the blocks that it has
    /// `held` for them, with at most `ffn_tokens` tokens in a feed-forward layer.
    ///
    /// # Errors
    /// Sizes that the model's code does not take.
    pub fn calls(
        &self,
        engine: Engine,
        (held, ffn_tokens): (&Held, usize),
        at: Neighbours,
        calls: &Calls,
    ) -> Result<StageMemory> {
        let blocks = &held.ranges[held.own]; // one of them
        let own = self.with_stage(engine, blocks, at, |staged| {
            let Staged { rehearsal, device, host, .. } = &mut *staged;
            self.play(engine, (self.task, held), rehearsal, (device, host), |rehearsal| {
                rehearsal.calls(calls, ffn_tokens)
            })?;
            Ok(staged.memory(engine))
        })?;
        if !(matches!(calls, Calls::Clips(_)) && self.task.networks == Networks::MakesRoom) {
            return Ok(own);
        }
        // Clips go through the expert that is not trained too, while the trained one is there without its matrices.
        let expert = Task { targets: &[], ..self.task.clone() };
        let other = self.with_stage(engine, blocks, at, |staged| {
            staged.in_place_of_own(|staged| {
                let scene = scene(engine, at, &staged.device, &staged.host);
                let mut rehearsal = Rehearsal::new(&expert, &self.weights, blocks.clone(), scene)?;
                self.prepare(engine, &mut rehearsal, &staged.device)?;
                let ledgers = (&staged.device, &staged.host);
                self.play(engine, (&expert, held), &mut rehearsal, ledgers, |rehearsal| {
                    rehearsal.calls(calls, ffn_tokens)
                })?;
                Ok(staged.memory(engine))
            })
        })?;
        Ok(if other.peak > own.peak { other } else { own })
    }

    /// Plays `work` on a stage of `task`, joined with the others of `held` where there are some.
    fn play(
        &self,
        engine: Engine,
        (task, held): (&Task, &Held),
        own: &mut Rehearsal,
        (device, host): (&Ledger, &Ledger),
        work: impl FnOnce(&mut Rehearsal) -> Result<()>,
    ) -> Result<()> {
        if held.ranges.len() == 1 {
            return work(own);
        }
        // The others are on devices of their own, which are counted apart.
        let other = |(index, blocks): (usize, &Range<usize>)| {
            let at = Neighbours { index, count: held.ranges.len(), previous: None, next: None };
            let scene = scene(engine, at, &Ledger::new(1), &Ledger::new(1));
            let mut rehearsal = Rehearsal::new(task, &self.weights, blocks.clone(), scene)?;
            self.attached.map(|adapters| rehearsal.attach(adapters)).transpose()?;
            Ok::<_, Error>(rehearsal)
        };
        let mut others = Vec::new();
        for (index, blocks) in held.ranges.iter().enumerate() {
            others.push(if index == held.own { None } else { Some(other((index, blocks))?) });
        }
        let parts: Vec<&Rehearsal> = others.iter().map(|other| other.as_ref().unwrap_or(own)).collect();
        let scene = Scene { own: own.device().clone(), ..scene(engine, held.at, device, host) };
        let mut joined = Rehearsal::joined(task, &self.weights, (&parts, held.own), scene)?;
        joined.remember(self.memos.borrow_mut().entry(engine).or_default());
        drop(others);
        work(&mut joined)
    }

    /// What the stage of `blocks` holds between steps on `engine`.
    ///
    /// # Errors
    /// Sizes that the model's code does not take.
    pub fn resident(&self, engine: Engine, blocks: &Range<usize>, at: Neighbours) -> Result<Resident> {
        self.with_stage(engine, blocks, at, |staged| {
            let bytes = resident(&staged.device);
            let apart = staged.in_place_of_all(|staged| Ok(resident(&staged.device)))?;
            Ok(Resident { bytes, matrices: bytes.saturating_sub(apart) })
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
                self.prepare(engine, &mut staged.rehearsal, &staged.device)?;
                new.insert(staged)
            }
        };
        work(staged)
    }

    /// Puts the adapters that are not trained to a stage on a device that is counted in `device`, and lets its layers be played
    /// by what is known of others.
    fn prepare(&self, engine: Engine, rehearsal: &mut Rehearsal, device: &Ledger) -> Result<()> {
        if let Some(adapters) = self.attached {
            device.set_label("adapters");
            rehearsal.attach(adapters)?;
        }
        let memo = self.memos.borrow_mut().entry(engine).or_default().clone();
        rehearsal.remember(&memo);
        Ok(())
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
        let parking = HostStore::unreserved(&scene.own)?;
        let mut rehearsal = Rehearsal::new(task, weights, blocks.clone(), scene.clone())?;
        let second = || Rehearsal::new(task, weights, blocks.clone(), scene.clone());
        let other = match task.networks {
            Networks::One | Networks::MakesRoom => None,
            Networks::SideBySide => Some(Other { rehearsal: second()?, parked: None }),
            // The first is parked while the second is read, and then takes its turn.
            Networks::InTurn => {
                let parked = rehearsal.rest(&parking)?;
                let mut rehearsal_of_second = second()?;
                let parked = rehearsal.take_turn(&mut rehearsal_of_second, &parking, parked)?;
                Some(Other { rehearsal: rehearsal_of_second, parked: Some(parked) })
            }
        };
        let pinned = host.take_as("parked weights", 0);
        let mut staged = Self { rehearsal, other, parking, device, host, _pinned: pinned };
        if task.decoding == Decoding::Alone {
            staged.in_place_of_all(|_| Ok(()))?;
        } else if task.networks == Networks::MakesRoom {
            staged.in_place_of_own(|_| Ok(()))?;
        }
        // What was pinned stays pinned, or is pinned again while what blocks keep is.
        let most = staged.host.peak() - staged.host.live();
        staged._pinned = staged.host.take_as("parked weights", most);
        Ok(staged)
    }

    /// Does `work` while the matrices of the played network wait in host memory.
    fn in_place_of_own<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let parked = self.rehearsal.rest(&self.parking)?;
        let done = work(self);
        self.rehearsal.wake(parked)?;
        done
    }

    /// Does `work` while the matrices of all networks wait in host memory.
    fn in_place_of_all<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let of_other = match &mut self.other {
            Some(Other { rehearsal, parked: None }) => Some(rehearsal.rest(&self.parking)?),
            _ => None,
        };
        let done = self.in_place_of_own(work);
        if let (Some(other), Some(parked)) = (&mut self.other, of_other) {
            other.rehearsal.wake(parked)?;
        }
        done
    }

    fn played(&mut self, engine: Engine, plan: &StagePlan) -> Result<StageMemory> {
        self.rehearsal.step(&plan.keep, plan.ffn_tokens)?;
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
