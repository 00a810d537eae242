//! Tables of MagCache: how the magnitude of the residual changes from step to step, measured on one clip.

use std::path::Path;

use models::published::Magnitudes;
use serde::{Deserialize, Serialize};

use crate::base::BaseModel;
use crate::encode::prompt::ClipRequest;
use crate::error::{Error, Result};
use crate::pipeline::Change;
use crate::sample::Half;
use crate::solver::SolverKind;

/// What a table was measured with, as far as it is known.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Made {
    /// The model.
    pub model: String,
    /// Its adapters, by file name.
    #[serde(default)]
    pub adapters: Vec<String>,
    /// Shift of the sigmas.
    pub shift: f64,
    /// Guidance scale of the network, and of the expert for high noise.
    pub guidance: [f64; 2],
    /// The solver.
    pub solver: SolverKind,
}

impl Made {
    /// With `model` and `adapters`, on the clip of `request`.
    pub fn with(model: &BaseModel, adapters: Vec<String>, request: &ClipRequest) -> Self {
        Self {
            model: model.dits.of(models::Expert::High).weights.display().to_string(),
            adapters,
            shift: request.shift,
            guidance: [request.guidance, request.guidance_high],
            solver: request.solver,
        }
    }
}

/// The mean ratio of the residual's norm to that of the step before, for each solver step and half of the guidance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// With the prompt; the first is 1.
    pub cond: Vec<f64>,
    /// With the negative prompt; the first is 1.
    pub uncond: Vec<f64>,
    /// Steps of them that the expert for high noise made, of two experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub high_steps: Option<usize>,
    /// What it was measured with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made: Option<Made>,
}

impl From<&Magnitudes> for Table {
    fn from(known: &Magnitudes) -> Self {
        let (cond, uncond) = (known.cond.to_vec(), known.uncond.to_vec());
        Self { cond, uncond, high_steps: known.high_steps, made: None }
    }
}

impl Table {
    /// What was measured of a clip of `steps` steps: by step and half, the ratio to the step before.
    pub fn measured(
        changes: &[(usize, Half, Change)],
        steps: usize,
        high_steps: Option<usize>,
        made: Made,
    ) -> Self {
        let mut table =
            Self { cond: vec![1.0; steps], uncond: vec![1.0; steps], high_steps, made: Some(made) };
        let is_guided = changes.iter().any(|(_, half, _)| *half == Half::Negative);
        for (step, half, change) in changes {
            // As many digits as the published tables have.
            let ratio = (change.ratio * 1e5).round() / 1e5;
            match half {
                Half::Positive => table.cond[*step] = ratio,
                Half::Negative => table.uncond[*step] = ratio,
            }
        }
        if !is_guided {
            table.uncond.clone_from(&table.cond);
        }
        table
    }

    /// Reads the table at `path`.
    ///
    /// # Errors
    /// A file that is no table.
    pub fn read(path: &Path) -> Result<Self> {
        let refuse = |why: String| Error::MagCacheTable { what: path.display().to_string(), why };
        let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
        let table: Self = serde_json::from_str(&text).map_err(|error| refuse(error.to_string()))?;
        match table.fault() {
            Some(why) => Err(refuse(why)),
            None => Ok(table),
        }
    }

    /// Writes it to `path`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(|error| Error::MagCacheTable {
            what: path.display().to_string(),
            why: error.to_string(),
        })?;
        data::atomic::write(path, |file| std::io::Write::write_all(file, text.as_bytes()))
            .map_err(|source| Error::Io { action: "write", path: path.to_owned(), source })
    }

    /// What is wrong with its numbers.
    fn fault(&self) -> Option<String> {
        let steps = self.cond.len();
        let is_ratio = |value: &f64| value.is_finite() && *value > 0.0;
        match () {
            () if steps == 0 || self.uncond.len() != steps => {
                Some(format!("`cond` has {steps} steps and `uncond` {}", self.uncond.len()))
            }
            () if !self.cond.iter().chain(&self.uncond).all(is_ratio) => {
                Some("its ratios are not all positive numbers".to_owned())
            }
            () if self.high_steps.is_some_and(|high| high > steps) => {
                Some("`high_steps` is more than the steps that it has".to_owned())
            }
            () => None,
        }
    }

    /// The table for `steps` steps, the first `high` of them by the expert for high noise: each expert's part by itself, the
    /// nearest row of the old ones for each new one. `high` is nothing where there is one network.
    ///
    /// # Errors
    /// A table of one network for two, or of two for one, and one without rows for an expert.
    pub fn fitted(&self, steps: usize, high: Option<usize>) -> Result<Self> {
        let refuse = |why: &str| Error::MagCacheTable { what: "the table".to_owned(), why: why.to_owned() };
        let own = self.cond.len();
        let rows = match (self.high_steps, high) {
            (None, None) => nearest(0..own, steps),
            (Some(own_high), Some(high)) => {
                if (high > 0 && own_high == 0) || (high < steps && own_high == own) {
                    return Err(refuse("it has no steps of an expert that the clip goes through"));
                }
                [nearest(0..own_high, high), nearest(own_high..own, steps - high)].concat()
            }
            (None, Some(_)) => return Err(refuse("it is of one network, and this model has two experts")),
            (Some(_), None) => return Err(refuse("it is of two experts, and this model is one network")),
        };
        let of = |column: &[f64]| rows.iter().map(|row| column[*row]).collect();
        Ok(Self { cond: of(&self.cond), uncond: of(&self.uncond), high_steps: high, made: self.made.clone() })
    }
}

/// The nearest of `rows` for each of `count` evenly spaced ones, halves to the even row, as numpy rounds.
fn nearest(rows: std::ops::Range<usize>, count: usize) -> Vec<usize> {
    let step = match count {
        0 | 1 => 0.0,
        _ => (rows.len().saturating_sub(1)) as f64 / (count - 1) as f64,
    };
    (0..count).map(|i| rows.start + (i as f64 * step).round_ties_even() as usize).collect()
}
