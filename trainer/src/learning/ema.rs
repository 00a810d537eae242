//! The `[train.ema]` section of a recipe: an exponential moving average of the adapters.

use kernels::{Result, Tensor};
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// An exponential moving average of the adapters, kept in f32 beside them from the first step on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EmaConfig {
    /// Share of the average that stays in a step, at least 0 and below 1, such as 0.99. Default 0: no average is kept.
    pub decay: f64,
    /// Whether clips and held-out losses are made with the average. Default true.
    pub clips: bool,
    /// Whether adapter files hold the average. Default true.
    pub files: bool,
}

impl Default for EmaConfig {
    fn default() -> Self {
        Self { decay: 0.0, clips: true, files: true }
    }
}

impl EmaConfig {
    /// Checks the values.
    ///
    /// # Errors
    /// Naming the key and what it must be.
    pub fn check(&self) -> crate::Result<()> {
        let refuse = |key: &str, why: String| Err(Error::Setting { key: format!("train.ema.{key}"), why });
        if !(0.0..1.0).contains(&self.decay) {
            return refuse("decay", format!("{} must be at least 0 and below 1", self.decay));
        }
        match self.is_kept() {
            true if !self.clips && !self.files => {
                refuse("decay", "nothing uses the average: leave it out, or set clips or files".into())
            }
            false if !self.clips || !self.files => {
                let key = if self.clips { "files" } else { "clips" };
                refuse(key, "there is no average: set train.ema.decay".into())
            }
            _ => Ok(()),
        }
    }

    /// Whether there is an average.
    pub fn is_kept(&self) -> bool {
        self.decay > 0.0
    }
}

/// `average - (1 - decay) (average - parameter)`.
///
/// # Errors
/// A device that fails.
pub fn step(average: &Tensor, parameter: &Tensor, decay: f64) -> Result<Tensor> {
    average - ((average - parameter)? * (1.0 - decay))?
}
