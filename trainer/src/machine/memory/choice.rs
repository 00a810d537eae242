//! The search for the fastest plan that fits.
//!
//! For a stage: the blocks up to some place are treated one way, those behind it another, and the place is the first
//! that fits, by bisection over forecasts. For the pipeline: the bound on the feed-forward layer, then the split, block
//! by block from even shares. What fits is forecast; what is fast is estimated ([`super::cost`]).

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;

use models::dit::{BlockPlan, Keep, KeepPlace};
use models::weights::Frozen;

use super::cost::Cost;
use super::machine::{Card, Machine, host_shares};
use super::{KeepConfig, MemoryConfig, Offload};
use crate::error::Result;
use crate::machine::forecast::{Forecaster, StageMemory, StagePlan, Task};

/// Bounds on the feed-forward layer that are tried besides all tokens at once.
const FFN_TOKENS: [usize; 4] = [8192, 4096, 2048, LEAST_FFN_TOKENS];
/// The least of them: below it products are too small to be worth their launch.
pub(super) const LEAST_FFN_TOKENS: usize = 1024;

/// What was chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// Blocks of each stage.
    pub split: Vec<usize>,
    /// The most tokens of a sample that go through a feed-forward layer at once.
    pub ffn_tokens: usize,
    /// What becomes of each of the model's blocks.
    pub blocks: Vec<BlockPlan>,
    /// The forecast of each stage.
    pub stages: Vec<StageMemory>,
    /// Bytes that stages are beyond their room, and beyond their share of the host's.
    pub beyond: u64,
    /// Estimated seconds of the slowest stage for one micro-batch.
    pub seconds: f64,
}

impl Choice {
    /// The blocks of each stage, first to last.
    pub fn stage_ranges(&self) -> impl Iterator<Item = Range<usize>> {
        self.split.iter().scan(0, |first, count| {
            let start = *first;
            *first += count;
            Some(start..*first)
        })
    }

    /// [`Self::seconds`] if the frozen matrices were stored as `frozen` says.
    pub fn seconds_as(&self, task: &Task, machine: &Machine, frozen: Frozen) -> f64 {
        let cost = Cost::new(task).with_frozen(frozen);
        let of_stage = |(blocks, card): (Range<usize>, &Card)| -> f64 {
            cost.of_blocks(blocks.start, &self.blocks[blocks], self.ffn_tokens, card)
        };
        self.stage_ranges().zip(&machine.stages).map(of_stage).fold(0.0, f64::max)
    }

    /// Estimated seconds of the slowest stage for one call without a backward, if the frozen matrices were stored as `frozen` says.
    pub fn call_seconds_as(&self, task: &Task, machine: &Machine, frozen: Frozen) -> f64 {
        let cost = Cost::new(task).with_frozen(frozen);
        let of_stage = |(blocks, card): (Range<usize>, &Card)| -> f64 {
            cost.blocks(&blocks) * cost.call_seconds(self.ffn_tokens, card)
        };
        self.stage_ranges().zip(&machine.stages).map(of_stage).fold(0.0, f64::max)
    }

    /// What each stage takes of `task`, which may be another bucket than the one that it was chosen for.
    ///
    /// # Errors
    /// Sizes that the model's code does not take.
    pub fn forecast(&self, task: &Task, machine: &Machine) -> Result<Vec<StageMemory>> {
        let (forecaster, mut first) = (Forecaster::new(task), 0);
        let stage = |(index, count): (usize, &usize)| {
            let blocks = first..first + count;
            first = blocks.end;
            let plan =
                StagePlan { keep: self.blocks[blocks.clone()].to_vec(), blocks, ffn_tokens: self.ffn_tokens };
            forecaster.stage(machine.stages[index].engine, &plan, machine.place_of(index))
        };
        self.split.iter().enumerate().map(stage).collect()
    }
}

/// What was chosen for one stage.
#[derive(Debug, Clone)]
struct StageChoice {
    blocks: Vec<BlockPlan>,
    memory: StageMemory,
    /// Bytes beyond the room of the device, and of its share of the host's.
    beyond: (u64, u64),
    seconds: f64,
}

impl StageChoice {
    fn all_beyond(&self) -> u64 {
        self.beyond.0 + self.beyond.1
    }
}

type Key = (usize, Range<usize>, usize);

struct Search<'a> {
    forecaster: Forecaster<'a>,
    cost: Cost,
    machine: &'a Machine,
    options: Vec<BlockPlan>,
    under_way: usize,
    layers: usize,
    known: RefCell<HashMap<Key, StageChoice>>,
}

/// The fastest plan that fits `machine`, within what `asked` leaves open; where none fits, the one that comes nearest.
///
/// `split` is given blocks of each stage, or nothing.
///
/// # Errors
/// Sizes that the model's code does not take.
pub fn choose(
    task: &Task,
    machine: &Machine,
    asked: &MemoryConfig,
    split: Option<&[usize]>,
) -> Result<Choice> {
    let search = Search {
        forecaster: Forecaster::new(task),
        cost: Cost::new(task),
        machine,
        options: options(asked, machine),
        under_way: task.under_way(),
        layers: task.config().layers,
        known: RefCell::default(),
    };
    let tokens = task.tokens();
    let bounds: Vec<usize> = match asked.ffn_tokens {
        Some(given) => vec![given],
        None => {
            std::iter::once(tokens).chain(FFN_TOKENS.into_iter().filter(|bound| *bound < tokens)).collect()
        }
    };
    let even = even(task.config().layers, &machine.stages.iter().map(|card| card.flops).collect::<Vec<_>>());
    let of = |split: &[usize]| {
        let mut best = search.pipeline(split, bounds[0])?; // there is always a bound
        for &bound in &bounds[1..] {
            let other = search.pipeline(split, bound)?;
            if is_better(&other, &best) {
                best = other;
            }
        }
        Ok(best)
    };
    match split {
        Some(given) => of(given),
        None => search.climb(of(&even)?, of),
    }
}

/// Whether `a` is the better plan: first it must fit.
fn is_better(a: &Choice, b: &Choice) -> bool {
    (a.beyond, a.seconds) < (b.beyond, b.seconds)
}

/// Shares of `layers` blocks by speed, as even as can be, none empty.
fn even(layers: usize, speeds: &[f64]) -> Vec<usize> {
    let whole: f64 = speeds.iter().sum();
    let mut before = 0.0;
    let mut ends: Vec<usize> = Vec::new();
    for (i, speed) in speeds.iter().enumerate() {
        before += speed;
        // A hair above, so that exact shares do not round down; and a block each for this stage and those behind it.
        let end = (layers as f64 * before / whole + 1e-9) as usize;
        let least = ends.last().copied().unwrap_or(0) + 1;
        ends.push(end.min(layers.saturating_sub(speeds.len() - 1 - i)).max(least));
    }
    let starts = std::iter::once(0).chain(ends.iter().copied());
    starts.zip(&ends).map(|(start, end)| end - start).collect()
}

/// What may become of a block, the fastest first.
fn options(asked: &MemoryConfig, machine: &Machine) -> Vec<BlockPlan> {
    let keeps: &[Keep] = match asked.keep {
        KeepConfig::Auto => &[Keep::All, Keep::Attention, Keep::Input],
        KeepConfig::Inputs => &[Keep::Input],
        KeepConfig::Attention => &[Keep::Attention],
        KeepConfig::All => &[Keep::All],
    };
    let is_apart = machine.stages.iter().any(|card| card.engine.is_gpu());
    let places: &[KeepPlace] = match asked.offload {
        // On the CPU both are the same memory.
        Offload::Auto if is_apart => &[KeepPlace::Device, KeepPlace::Host],
        Offload::Auto | Offload::Never => &[KeepPlace::Device],
        Offload::Always => &[KeepPlace::Host],
    };
    let every = places.iter().flat_map(|&place| keeps.iter().map(move |&keep| BlockPlan { keep, place }));
    // What the device has to wait for is worth it only where nothing else fits, and then for as little as can be.
    let leanest = keeps.last().filter(|_| places.contains(&KeepPlace::Host));
    let last = leanest.map(|&keep| BlockPlan { keep, place: KeepPlace::HostUntilUsed });
    every.chain(last).collect()
}

/// Whether a block treated as `a` takes no more of the device and gives no more speed than as `b`.
fn is_leaner(a: BlockPlan, b: BlockPlan) -> bool {
    let depth = |plan: BlockPlan| match plan.keep {
        Keep::Input => 0,
        Keep::Attention => 1,
        Keep::All => 2,
    };
    let distance = |plan: BlockPlan| match plan.place {
        KeepPlace::Device => 0,
        KeepPlace::Host => 1,
        KeepPlace::HostUntilUsed => 2,
    };
    a != b && depth(a) <= depth(b) && distance(a) >= distance(b)
}

impl Search<'_> {
    /// The best plan of each stage of `split` under one bound on the feed-forward layer.
    fn pipeline(&self, split: &[usize], ffn_tokens: usize) -> Result<Choice> {
        let mut first = 0;
        let (mut blocks, mut stages) = (Vec::new(), Vec::new());
        let (mut beyond, mut seconds) = (0, 0.0_f64);
        for (index, count) in split.iter().enumerate() {
            let stage = self.stage(index, first..first + count, ffn_tokens)?;
            first += count;
            beyond += stage.all_beyond();
            seconds = seconds.max(stage.seconds);
            blocks.extend(stage.blocks);
            stages.push(stage.memory);
        }
        Ok(Choice { split: split.to_vec(), ffn_tokens, blocks, stages, beyond, seconds })
    }

    /// Moves one block at a time from stage to stage, as long as that helps.
    fn climb(&self, start: Choice, of: impl Fn(&[usize]) -> Result<Choice>) -> Result<Choice> {
        let mut best = start;
        let count = best.split.len();
        loop {
            let pairs = (0..count).flat_map(|from| (0..count).map(move |to| (from, to)));
            let moved = pairs.filter(|(from, to)| from != to && best.split[*from] > 1).map(|(from, to)| {
                let mut split = best.split.clone();
                split[from] -= 1;
                split[to] += 1;
                split
            });
            let could_help = |split: &Vec<usize>| best.beyond > 0 || self.ideal(split) < best.seconds;
            let tried: Vec<Vec<usize>> = moved.filter(could_help).collect();
            let mut next = None;
            for split in &tried {
                let other = of(split)?;
                if next.as_ref().is_none_or(|next| is_better(&other, next)) {
                    next = Some(other);
                }
            }
            match next {
                Some(next) if is_better(&next, &best) => best = next,
                _ => return Ok(best),
            }
        }
    }

    /// Seconds of the slowest stage of `split` if memory were no matter.
    fn ideal(&self, split: &[usize]) -> f64 {
        let whole = BlockPlan { keep: Keep::All, place: KeepPlace::Device };
        let mut first = 0;
        let of_stage = |(card, count): (&Card, &usize)| {
            let range = first..first + count;
            first = range.end;
            self.cost.blocks(&range) * self.cost.seconds(whole, usize::MAX, card)
        };
        self.machine.stages.iter().zip(split).map(of_stage).fold(0.0, f64::max)
    }

    /// The fastest plan of one stage that fits, or the leanest.
    fn stage(&self, index: usize, range: Range<usize>, ffn_tokens: usize) -> Result<StageChoice> {
        let key = (index, range.clone(), ffn_tokens);
        if let Some(known) = self.known.borrow().get(&key) {
            return Ok(known.clone());
        }
        let seconds = |plan| self.cost.seconds(plan, ffn_tokens, &self.machine.stages[index]);
        let mut pairs: Vec<(BlockPlan, BlockPlan)> = Vec::new();
        for &tail in &self.options {
            pairs.push((tail, tail));
            pairs
                .extend(self.options.iter().filter(|&&head| is_leaner(head, tail)).map(|&head| (head, tail)));
        }
        // The fastest tails first: what cannot be faster than the best so far need not be tried.
        pairs.sort_by(|a, b| seconds(a.1).total_cmp(&seconds(b.1)));
        let leanest = self.options.last().copied().unwrap_or_default();
        let mut best = self.tried(index, &range, ffn_tokens, vec![leanest; range.len()])?;
        // What does not fit at its leanest does not fit.
        let pairs = if best.beyond.0 > 0 { Vec::new() } else { pairs };
        for (head, tail) in pairs {
            let bound = seconds(tail) * self.cost.blocks(&range);
            if best.all_beyond() == 0 && best.seconds <= bound {
                break;
            }
            let found = self.first_that_fits(index, &range, ffn_tokens, (head, tail))?;
            if (found.all_beyond(), found.seconds) < (best.all_beyond(), best.seconds) {
                best = found;
            }
        }
        self.known.borrow_mut().insert(key, best.clone());
        Ok(best)
    }

    /// The plan with as few blocks as will do, from the first on, treated as `head`, the others as `tail`.
    fn first_that_fits(
        &self,
        index: usize,
        range: &Range<usize>,
        ffn_tokens: usize,
        (head, tail): (BlockPlan, BlockPlan),
    ) -> Result<StageChoice> {
        let count = range.len();
        let with = |heads: usize| {
            let blocks = (0..count).map(|i| if i < heads { head } else { tail }).collect();
            self.tried(index, range, ffn_tokens, blocks)
        };
        let (mut low, mut high) = (0, if head == tail { 0 } else { count });
        let mut best = with(high)?;
        if best.beyond.0 > 0 {
            return Ok(best);
        }
        while low < high {
            let middle = (low + high) / 2;
            let tried = with(middle)?;
            if tried.beyond.0 == 0 {
                (high, best) = (middle, tried);
            } else {
                low = middle + 1;
            }
        }
        Ok(best)
    }

    fn tried(
        &self,
        index: usize,
        range: &Range<usize>,
        ffn_tokens: usize,
        blocks: Vec<BlockPlan>,
    ) -> Result<StageChoice> {
        let card = &self.machine.stages[index];
        let plan = StagePlan { blocks: range.clone(), keep: blocks, ffn_tokens };
        let memory = self.forecaster.stage(card.engine, &plan, self.machine.place_of(index))?;
        let beyond_room = card.room.bytes().map_or(0, |room| memory.needed.saturating_sub(room));
        let beyond = (beyond_room, memory.host.saturating_sub(self.host_share(index, range)));
        let seconds = self.cost.of_blocks(range.start, &plan.keep, ffn_tokens, card);
        Ok(StageChoice { blocks: plan.keep, memory, beyond, seconds })
    }

    /// What the stage of the blocks `range` may pin: its weights that are streamed, and a share of what those of all leave.
    fn host_share(&self, index: usize, range: &Range<usize>) -> u64 {
        let [own, all] = [range, &(0..self.layers)].map(|range| self.forecaster.streamed_bytes(range));
        let rest = self.machine.host.saturating_sub(all);
        own + host_shares(rest, self.machine.stages.len(), self.under_way)[index]
    }
}
