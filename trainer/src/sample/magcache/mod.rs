//! MagCache: solver steps that reuse what the blocks added to the stream in an earlier step instead of running them.
//!
//! How much the magnitude of that residual changes from step to step is nearly the same for every prompt, so a table of one
//! measured clip says ahead of the first step which steps may be skipped. The residual is added as it was computed.
//!
//! Method and tables: Zehong-Ma/MagCache (arXiv 2506.09045). The rule is the joint one of AI-Hypercomputer/maxdiffusion,
//! pipelines/wan/wan_pipeline_2_2.py: one decision for both halves of the guidance, and a fresh start at the change of experts.

pub mod skips;
mod table;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use skips::Skips;
pub use table::{Made, Table};

use crate::error::{Error, Result};

/// When a step may be skipped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MagCache {
    /// The error that may gather before a step is computed again.
    pub threshold: f64,
    /// The most steps that are skipped in a row.
    pub most: usize,
    /// The share of the first steps of each network that is always computed.
    pub retention: f64,
}

/// The settings as a recipe writes them: `"E012K2R20"`, or each by its name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "a preset such as \"E012K2R20\", or { threshold = 0.12, most = 2, retention = 0.2 }"
)]
pub enum CacheConfig {
    /// As MagCache's authors write it.
    Preset(String),
    /// One by one.
    Values(CacheValues),
}

/// The settings of MagCache by name.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheValues {
    /// The error that may gather before a step is computed again, above 0; 0.06 to 0.24 are common.
    pub threshold: f64,
    /// The most steps that are skipped in a row, 1 at least; 2 to 6 are common.
    pub most: usize,
    /// The share of the first steps of each network that is always computed, 0 to 1; 0.2 is common.
    pub retention: f64,
}

impl CacheConfig {
    /// The settings, checked.
    ///
    /// # Errors
    /// Text that is no preset, and numbers out of bounds.
    pub fn settle(&self, key: &str) -> Result<MagCache> {
        let refuse = |why: String| Error::Setting { key: key.to_owned(), why };
        let CacheValues { threshold, most, retention } = match self {
            Self::Preset(text) => preset(text).ok_or_else(|| {
                refuse(format!(
                    "\"{text}\" is not a MagCache preset; write E, K and R such as \"E012K2R20\": threshold 0.12, at most 2 \
                     steps in a row, the first 20 % always computed"
                ))
            })?,
            Self::Values(values) => *values,
        };
        let is_positive = threshold.is_finite() && threshold > 0.0;
        match is_positive && most > 0 && (0.0..=1.0).contains(&retention) {
            true => Ok(MagCache { threshold, most, retention }),
            false => Err(refuse(format!(
                "threshold {threshold}, {most} steps in a row, retention {retention}: the threshold must be above 0, at least 1 \
                 step in a row may be skipped, and the retention lies between 0 and 1"
            ))),
        }
    }
}

impl FromStr for CacheConfig {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        Ok(Self::Preset(text.to_owned()))
    }
}

impl fmt::Display for MagCache {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { threshold, most, retention } = self;
        write!(f, "MagCache: threshold {threshold}, at most {most} steps in a row, retention {retention}")
    }
}

/// Reads `E012K2R20`. The point of a number stands behind its first digit (E012 is 0.12, R02 is 0.2); where that digit is not
/// 0 all digits are decimals (R20 is 0.20). A point that is written stands where it is.
fn preset(text: &str) -> Option<CacheValues> {
    let rest = text.strip_prefix(['E', 'e'])?;
    let (threshold, rest) = rest.split_once(['K', 'k'])?;
    let (most, retention) = rest.split_once(['R', 'r'])?;
    let decimal = |digits: &str| -> Option<f64> {
        let is_number = digits.chars().all(|c| c.is_ascii_digit() || c == '.');
        match digits.strip_prefix('0') {
            _ if digits.is_empty() || !is_number => None,
            _ if digits.contains('.') => digits.parse().ok(),
            Some("") => Some(0.0),
            Some(decimals) => format!("0.{decimals}").parse().ok(),
            None => format!("0.{digits}").parse().ok(),
        }
    };
    Some(CacheValues {
        threshold: decimal(threshold)?,
        most: most.parse().ok()?,
        retention: decimal(retention)?,
    })
}

/// Which half of the guidance runs in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Halves {
    /// The prompt alone: the guidance is 1.
    Cond,
    /// The prompt and the negative prompt.
    Both,
}

/// The steps that are skipped of those of a clip, from 0, in order. `table` has a row for each step; the expert for high noise
/// makes the first `high` of them, which is 0 where there is one network; `halves` says what runs before and from there on.
pub fn skipped(settings: &MagCache, table: &Table, high: usize, halves: [Halves; 2]) -> Vec<usize> {
    let steps = table.cond.len();
    let kept = |count: usize| (count as f64 * settings.retention) as usize;
    let (mut skipped, mut state) = (Vec::new(), None::<State>);
    for step in 0..steps {
        if step == high {
            state = None;
        }
        let (first, count) = if step < high { (0, high) } else { (high, steps - high) };
        let is_forced = step < first + kept(count);
        let Some(known) = state.filter(|_| !is_forced) else {
            // A computed step leaves a residual; one that had to be computed leaves the sums as they are.
            state = Some(state.unwrap_or_default());
            continue;
        };
        let halves = if step < high { halves[0] } else { halves[1] };
        let next = known.after([table.cond[step], table.uncond[step]], halves);
        let is_small = next.error.iter().all(|error| *error < settings.threshold);
        state = Some(match is_small && known.count < settings.most {
            true => {
                skipped.push(step);
                next
            }
            false => State::default(),
        });
    }
    skipped
}

/// What gathered since the last computed step.
#[derive(Debug, Clone, Copy)]
struct State {
    ratio: [f64; 2],
    error: [f64; 2],
    count: usize,
}

impl Default for State {
    fn default() -> Self {
        Self { ratio: [1.0; 2], error: [0.0; 2], count: 0 }
    }
}

impl State {
    fn after(&self, row: [f64; 2], halves: Halves) -> Self {
        let mut next = Self { count: self.count + 1, ..*self };
        let running = if halves == Halves::Both { 2 } else { 1 };
        for ((ratio, error), value) in next.ratio.iter_mut().zip(&mut next.error).zip(row).take(running) {
            *ratio *= value;
            *error += (1.0 - *ratio).abs();
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_read_as_their_authors_write_them() {
        let read = |text: &str| preset(text).map(|v| (v.threshold, v.most, v.retention));
        assert_eq!(read("E012K2R20"), Some((0.12, 2, 0.2)));
        assert_eq!(read("E012K2R02"), Some((0.12, 2, 0.2)));
        assert_eq!(read("E006K2R04"), Some((0.06, 2, 0.4)));
        assert_eq!(read("E024K6R10"), Some((0.24, 6, 0.1)));
        assert_eq!(read("E0.125K3R0.25"), Some((0.125, 3, 0.25)));
        for wrong in
            ["", "E012", "E012K2", "K2R20", "E012KxR20", "E-1K2R20", "E012K2R", "E1eK2R20", "E012K2R20 "]
        {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }
}
