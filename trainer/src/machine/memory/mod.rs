//! What a training step keeps between forward and backward, and where.

mod cards;
mod choice;
mod cost;
mod host;
mod machine;
mod phases;
mod refusal;
mod report;

use std::fmt;
use std::num::NonZeroUsize;

use clap::ValueEnum;
use models::dit::{Base, BlockPlan, Keep, KeepPlace, Streamed};
use serde::{Deserialize, Serialize};

pub use cards::{Cards, HOST};
use choice::LEAST_FFN_TOKENS;
pub use choice::{Choice, choose};
pub use host::More;
use host::Tried;
pub use machine::{Card, Machine, Room, available_memory, host_shares};
pub use phases::{Phase, PhaseForecast, PhaseMemory, devices_of};
use refusal::Given;
pub use refusal::Shape;
pub use report::{Forecast, StageForecast};

use crate::bytes::Bytes;
use crate::error::{Error, Result};
use crate::machine::forecast::{Decoding, Networks, Task};

/// The memory of a training step. None of it changes a result by more than the order of sums.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// What each block keeps of its forward for its backward. Default `auto`.
    pub keep: KeepConfig,
    /// Whether what is kept waits in host memory. Default `auto`.
    pub offload: Offload,
    /// The most host memory that may be pinned for it, all devices together, such as `"48GiB"`. Default: as much as pays,
    /// where each GiB has to save 0.3 % of a step, and half of what is available when the plan is made at most.
    pub host_memory: Option<Bytes>,
    /// The most tokens of a clip that go through a feed-forward layer at once. Default: as the plan finds best.
    pub ffn_tokens: Option<usize>,
    /// Where the matrices of the frozen model are. Default `auto`.
    pub weights: WeightPlace,
}

/// Where the matrices of the frozen model are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum WeightPlace {
    /// On the devices where they fit; else those of as many blocks as have to be in pinned host memory.
    #[default]
    Auto,
    /// On the devices.
    Device,
    /// Those of all blocks in pinned host memory, from where each is copied one block ahead of its use.
    Host,
}

impl WeightPlace {
    /// What may be streamed on `machine`, the least first.
    pub fn streamed(self, machine: &Machine) -> &'static [Streamed] {
        let is_apart = machine.stages.iter().any(|card| card.engine.is_gpu());
        match self {
            // On the CPU both are the same memory.
            Self::Auto if is_apart => &Streamed::STEPS,
            Self::Auto | Self::Device => &[Streamed::NONE],
            Self::Host => &[Streamed::ALL],
        }
    }

    fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

fn is_one(networks: &Networks) -> bool {
    *networks == Networks::One
}

fn one_group() -> NonZeroUsize {
    NonZeroUsize::MIN
}

fn is_one_group(groups: &NonZeroUsize) -> bool {
    groups.get() == 1
}

/// Clips are decoded on one device.
fn one() -> usize {
    1
}

fn is_single(bands: &usize) -> bool {
    *bands == 1
}

fn is_beside(decoding: &Decoding) -> bool {
    *decoding == Decoding::Beside
}

/// What was settled for a step.
#[derive(Debug, Clone)]
pub struct Settled {
    /// What was chosen.
    pub choice: Choice,
    /// What it takes.
    pub forecast: Forecast,
    /// Where the trained networks are.
    pub networks: Networks,
    /// Where they are while clips are decoded.
    pub decoding: Decoding,
    /// Groups of devices that clips go through.
    pub clip_groups: NonZeroUsize,
    /// Devices of such a group that share the tokens of a call.
    pub clip_sharing: NonZeroUsize,
    /// The blocks whose matrices are in host memory.
    pub streamed: Streamed,
    /// The most host memory that may be pinned, in bytes.
    pub pinned: u64,
}

impl Settled {
    fn new(task: &Task, choice: Choice, forecast: Forecast) -> Self {
        let pinned = choice.stages.iter().map(|stage| stage.host).sum::<u64>();
        let pinned = pinned.next_multiple_of(PINNED_GRAIN);
        let (networks, decoding, clip_groups) = (task.networks, task.decoding, NonZeroUsize::MIN);
        let streamed = task.base.streamed;
        let clip_sharing = NonZeroUsize::MIN;
        Self { choice, forecast, networks, decoding, clip_groups, clip_sharing, streamed, pinned }
    }

    /// With the share of the run's time that clips take.
    pub fn with_clip_share(self, share: f64) -> Self {
        Self { forecast: Forecast { clip_share: Some(share), ..self.forecast }, ..self }
    }

    /// `task` as it was settled.
    pub fn task<'a>(&self, task: &Task<'a>) -> Task<'a> {
        let base = Base { streamed: self.streamed, ..task.base };
        Task { networks: self.networks, decoding: self.decoding, base, ..task.clone() }
    }

    /// With the groups of devices that clips go through, the devices of each that share tokens, and why these.
    pub fn with_clips(self, clip_groups: NonZeroUsize, clip_sharing: NonZeroUsize, layout: String) -> Self {
        let forecast = Forecast { clips: Some(layout), ..self.forecast };
        Self { clip_groups, clip_sharing, forecast, ..self }
    }
}

/// What may be pinned is as much as the plan pins, in multiples of this: the same number whatever the host has free.
const PINNED_GRAIN: u64 = 1 << 30;

/// Chooses for `task` on `machine` within what `asked` and a given `split` leave open. Two experts are on the devices together, or one
/// is parked in host memory while the other works: whichever fits and is faster. Where the weights do not fit, those of some blocks, or
/// of all, are streamed from host memory.
///
/// # Errors
/// When nothing fits: what is missing, and what would fit.
pub fn settle(
    task: &Task,
    machine: &Machine,
    asked: &MemoryConfig,
    split: Option<&[usize]>,
    shapes: &Shapes,
) -> Result<Settled> {
    let (within, (task, choice), more) = streamed(task, machine, asked, split)?;
    let given = split.map_or(Given::Nothing, |_| Given::Split);
    let forecast = Forecast::new(&choice, &within, task.tokens(), task.batch);
    let forecast = refusal::checked(forecast, &task, machine, asked, given, &shapes.possible)?;
    let forecast = forecast.with_buckets(&choice, &task, &within, &shapes.there)?.with_more(more);
    Ok(Settled::new(&task, choice, forecast))
}

/// `settled` for the same `task` with the networks' matrices in host memory while clips are decoded: the same choice where the
/// host has room for them too, else the best one of the same split that leaves it; `None` where none does.
///
/// # Errors
/// Sizes that the model's code does not take.
pub fn settle_apart(
    task: &Task,
    machine: &Machine,
    asked: &MemoryConfig,
    shapes: &Shapes,
    settled: &Settled,
) -> Result<Option<Settled>> {
    let task = &Task { decoding: Decoding::Alone, ..settled.task(task) };
    let Choice { split, ffn_tokens, .. } = &settled.choice;
    let stages = settled.choice.forecast(task, machine)?;
    let choice = match stages.iter().map(|stage| stage.host).sum::<u64>() <= machine.host {
        true => Choice { stages, ..settled.choice.clone() },
        false => {
            let alike = MemoryConfig { ffn_tokens: Some(*ffn_tokens), ..asked.clone() };
            choose(task, machine, &alike, Some(split))?
        }
    };
    if choice.beyond > 0 {
        return Ok(None);
    }
    let forecast = Forecast::new(&choice, machine, task.tokens(), task.batch);
    let forecast = forecast.with_buckets(&choice, task, machine, &shapes.there)?;
    let forecast = forecast.with_more(settled.forecast.more_host);
    Ok(Some(Settled::new(task, choice, forecast)))
}

/// The best plan for `task`, with the matrices of as few blocks in host memory as will do.
fn streamed<'a>(
    task: &Task<'a>,
    machine: &Machine,
    asked: &MemoryConfig,
    split: Option<&[usize]>,
) -> Result<(Machine, (Task<'a>, Choice), Option<More>)> {
    let with = |streamed: Streamed| {
        let base = Base { streamed, ..task.base };
        Task { base, ..task.clone() }
    };
    let [first, rest @ ..] = asked.weights.streamed(machine) else {
        return within_host(task, machine, asked, split);
    };
    let best = within_host(&with(*first), machine, asked, split)?;
    if best.1.1.beyond == 0 || rest.is_empty() {
        return Ok(best);
    }
    // Whether anything fits is seen by the leanest plan of the same split: a search for each would take long.
    let Choice { split: found, .. } = &best.1.1;
    let leanest = MemoryConfig {
        keep: if asked.keep == KeepConfig::Auto { KeepConfig::Inputs } else { asked.keep },
        ffn_tokens: asked.ffn_tokens.or(Some(LEAST_FFN_TOKENS)),
        ..asked.clone()
    };
    for streamed in rest {
        let tried = with(*streamed);
        let (_, lean) = housed(&tried, machine, &leanest, Some(split.unwrap_or(found)))?;
        if lean.beyond == 0 {
            let settled = within_host(&tried, machine, asked, split)?;
            if settled.1.1.beyond == 0 {
                return Ok(settled);
            }
        }
    }
    Ok(best)
}

/// The best plan for `task` with the amount of host memory that pays, on the machine that has that much, and what more
/// would bring.
///
/// Smaller amounts are weighed with the split and the chunks of the largest, and only the one that pays best is searched as
/// a whole.
fn within_host<'a>(
    task: &Task<'a>,
    machine: &Machine,
    asked: &MemoryConfig,
    split: Option<&[usize]>,
) -> Result<(Machine, (Task<'a>, Choice), Option<More>)> {
    let most = housed(task, machine, asked, split)?;
    let (housed_task, choice) = &most;
    let alike = MemoryConfig { ffn_tokens: Some(choice.ffn_tokens), ..asked.clone() };
    let less = host::less(machine, asked).into_iter().map(|machine| {
        let choice = choose(housed_task, &machine, &alike, Some(&choice.split))?;
        Ok(Tried::new(machine, &choice))
    });
    let (best, more) = host::best(less.collect::<Result<_>>()?, Tried::new(machine.clone(), choice));
    Ok(match best.host == machine.host {
        true => (best, most, more),
        false => {
            let found = housed(task, &best, asked, split)?;
            (best, found, more)
        }
    })
}

/// `task` with its networks where they are best, and the best choice there.
fn housed<'a>(
    task: &Task<'a>,
    machine: &Machine,
    asked: &MemoryConfig,
    split: Option<&[usize]>,
) -> Result<(Task<'a>, Choice)> {
    let with = |networks: Networks| {
        let task = Task { networks, ..task.clone() };
        let choice = choose(&task, machine, asked, split)?;
        Ok::<_, Error>((task, choice))
    };
    let (task, together) = with(task.networks)?;
    // On the CPU both are the same memory.
    if task.networks != Networks::SideBySide || !machine.stages.iter().any(|card| card.engine.is_gpu()) {
        return Ok((task, together));
    }
    let (other, in_turn) = with(Networks::InTurn)?;
    let step = |choice: &Choice| choice.seconds * task.accumulate as f64;
    // A step exchanges the two once at most; copies go both ways at once.
    let exchange = in_turn
        .stage_ranges()
        .zip(&machine.stages)
        .map(|(range, card)| task.base.matrix_bytes(task.dit.as_ref(), &range) as f64 / card.link);
    let in_turn_step = step(&in_turn) + exchange.fold(0.0, f64::max);
    Ok(match (together.beyond, step(&together)) <= (in_turn.beyond, in_turn_step) {
        true => (task, together),
        false => (other, in_turn),
    })
}

/// The shapes that clips have and could have, from large to small.
#[derive(Debug, Clone, Default)]
pub struct Shapes {
    /// The buckets that hold clips.
    pub there: Vec<Shape>,
    /// What the recipe's sizes and lengths could make.
    pub possible: Vec<Shape>,
}

/// What is kept of each block.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum KeepConfig {
    /// As the plan finds best.
    #[default]
    Auto,
    /// Its input: the backward recomputes the rest.
    Inputs,
    /// Its input and what its self-attention made.
    Attention,
    /// All that its backward needs: the fastest, and by far the most memory.
    All,
}

/// Whether what is kept waits in host memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Offload {
    /// As the plan finds best.
    #[default]
    Auto,
    /// It stays on the device.
    Never,
    /// It goes out to host memory, and comes back one block ahead of its use.
    Always,
}

impl MemoryConfig {
    /// Checks the values.
    ///
    /// # Errors
    /// Naming the key and what it must be.
    pub fn check(&self) -> Result<()> {
        match self.ffn_tokens {
            Some(0) => {
                Err(Error::Setting { key: "memory.ffn_tokens".into(), why: "must be at least 1".into() })
            }
            _ => Ok(()),
        }
    }
}

/// The settled memory of a training step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryPlan {
    /// What the recipe asks to keep.
    pub keep: KeepConfig,
    /// Where it asks to keep it.
    pub offload: Offload,
    /// Host memory that it lets offload pin.
    pub host_memory: Option<Bytes>,
    /// Host memory that may be pinned, settled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pinned: Option<Bytes>,
    /// Where the experts are, where two are trained.
    #[serde(default, skip_serializing_if = "is_one")]
    pub networks: Networks,
    /// Where the networks are while clips are decoded.
    #[serde(default, skip_serializing_if = "is_beside")]
    pub decoding: Decoding,
    /// Groups of devices that clips go through, each with the whole network; 1 for the split as it is.
    #[serde(default = "one_group", skip_serializing_if = "is_one_group")]
    pub clip_groups: NonZeroUsize,
    /// Devices of such a group that share the tokens of a call, each with the whole network; 1 where they are stages.
    #[serde(default = "one_group", skip_serializing_if = "is_one_group")]
    pub clip_sharing: NonZeroUsize,
    /// Devices that decode clips together, a band of rows each.
    #[serde(default = "one", skip_serializing_if = "is_single")]
    pub bands: usize,
    /// The most tokens of a clip that go through a feed-forward layer at once.
    pub ffn_tokens: usize,
    /// Where it asks to keep the model's matrices.
    #[serde(default, skip_serializing_if = "WeightPlace::is_auto")]
    pub weights: WeightPlace,
    /// What that comes to, block by block, in runs.
    pub blocks: Vec<Run>,
}

/// Blocks in a row that are treated alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// How many.
    pub count: usize,
    /// What is kept of each.
    pub keep: Keep,
    /// Where it waits.
    pub place: KeepPlace,
}

impl MemoryPlan {
    /// What `asked` came to.
    pub fn new(asked: &MemoryConfig, settled: &Settled) -> Self {
        let choice = &settled.choice;
        Self {
            networks: settled.networks,
            decoding: settled.decoding,
            clip_groups: settled.clip_groups,
            clip_sharing: settled.clip_sharing,
            bands: settled.forecast.devices_of(Phase::Decoding),
            keep: asked.keep,
            offload: asked.offload,
            host_memory: asked.host_memory,
            weights: asked.weights,
            pinned: Some(Bytes(settled.pinned)),
            ffn_tokens: choice.ffn_tokens,
            blocks: runs(&choice.blocks),
        }
    }

    /// What becomes of each of the model's blocks.
    pub fn keeping(&self) -> Vec<BlockPlan> {
        self.blocks.iter().flat_map(|run| std::iter::repeat_n(run.plan(), run.count)).collect()
    }
}

impl Run {
    fn plan(&self) -> BlockPlan {
        BlockPlan { keep: self.keep, place: self.place }
    }
}

/// For people: what is kept, and where.
impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let what = match self.keep {
            Keep::Input => "input",
            Keep::Attention => "input and attention",
            Keep::All => "all but norms",
        };
        let place = match self.place {
            KeepPlace::Device => "on the device",
            KeepPlace::Host => "in host memory",
            KeepPlace::HostUntilUsed => "in host memory until used",
        };
        write!(f, "{what} {place}")
    }
}

/// The plans of blocks as runs.
pub fn runs(blocks: &[BlockPlan]) -> Vec<Run> {
    let run = |alike: &[BlockPlan]| Run { count: alike.len(), keep: alike[0].keep, place: alike[0].place };
    blocks.chunk_by(|a, b| a == b).map(run).collect()
}
