//! What is said where nothing fits: the nearest plans that do.

use kernels::weight::Format;
use models::dit::{Base, Streamed};
use models::weights::{Frozen, Storage};

use super::choice::LEAST_FFN_TOKENS;
use super::{Forecast, KeepConfig, Machine, MemoryConfig, Offload, WeightPlace, choose};
use crate::bytes::Bytes;
use crate::error::{Error, Result};
use crate::machine::forecast::{Networks, Task};

/// A shape of clips: in words, and (frames, height, width) of the latents.
pub type Shape = (String, (usize, usize, usize));

/// More host memory than any machine has: 1 TiB.
const ROOMY: u64 = 1 << 40;

/// Whether the recipe gives a split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Given {
    Nothing,
    Split,
}

/// The forecast, where it fits.
///
/// # Errors
/// Where it does not: what is missing, and every single change that helps, of keeping less, a quantised base, smaller clips
/// out of `smaller`, one sample at a time, and one more card.
pub(super) fn checked(
    forecast: Forecast,
    task: &Task,
    machine: &Machine,
    asked: &MemoryConfig,
    given: Given,
    smaller: &[Shape],
) -> Result<Forecast> {
    let Some((place, needed, room)) = forecast.misfit(machine) else { return Ok(forecast) };
    let ways = ways_out(task, machine, asked, given, smaller)?;
    let (needed, room) = (Bytes(needed), Bytes(room));
    Err(Error::TooLarge { place, needed, room, tokens: forecast.tokens, ways })
}

fn ways_out(
    task: &Task,
    machine: &Machine,
    asked: &MemoryConfig,
    given: Given,
    smaller: &[Shape],
) -> Result<Vec<String>> {
    let fits = |task: &Task, machine: &Machine, asked: &MemoryConfig| {
        let choice = choose(task, machine, asked, None)?;
        Ok::<_, Error>(Forecast::new(&choice, machine, task.tokens(), task.batch).misfit(machine).is_none())
    };
    // Whatever fits at all fits when as little as can be is kept, and in small chunks.
    let open = MemoryConfig {
        keep: KeepConfig::Inputs,
        ffn_tokens: Some(LEAST_FFN_TOKENS),
        offload: Offload::Auto,
        host_memory: asked.host_memory,
        weights: asked.weights,
    };
    let mut ways = Vec::new();
    let is_open = (asked.keep, asked.offload, asked.ffn_tokens) == (KeepConfig::Auto, Offload::Auto, None);
    if !(is_open && given == Given::Nothing) && fits(task, machine, &open)? {
        let keys = "memory.keep, memory.offload, memory.ffn_tokens and devices.split";
        ways.push(format!("leave {keys} to the plan"));
    }
    let streamed = Task { base: Base { streamed: Streamed::ALL, ..task.base }, ..task.clone() };
    if asked.weights == WeightPlace::Device && fits(&streamed, machine, &open)? {
        ways.push("memory.weights = \"auto\"".to_owned());
    }
    if asked.weights == WeightPlace::Auto {
        ways.extend(more_host(task, machine, &open)?);
    }
    let single = Task { batch: 1, ..task.clone() };
    if task.batch > 1 && fits(&single, machine, &open)? {
        ways.push("train.batch = 1 with train.accumulate in its place".to_owned());
    }
    let single = Task { networks: Networks::One, ..task.clone() };
    if task.networks != Networks::One && fits(&single, machine, &open)? {
        ways.push(match task.networks {
            Networks::MakesRoom => "no sample.prompts, and clips by `tandem sample` after the run".to_owned(),
            _ => {
                "model.expert = \"high\" in one run and \"low\" in another, without sample.prompts".to_owned()
            }
        });
    }
    let storage = Storage::Quantised(Format::E4m3);
    let quantised = Base { frozen: Frozen { storage, ..task.base.frozen }, ..task.base };
    let quantised = Task { base: quantised, ..task.clone() };
    if !task.base.frozen.is_quantised() && fits(&quantised, machine, &open)? {
        ways.push("model.base = \"fp8\"".to_owned());
    }
    ways.extend(nearest(smaller, task, "", |task| fits(task, machine, &open))?);
    if let Some(more) = one_more(machine)
        && fits(task, &more, &open)?
    {
        ways.push("one more card like the last in devices.stages".to_owned());
    }
    if ways.is_empty() {
        ways.extend(nearest(smaller, &quantised, "model.base = \"fp8\" with ", |task| {
            fits(task, machine, &open)
        })?);
    }
    Ok(ways)
}

/// Host memory beyond that of `machine` with which weights that are streamed would let `task` fit.
fn more_host(task: &Task, machine: &Machine, leanest: &MemoryConfig) -> Result<Option<String>> {
    if !machine.stages.iter().any(|card| card.engine.is_gpu()) {
        return Ok(None);
    }
    let roomy = Machine { host: ROOMY, ..machine.clone() };
    for streamed in &Streamed::STEPS[1..] {
        let base = Base { streamed: *streamed, ..task.base };
        let choice = choose(&Task { base, ..task.clone() }, &roomy, leanest, None)?;
        if choice.beyond == 0 {
            let gib = choice.stages.iter().map(|stage| stage.host).sum::<u64>().div_ceil(1 << 30);
            let needs = format!("memory.host_memory = \"{gib}GiB\", where the machine has that much to pin");
            return Ok((gib << 30 > machine.host).then_some(needs));
        }
    }
    Ok(None)
}

/// The first of `smaller`, which go from large to small, that fits.
fn nearest(
    smaller: &[Shape],
    task: &Task,
    with: &str,
    fits: impl Fn(&Task) -> Result<bool>,
) -> Result<Option<String>> {
    for (what, latents) in smaller {
        let cut = Task { latents: *latents, batch: 1, ..task.clone() };
        if cut.tokens() < task.tokens() && fits(&cut)? {
            return Ok(Some(format!("{with}clips of at most {what}")));
        }
    }
    Ok(None)
}

/// The machine with its last card twice.
fn one_more(machine: &Machine) -> Option<Machine> {
    let mut more = machine.clone();
    let last = machine.stages.last().filter(|card| card.engine.is_gpu())?;
    more.stages.push(last.clone());
    more.ways.push(crate::machine::forecast::Way::Host);
    Some(more)
}
