//! The `[train.loss]` section of a recipe: what an error counts for.
//!
//! The error is prediction - target of one element. Sources: torch (`huber`, `smooth-l1`), ai-toolkit `SDTrainer.py` (`pseudo-huber`),
//! sd-scripts `train_util.py` (`scale` and the schedules of `c`), SimpleTuner `models/common.py` (`snr-simpletuner`).

use kernels::loss::Penalty;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What an error counts for.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LossConfig {
    /// `mse`, `l1`, `huber`, `smooth-l1` or `pseudo-huber`. Default `mse`.
    pub kind: LossKind,
    /// The error from which `huber`, `smooth-l1` (delta, beta) and `pseudo-huber` (c) grow evenly, above 0. Default 1, with
    /// `pseudo-huber` 0.01.
    pub c: Option<f64>,
    /// How `c` changes with sigma: `constant`, `exponential`, `snr` or `snr-simpletuner`. Default `constant`.
    pub c_schedule: Option<CSchedule>,
    /// Factor of `pseudo-huber`: `none`, or sd-scripts' `2c` (which it calls huber) or `2` (smooth_l1). Default `none`.
    pub scale: Option<LossScale>,
}

/// A loss by its name in a recipe.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossKind {
    /// `e^2`.
    #[default]
    Mse,
    /// `|e|`.
    L1,
    /// `e^2 / 2` up to `|e| = c`, `c (|e| - c / 2)` beyond.
    Huber,
    /// `e^2 / (2c)` up to `|e| = c`, `|e| - c / 2` beyond.
    SmoothL1,
    /// `sqrt(e^2 + c^2) - c`.
    PseudoHuber,
}

/// How `c` changes with sigma, from `c` itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CSchedule {
    /// Not at all.
    #[default]
    Constant,
    /// `c^sigma`.
    Exponential,
    /// `(1 - c) (1 - sigma)^2 + c`: smaller with noise.
    Snr,
    /// `(1 - c) / (1 + sqrt((1 - sigma) / (sigma + 1e-4)))^2 + c`, as SimpleTuner has it: larger with noise.
    SnrSimpletuner,
}

/// Factor of the pseudo-Huber loss.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum LossScale {
    /// 1.
    #[default]
    #[serde(rename = "none")]
    None,
    /// `2c`, so that small errors are squared.
    #[serde(rename = "2c")]
    TwoC,
    /// 2.
    #[serde(rename = "2")]
    Two,
}

impl LossKind {
    /// Its name in a recipe.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mse => "mse",
            Self::L1 => "l1",
            Self::Huber => "huber",
            Self::SmoothL1 => "smooth-l1",
            Self::PseudoHuber => "pseudo-huber",
        }
    }
}

impl CSchedule {
    /// `c` at `sigma`.
    pub fn at(self, c: f64, sigma: f64) -> f64 {
        let snr = |ratio: f64| (1.0 - c) / (1.0 + ratio).powi(2) + c;
        match self {
            Self::Constant => c,
            Self::Exponential => c.powf(sigma),
            // The ratio of noise to signal is sigma / (1 - sigma).
            Self::Snr => (1.0 - c) * (1.0 - sigma).powi(2) + c,
            Self::SnrSimpletuner => snr(((1.0 - sigma) / (sigma + 1e-4)).sqrt()),
        }
    }
}

impl LossConfig {
    /// Checks the values, and that each belongs to the loss.
    ///
    /// # Errors
    /// Naming the key and what it must be.
    pub fn check(&self) -> Result<()> {
        let name = self.kind.name();
        let refuse = |key: &str, why: String| Err(Error::Setting { key: format!("train.loss.{key}"), why });
        if let Some(c) = self.c.filter(|c| !c.is_finite() || *c <= 0.0) {
            return refuse("c", format!("{c} must be above 0"));
        }
        if !self.penalty().has_scale() && (self.c.is_some() || self.c_schedule.is_some()) {
            let key = if self.c.is_some() { "c" } else { "c_schedule" };
            let why = "has no such setting, it is one of huber, smooth-l1, pseudo-huber";
            return refuse(key, format!("{name} {why}"));
        }
        if self.kind != LossKind::PseudoHuber && self.scale.is_some() {
            return refuse("scale", format!("{name} has no such setting, it is one of pseudo-huber"));
        }
        let changes = self.c_schedule.is_some_and(|schedule| schedule != CSchedule::Constant);
        if changes && self.c() > 1.0 {
            return refuse("c", format!("{} must be at most 1 where it changes with sigma", self.c()));
        }
        Ok(())
    }

    /// `c`, settled.
    fn c(&self) -> f64 {
        self.c.unwrap_or(if self.kind == LossKind::PseudoHuber { 0.01 } else { 1.0 })
    }

    /// What an error counts for, without its factor.
    pub fn penalty(&self) -> Penalty {
        match self.kind {
            LossKind::Mse => Penalty::Squared,
            LossKind::L1 => Penalty::Absolute,
            LossKind::Huber | LossKind::SmoothL1 => Penalty::Huber,
            LossKind::PseudoHuber => Penalty::PseudoHuber,
        }
    }

    /// The scale of the errors of a sample at `sigma`; 1 where the penalty has none.
    pub fn scale_at(&self, sigma: f64) -> f64 {
        match self.penalty().has_scale() {
            true => self.c_schedule.unwrap_or_default().at(self.c(), sigma),
            false => 1.0,
        }
    }

    /// The factor of the penalty of a sample at `sigma`.
    pub fn factor_at(&self, sigma: f64) -> f64 {
        let c = self.scale_at(sigma);
        match (self.kind, self.scale.unwrap_or_default()) {
            (LossKind::Mse | LossKind::L1, _) => 1.0,
            (LossKind::Huber, _) => c * c,
            (LossKind::SmoothL1, _) | (LossKind::PseudoHuber, LossScale::None) => c,
            (LossKind::PseudoHuber, LossScale::TwoC) => 2.0 * c * c,
            (LossKind::PseudoHuber, LossScale::Two) => 2.0 * c,
        }
    }
}
