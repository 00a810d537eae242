//! How clips go through the network on several devices: split as it is trained, or whole on each of several groups of them.

use std::fmt;
use std::num::NonZeroUsize;

use models::dit::DitConfig;
use models::published::Defaults;
use models::weights::Frozen;

use super::SamplePlan;
use super::rest::{Rest, Split};
use super::ways::Wording;
use crate::bytes::Bytes;
use crate::error::{Error, Result};
use crate::machine::memory::{Machine, Phase, PhaseForecast, Settled};
use crate::recipe::TrainConfig;
use crate::sample::ClipLayout;
use crate::sample::estimate::{self, time_of_round};

/// The layout of clips that was chosen, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Laid {
    /// Groups of devices, each of which holds the whole network; 1 for the split as it is.
    pub groups: NonZeroUsize,
    /// Devices of a group.
    depth: usize,
    reason: String,
}

impl fmt::Display for Laid {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { groups, depth, reason } = self;
        match (groups.get(), depth) {
            (1, 1) => write!(f, "one device"),
            (1, depth) => write!(f, "pipeline over {depth} devices: {reason}"),
            (groups, 1) => write!(f, "cfg, the whole network on each of {groups} devices: {reason}"),
            (groups, depth) => write!(f, "cfg, the network on {groups} groups of {depth} devices: {reason}"),
        }
    }
}

/// The layout of the clips of `rest` on the devices of `dit`: the fastest that fits, or what is `asked` for.
///
/// # Errors
/// A layout that was asked for and cannot be: what is missing.
pub fn laid(rest: &Rest, dit: Split, asked: ClipLayout, wording: Wording) -> Result<Laid> {
    let stages = dit.machine.stages.len();
    let split = |reason: &str| Laid { groups: NonZeroUsize::MIN, depth: stages, reason: reason.to_owned() };
    let key = match wording {
        Wording::Recipe => "sample.layout",
        Wording::Command => "--layout",
    };
    let refuse = |why: String| Err(Error::Setting { key: key.into(), why });
    let is_shared = dit.machine.devices().len() < stages;
    match asked {
        ClipLayout::Cfg if stages == 1 => {
            return refuse("cfg puts the network on each of several devices, and there is one".into());
        }
        ClipLayout::Cfg if is_shared => {
            return refuse(
                "cfg puts the network on each device, and a device has several stages here".into(),
            );
        }
        ClipLayout::Pipeline => return Ok(split("asked for")),
        _ if stages == 1 || is_shared || rest.clips.is_empty() => return Ok(split("nothing to choose")),
        ClipLayout::Auto | ClipLayout::Cfg => {}
    }
    let halves = rest.halves();
    let time = |groups: usize| time_of_round(&halves, stages, groups);
    let mut candidates: Vec<usize> = (2..=stages).filter(|groups| stages.is_multiple_of(*groups)).collect();
    // The fastest first; of those alike, the one that takes the least memory.
    candidates.sort_by(|a, b| time(*a).total_cmp(&time(*b)).then(a.cmp(b)));
    if asked == ClipLayout::Auto {
        // As fast by calls is faster: no activations go from stage to stage, and no stage waits for another.
        let has_work = |groups: usize| groups <= halves.iter().sum();
        candidates.retain(|groups| time(*groups) <= time(1) && has_work(*groups));
    }
    let mut misfit = None;
    for groups in candidates.into_iter().filter_map(NonZeroUsize::new) {
        let gain = time(1) / time(groups.get());
        let grouped = Rest { clip_groups: groups, ..rest.clone() };
        match shortage(&grouped.sampling(dit, &rest.clips)?, dit) {
            None => {
                let reason = match gain > 1.0 {
                    true => format!("about {gain:.2} times as fast as the split for {}", counted(&halves)),
                    false => format!(
                        "for {} the split would keep them as busy, but also send activations",
                        counted(&halves)
                    ),
                };
                return Ok(Laid { groups, depth: stages / groups, reason });
            }
            short => misfit = misfit.or(short.map(|short| (gain, short))),
        }
    }
    match (asked, misfit) {
        (ClipLayout::Cfg, Some((_, short))) => {
            refuse(format!("cfg {short}; use pipeline, or a smaller base"))
        }
        (_, Some((gain, short))) if gain > 1.0 => {
            Ok(split(&format!("cfg would be about {gain:.2} times as fast, but {short}")))
        }
        (_, Some((_, short))) => Ok(split(&format!("cfg would be a little faster, but {short}"))),
        (_, None) => Ok(split(&format!("as fast as any other layout for {}", counted(&halves)))),
    }
}

/// `settled` with about the share of a run's time that the steps of its clips take on the GPUs of `machine`, with every solver step
/// computed; without clips there is none, nor for CPUs, whose speed is not known.
///
/// # Errors
/// Sizes that the model does not take.
pub(super) fn with_clip_share(
    settled: Settled,
    (train, sample): (&TrainConfig, &SamplePlan),
    model: (&DitConfig, &Defaults, Frozen),
    machine: &Machine,
) -> Result<Settled> {
    if sample.clips.is_empty() || machine.stages.iter().any(|card| card.name == "cpu") {
        return Ok(settled);
    }
    let computed = vec![0; sample.clips.len()];
    let split = (machine, settled.choice.split.as_slice(), settled.clip_groups);
    let of_set = estimate::forecast((&sample.clips, &computed), model, split)?.as_secs_f64();
    let sets = 1 + if sample.every == 0 { 1 } else { train.steps.div_ceil(sample.every) };
    let of_step = settled.choice.seconds * (train.accumulate + machine.stages.len() - 1) as f64;
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
