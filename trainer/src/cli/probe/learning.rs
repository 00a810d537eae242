//! The probes of optimisers, losses, learning rates and noise levels.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::{Files, finish};
use crate::tools::probe::{self, Inputs, loss, optimizer};
use crate::watch::ui::Ui;

/// A case of a file of cases, and the tensors.
#[derive(Debug, Args)]
pub(super) struct OptimizerProbe {
    /// JSON: `{"cases": {"NAME": {"kind": "lion", "lr": 1e-4, ...}}}`, with kind `adamw`, `adamw8bit`, `lion`, `adafactor`,
    /// `schedulefree`, `prodigy`, `came` or `muon` and the settings of the optimiser's own package. Moments in 8 bits read
    /// `p0_8bit.N` and `grad_8bit.N`.
    #[arg(long, value_name = "FILE")]
    cases: PathBuf,
    /// The case.
    #[arg(long, value_name = "NAME")]
    case: String,
    #[command(flatten)]
    files: Files,
}

/// A file of cases whose answer is printed.
#[derive(Debug, Args)]
pub(super) struct CasesProbe {
    /// JSON, in the form of what is printed. Of `schedule` `{"params": {"lr": 1e-3, "steps": 100, "warmup": 10, ...}}`, of `timesteps`
    /// `{"u": [...], "n": [...], "cases": [{"name": "mode", "input": "u", "params": {"scale": 1.29}}]}`.
    #[arg(long, value_name = "FILE")]
    pub cases: PathBuf,
}

/// A file of cases and the tensors; the losses are printed.
#[derive(Debug, Args)]
pub(super) struct LossProbe {
    /// JSON: `{"params": {"huber_delta": 0.5, ...}, "losses": {"huber.clamp.sample": 0}}` with the settings and the cases:
    /// a loss, its weights (nomask, clamp, lerp, outside0) and the reduction (none, sample, batch).
    #[arg(long, value_name = "FILE")]
    cases: PathBuf,
    #[command(flatten)]
    files: Files,
}

impl LossProbe {
    /// Writes the gradients and prints the losses.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let (object, outputs) = loss::run(&self.cases, &Inputs::open(&self.files.input)?)?;
        probe::write(&self.files.output, &outputs)?;
        print(&object, ui)
    }
}

impl OptimizerProbe {
    /// Runs the case and writes its outputs.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let case = optimizer::Case::read(&self.cases, &self.case)?;
        finish(&self.files.output, &case.run(&Inputs::open(&self.files.input)?)?, ui)
    }
}

/// Prints JSON.
pub(super) fn print(object: &serde_json::Value, ui: &Ui) -> Result<u8> {
    ui.tell(&object.to_string(), object);
    Ok(0)
}
