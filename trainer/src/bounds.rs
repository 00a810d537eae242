//! The largest numbers of recipes and prompts: far beyond any use, and small enough that nothing overflows and that a typo
//! does not allocate all memory.

use crate::error::{Error, Result};

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
/// Replicas of a run on one host.
pub const REPLICAS: u64 = 1024;
/// Seconds that replicas wait for each other: a day.
pub const SECONDS: u64 = 86_400;
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

/// Refuses a number beyond [`REAL`], and what is not a number.
///
/// # Errors
/// [`Error::Setting`].
pub fn near(key: &str, value: f64) -> Result<()> {
    match value.abs() <= REAL {
        true => Ok(()),
        false => {
            let why = format!("{value} is out of bounds; between -{REAL} and {REAL} is allowed");
            Err(Error::Setting { key: key.to_owned(), why })
        }
    }
}
