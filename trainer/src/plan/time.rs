//! About how long the steps of a run take, before anything is loaded, and what another arithmetic would change.

use std::time::Duration;

use kernels::weight::Format;
use models::adapter::Target;
use models::weights::{Frozen, Storage};

use super::work::Work;
use crate::machine::forecast::Task;
use crate::machine::memory::{Choice, Machine};
use crate::machine::precision::Arithmetic;
use crate::replicas::exchange_seconds;
use crate::sample::estimate::in_words;

/// What a step takes less than estimated where a card reaches 0.8 of its peak instead of half of it, as GeForce cards do, whose peak is
/// lower against their memory.
const BEST: f64 = 0.5 / 0.8;
/// Seconds of a step that are worth a line.
const LEAST: f64 = 1.0;
/// What another arithmetic must gain to be mentioned.
const WORTH: f64 = 1.1;

/// About how many seconds the `work` of a step of `task` takes.
pub(super) fn of_step(choice: &Choice, work: &Work, (task, machine): (&Task, &Machine)) -> f64 {
    let of_call = choice.call_seconds_as(task, machine, task.base.frozen);
    let rounds = |count: f64| if count > 0.0 { count + (machine.stages.len() - 1) as f64 } else { 0.0 };
    rounds(work.trained) * choice.seconds + rounds(work.predicted) * of_call
}

/// Lines about the time of the steps of `task`: of their `work` as [`in_seconds`] has it, and what else is to be said of it.
pub(super) fn notes(
    choice: &Choice,
    work: &Work,
    (task, machine): (&Task, &Machine),
    link: Option<f64>,
) -> Vec<String> {
    let frozen = task.base.frozen;
    let seconds = [choice.seconds_as(task, machine, frozen), choice.call_seconds_as(task, machine, frozen)];
    in_seconds(choice, work, (task, machine), link).into_iter().chain(work.notes(seconds)).collect()
}

/// A line about the time of the steps of `task` on GPUs, with what replicas exchange over a `link` of so many bytes a second;
/// `None` for CPUs, whose speed is not known, and for steps of no length if no link is asked about.
fn in_seconds(
    choice: &Choice,
    work: &Work,
    (task, machine): (&Task, &Machine),
    link: Option<f64>,
) -> Option<String> {
    if machine.stages.iter().any(|card| card.name == "cpu") {
        return None;
    }
    let frozen = task.base.frozen;
    // The first micro-batch goes through all stages before the last one is in the pipeline.
    let behind = (machine.stages.len() - 1) as f64;
    let calls = if work.predicted > 0.0 { work.predicted + behind } else { 0.0 };
    let seconds = |frozen: Frozen| {
        (work.trained + behind) * choice.seconds_as(task, machine, frozen)
            + calls * choice.call_seconds_as(task, machine, frozen)
    };
    let own = seconds(frozen);
    if own < LEAST && link.is_none() {
        return None;
    }
    let integers = Storage::Quantised(Format::RotatedInt8);
    let (other, name) = match frozen.storage == integers {
        true => (Storage::Dense, Arithmetic::Bf16),
        false => (integers, Arithmetic::Int8),
    };
    let others = seconds(Frozen { storage: other, ..frozen });
    let beside = match others * WORTH < own || own * WORTH < others {
        true => format!("; with model.arithmetic = \"{}\" {}", name.name(), range(others)),
        false => String::new(),
    };
    let between = replicas(task, link.unwrap_or(TEN_GIGABITS), own * BEST);
    Some(format!(
        "a step takes about {}{beside} (estimates from the peak rates of the cards){between}",
        range(own)
    ))
}

/// Bytes a second that Ethernet of 10 Gb/s moves, less its headers.
pub const TEN_GIGABITS: f64 = 1.17e9;

/// What replicas add to a step of `own` seconds, where there are several.
fn replicas(task: &Task, link: f64, own: f64) -> String {
    if task.replicas == 1 {
        return String::new();
    }
    let lora = task.lora();
    let rank = |target: &Target| lora.of(&target.module).rank();
    let numbers: usize = task.targets.iter().map(|t| rank(t) * (t.out + t.input)).sum();
    let bytes = 4.0 * numbers as f64 * task.networks.count() as f64;
    let seconds = exchange_seconds(bytes, task.replicas, link);
    format!(
        ";\n{} replicas exchange {:.2} GB of gradients a step, computed for {:.2} GB/s each way: {seconds:.2} s, which leaves {:.3} of \
         their speed",
        task.replicas,
        bytes / 1e9,
        link / 1e9,
        own / (own + seconds)
    )
}

fn range(seconds: f64) -> String {
    let words = |seconds: f64| match seconds < 120.0 {
        true => format!("{seconds:.1} s"),
        false => in_words(Duration::from_secs_f64(seconds.min(1e9))),
    };
    format!("{} to {}", words(seconds * BEST), words(seconds))
}
