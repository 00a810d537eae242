//! The largest numbers that a recipe and a prompt may ask for: far beyond any use, and small enough that nothing overflows
//! and no memory is asked for that a slip of the keyboard means.

use crate::bytes::Bytes;
use crate::error::{Error, Result};
use crate::prompt::ClipRequest;
use crate::recipe::Recipe;

/// Steps, and steps between two things.
pub const STEPS: u64 = 1_000_000_000;
/// Minutes between two checkpoints: two years.
pub const MINUTES: u64 = 1_000_000;
/// Samples of a micro-batch.
pub const BATCH: u64 = 1024;
/// Micro-batches of a step.
pub const ACCUMULATE: u64 = 10_000;
/// Rank of an adapter, wider than the widest layer of a published model.
pub const RANK: u64 = 16_384;
/// Checkpoints that are kept.
pub const KEEP_LAST: u64 = 10_000;
/// Stages of the pipeline.
pub const STAGES: u64 = 64;
/// Tokens of a clip.
pub const TOKENS: u64 = 1 << 31;
/// Memory: a pebibyte.
pub const MEMORY: u64 = 1 << 50;
/// Real numbers of which only the order of magnitude matters, positive or negative.
pub const REAL: f64 = 1e6;
/// Steps of the solver.
pub const SOLVER_STEPS: u64 = 10_000;
/// A side of a clip in pixels.
pub const SIDE: u64 = 8192;
/// Frames of a clip.
pub const FRAMES: u64 = 4097;
/// Pixels of all frames of a clip.
pub const VOLUME: u64 = 1 << 31;
/// Items of an epoch, repeats counted.
pub const EPOCH: u64 = 10_000_000;

/// Checks the numbers of a recipe that do not depend on the model or the clips.
///
/// # Errors
/// The key of the first that is too large, and the bound.
pub fn check(recipe: &Recipe) -> Result<()> {
    let Recipe { adapter, train, optimizer, devices, memory, checkpoint, sample, .. } = recipe;
    let bytes = |bytes: Option<Bytes>| bytes.map_or(0, |bytes| bytes.0);
    let count = |count: Option<usize>| count.unwrap_or(0) as u64;
    let [width, height] = sample.size.unwrap_or([0, 0]).map(u64::from);
    let whole = [
        ("train.steps", train.steps, STEPS),
        ("train.epochs", train.epochs.unwrap_or(0), STEPS),
        ("train.batch", train.batch as u64, BATCH),
        ("train.accumulate", train.accumulate as u64, ACCUMULATE),
        ("train.eval_every", train.eval_every, STEPS),
        ("adapter.rank", count(adapter.rank), RANK),
        ("adapter.factor", count(adapter.factor), RANK),
        ("optimizer.warmup", optimizer.warmup, STEPS),
        ("devices.stages", devices.stages.len() as u64, STAGES),
        ("devices.memory_limit", bytes(devices.memory_limit), MEMORY),
        ("memory.host_memory", bytes(memory.host_memory), MEMORY),
        ("memory.ffn_tokens", count(memory.ffn_tokens), TOKENS),
        ("checkpoint.every_steps", checkpoint.every_steps, STEPS),
        ("checkpoint.every_minutes", checkpoint.every_minutes, MINUTES),
        ("checkpoint.keep_last", checkpoint.keep_last as u64, KEEP_LAST),
        ("sample.every", sample.every, STEPS),
        ("sample.steps", count(sample.steps), SOLVER_STEPS),
        ("sample.size", width.max(height), SIDE),
        ("sample.frames", u64::from(sample.frames.unwrap_or(0)), FRAMES),
    ];
    for (key, value, most) in whole {
        at_most(key, value, most)?;
    }
    let timesteps = &train.timesteps;
    let real = [
        ("adapter.alpha", adapter.alpha.unwrap_or(0.0)),
        ("optimizer.lr", optimizer.lr),
        ("optimizer.eps", optimizer.eps),
        ("optimizer.weight_decay", optimizer.weight_decay),
        ("optimizer.clip_norm", optimizer.clip_norm),
        ("train.timesteps.shift", timesteps.shift.unwrap_or(0.0)),
        ("train.timesteps.scale", timesteps.scale),
        ("train.timesteps.mean", timesteps.mean),
        ("train.timesteps.std", timesteps.std),
        ("sample.strength", sample.strength),
        ("sample.guidance", sample.guidance.unwrap_or(0.0)),
        ("sample.guidance_high", sample.guidance_high.unwrap_or(0.0)),
        ("sample.shift", sample.shift.unwrap_or(0.0)),
    ];
    real.into_iter().try_for_each(|(key, value)| near(key, value))
}

/// Checks the numbers of a clip.
///
/// # Errors
/// What is too large, and the bound.
pub fn check_clip(clip: &ClipRequest) -> Result<()> {
    let (width, height, frames) = (u64::from(clip.width), u64::from(clip.height), u64::from(clip.frames));
    at_most("size of a clip", width.max(height), SIDE)?;
    at_most("frames of a clip", frames, FRAMES)?;
    at_most("width x height x frames of a clip", width * height * frames, VOLUME)?;
    at_most("steps of a clip", clip.steps as u64, SOLVER_STEPS)?;
    near("guidance of a clip", clip.guidance)?;
    near("guidance of a clip", clip.guidance_high)?;
    near("shift of a clip", clip.shift)
}

/// Refuses a `value` of `key` beyond `most`.
///
/// # Errors
/// [`Error::Setting`].
pub fn at_most(key: &str, value: u64, most: u64) -> Result<()> {
    match value <= most {
        true => Ok(()),
        false => Err(Error::Setting {
            key: key.to_owned(),
            why: format!("{value} is too large; at most {most} is allowed"),
        }),
    }
}

/// Refuses a real number beyond [`REAL`], and what is none.
fn near(key: &str, value: f64) -> Result<()> {
    match value.abs() <= REAL {
        true => Ok(()),
        false => {
            let why = format!("{value} is out of bounds; between -{REAL} and {REAL} is allowed");
            Err(Error::Setting { key: key.to_owned(), why })
        }
    }
}
