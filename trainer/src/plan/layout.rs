//! How clips go through the network on several devices: split as it is trained, whole on each of several groups of them, or whole on
//! each with the tokens shared.

use std::fmt;
use std::num::NonZeroUsize;

use models::dit::{Control, DitConfig};

use super::rest::{Rest, Split};
use super::ways::Wording;
use super::work::Work;
use super::{SamplePlan, time};
use crate::bytes::Bytes;
use crate::error::{Error, Result};
use crate::machine::forecast::{Residuals, Task, Way};
use crate::machine::memory::{Machine, Phase, PhaseForecast, Settled};
use crate::recipe::TrainConfig;
use crate::sample::ClipLayout;
use crate::sample::estimate::{self, time_of_round};

/// The layout of clips that was chosen, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Laid {
    /// Groups of devices, each of which holds the whole network; 1 for the split as it is.
    pub groups: NonZeroUsize,
    /// Devices of a group that share the tokens of a call, each with the whole network; 1 where they are stages.
    pub sharing: NonZeroUsize,
    /// Stages of a group.
    depth: usize,
    reason: String,
}

impl fmt::Display for Laid {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { groups, sharing, depth, reason } = self;
        match (groups.get(), sharing.get(), depth) {
            (1, 1, 1) => write!(f, "one device"),
            (1, 1, depth) => write!(f, "pipeline over {depth} devices: {reason}"),
            (groups, 1, 1) => write!(f, "cfg, the whole network on each of {groups} devices: {reason}"),
            (groups, 1, depth) => {
                write!(f, "cfg, the network on {groups} groups of {depth} devices: {reason}")
            }
            (1, sharing, _) => write!(f, "ulysses, the tokens of a call over {sharing} devices: {reason}"),
            (groups, sharing, _) => {
                write!(f, "cfg and ulysses, {groups} groups of {sharing} devices that share tokens: {reason}")
            }
        }
    }
}

/// Groups of devices, and devices of each that share tokens.
#[derive(Debug, Clone, Copy)]
struct Shape {
    groups: usize,
    sharing: usize,
}

impl Shape {
    /// The split as it is.
    const SPLIT: Self = Self { groups: 1, sharing: 1 };

    /// How long a solver step of all clips takes on `stages` devices: see [`time_of_round`].
    fn time(self, halves: &[usize], stages: usize) -> f64 {
        time_of_round(halves, stages, (self.groups, self.sharing))
    }

    /// The name of its kind.
    fn name(self) -> &'static str {
        if self.sharing > 1 { "ulysses" } else { "cfg" }
    }
}

/// Whether the tokens of the model `dit` may be shared by devices: not those of side streams, nor any in front of the latents', nor
/// those that attend to faces or to audio frame by frame.
fn shares_tokens(dit: &DitConfig) -> bool {
    let Control { side_chain, reference, animate, speech, .. } = &dit.control;
    side_chain.is_none() && reference.is_none() && animate.is_none() && speech.is_none()
}

/// What may be tried of `asked` on `stages` devices, the fastest first; of those alike, what takes the least memory.
fn candidates(asked: ClipLayout, rest: &Rest, dit: Split, halves: &[usize]) -> Vec<Shape> {
    let (stages, calls) = (dit.machine.stages.len(), halves.iter().sum::<usize>());
    let divisors = |least: usize| (least..=stages).filter(|n| stages.is_multiple_of(*n));
    let cfg = divisors(2).map(|groups| Shape { groups, sharing: 1 });
    let rows = divisors(2).filter(|sharing| *sharing <= dit.task.config().heads);
    let rows = rows.map(|sharing| Shape { groups: stages / sharing, sharing });
    // As fast by calls is faster: no activations go from stage to stage, and no stage waits for another.
    let pays = |shape: &Shape| {
        let is_as_fast = shape.time(halves, stages) <= Shape::SPLIT.time(halves, stages);
        is_as_fast && shape.groups <= calls
    };
    let has_fast_links = dit.machine.ways.iter().all(|way| *way == Way::Peer);
    let may_share =
        has_fast_links && rest.residuals != Residuals::Measured && shares_tokens(dit.task.config());
    let mut shapes: Vec<Shape> = match asked {
        ClipLayout::Cfg => cfg.collect(),
        ClipLayout::Ulysses => rows.filter(|shape| shape.groups <= calls).collect(),
        _ if may_share => cfg.chain(rows).filter(pays).collect(),
        _ => cfg.filter(pays).collect(),
    };
    let order = |a: &Shape, b: &Shape| a.time(halves, stages).total_cmp(&b.time(halves, stages));
    shapes.sort_by(|a, b| order(a, b).then((a.groups * a.sharing).cmp(&(b.groups * b.sharing))));
    shapes
}

/// Why a layout that is `asked` for cannot be, before its memory is looked at.
fn impossible(asked: ClipLayout, rest: &Rest, dit: Split) -> Option<&'static str> {
    let stages = dit.machine.stages.len();
    let is_shared = dit.machine.devices().len() < stages;
    Some(match asked {
        ClipLayout::Cfg if stages == 1 => "cfg puts the network on each of several devices, and there is one",
        ClipLayout::Cfg if is_shared => {
            "cfg puts the network on each device, and a device has several stages here"
        }
        ClipLayout::Ulysses if stages == 1 => {
            "ulysses shares tokens between several devices, and there is one"
        }
        ClipLayout::Ulysses if is_shared => {
            "ulysses puts the network on each device, and a device has several stages here"
        }
        ClipLayout::Ulysses if !shares_tokens(dit.task.config()) => {
            "ulysses is not for models with a side chain or the tokens of a reference picture"
        }
        ClipLayout::Ulysses if rest.residuals == Residuals::Measured => {
            "ulysses does not measure residuals: measure them in another layout, or name a table of them"
        }
        _ => return None,
    })
}

/// The layout of the clips of `rest` on the devices of `dit`: the fastest that fits, or what is `asked` for.
///
/// # Errors
/// A layout that was asked for and cannot be: what is missing.
pub fn laid(rest: &Rest, dit: Split, asked: ClipLayout, wording: Wording) -> Result<Laid> {
    let stages = dit.machine.stages.len();
    let (one, is_shared) = (NonZeroUsize::MIN, dit.machine.devices().len() < stages);
    let split = |reason: &str| Laid { groups: one, sharing: one, depth: stages, reason: reason.to_owned() };
    let key = match wording {
        Wording::Recipe => "sample.layout",
        Wording::Command => "--layout",
    };
    let refuse = |why: String| Err(Error::Setting { key: key.into(), why });
    if let Some(why) = impossible(asked, rest, dit) {
        return refuse(why.to_owned());
    }
    match asked {
        ClipLayout::Pipeline => return Ok(split("asked for")),
        _ if stages == 1 || is_shared || rest.clips.is_empty() => return Ok(split("nothing to choose")),
        ClipLayout::Auto | ClipLayout::Cfg | ClipLayout::Ulysses => {}
    }
    let halves = rest.halves();
    let mut misfit = None;
    for shape in candidates(asked, rest, dit, &halves) {
        let gain = Shape::SPLIT.time(&halves, stages) / shape.time(&halves, stages);
        let (Some(groups), Some(sharing)) =
            (NonZeroUsize::new(shape.groups), NonZeroUsize::new(shape.sharing))
        else {
            continue;
        };
        let whole = Rest { clip_groups: groups, clip_sharing: sharing, ..rest.clone() };
        match shortage(&whole.sampling(dit, &rest.clips)?, dit) {
            None => {
                let depth = stages / (shape.groups * shape.sharing);
                return Ok(Laid { groups, sharing, depth, reason: reason(gain, &halves) });
            }
            short => misfit = misfit.or(short.map(|short| (shape.name(), gain, short))),
        }
    }
    match (asked, misfit) {
        (ClipLayout::Cfg | ClipLayout::Ulysses, Some((name, _, short))) => {
            refuse(format!("{name} {short}; use pipeline, or a smaller base"))
        }
        (ClipLayout::Ulysses, None) => refuse(format!(
            "the {} heads of the model cannot be shared by {stages} devices",
            dit.task.config().heads
        )),
        (_, Some((name, gain, short))) if gain > 1.0 => {
            Ok(split(&format!("{name} would be about {gain:.2} times as fast, but {short}")))
        }
        (_, Some((name, _, short))) => Ok(split(&format!("{name} would be a little faster, but {short}"))),
        (_, None) => Ok(split(&format!("as fast as any other layout for {}", counted(&halves)))),
    }
}

/// Why a layout was chosen that is `gain` times as fast as the split.
fn reason(gain: f64, halves: &[usize]) -> String {
    match gain > 1.0 {
        true => format!("about {gain:.2} times as fast as the split for {}", counted(halves)),
        false => {
            format!("for {} the split would keep them as busy, but also send activations", counted(halves))
        }
    }
}

/// `settled` with about the share of a run's time that the solver steps of its clips, each of them computed, take on the GPUs of
/// `machine` beside the `work` of its own steps; without clips there is none, nor for CPUs, whose speed is not known.
///
/// # Errors
/// Sizes that the model does not take.
pub(super) fn with_clip_share(
    settled: Settled,
    (train, sample): (&TrainConfig, &SamplePlan),
    work: &Work,
    (task, machine): (&Task, &Machine),
) -> Result<Settled> {
    if sample.clips.is_empty() || machine.stages.iter().any(|card| card.name == "cpu") {
        return Ok(settled);
    }
    let computed = vec![0; sample.clips.len()];
    let groups = [settled.clip_groups, settled.clip_sharing];
    let split = (machine, settled.choice.split.as_slice(), groups);
    let model = (task.config(), task.base.frozen);
    let of_set = estimate::forecast((&sample.clips, &computed), model, split)?.as_secs_f64();
    let sets = 1 + if sample.every == 0 { 1 } else { train.steps.div_ceil(sample.every) };
    let of_step = time::of_step(&settled.choice, work, (task, machine));
    let (clips, steps) = (sets as f64 * of_set, train.steps as f64 * of_step);
    Ok(settled.with_clip_share(clips / (clips + steps)))
}

fn counted(halves: &[usize]) -> String {
    match halves.len() {
        1 => "one clip".to_owned(),
        count => format!("{count} clips"),
    }
}

/// What `phase` lacks.
fn shortage(phase: &PhaseForecast, dit: Split) -> Option<String> {
    debug_assert_eq!(phase.phase, Phase::Sampling);
    let short = phase.misfit()?;
    let there = Bytes(short.room.bytes().unwrap_or(0));
    Some(format!("needs {} on {}, which has {there}", Bytes(short.needed), short.place(dit.machine)))
}
