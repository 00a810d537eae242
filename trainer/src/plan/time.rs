//! About how long the steps of a run take, before anything is loaded, and what another arithmetic would change.

use std::time::Duration;

use kernels::weight::Format;
use models::weights::{Frozen, Storage};

use crate::machine::forecast::Task;
use crate::machine::memory::{Choice, Machine};
use crate::machine::precision::Arithmetic;
use crate::sample::estimate::in_words;

/// What a step takes less than estimated where a card reaches 0.8 of its peak instead of half of it, as GeForce cards do, whose peak is
/// lower against their memory.
const BEST: f64 = 0.5 / 0.8;
/// What another arithmetic must gain to be mentioned.
const WORTH: f64 = 1.1;

/// A line about the time of the steps of `task` on GPUs; `None` for CPUs, whose speed is not known.
pub(super) fn of_steps(choice: &Choice, task: &Task, machine: &Machine) -> Option<String> {
    if machine.stages.iter().any(|card| card.name == "cpu") {
        return None;
    }
    let frozen = task.base.frozen;
    // The first micro-batch goes through all stages before the last one is in the pipeline.
    let rounds = (task.accumulate + machine.stages.len() - 1) as f64;
    let seconds = |frozen: Frozen| rounds * choice.seconds_as(task, machine, frozen);
    let own = seconds(frozen);
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
    Some(format!("a step takes about {}{beside} (estimates from the peak rates of the cards)", range(own)))
}

fn range(seconds: f64) -> String {
    let words = |seconds: f64| match seconds < 120.0 {
        true => format!("{seconds:.1} s"),
        false => in_words(Duration::from_secs_f64(seconds.min(1e9))),
    };
    format!("{} to {}", words(seconds * BEST), words(seconds))
}
