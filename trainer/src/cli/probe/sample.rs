//! A whole sampling loop.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use models::adapter::Adapters;

use super::{DitModel, Files};
use crate::cli::fetch::on_this_machine;
use crate::cli::precision::ProbePrecision;
use crate::tools::probe::{self, Inputs};
use crate::watch::ui::Ui;

/// `tandem probe sample`.
#[derive(Debug, Args)]
pub(super) struct SampleProbe {
    /// The DiT, or the expert for low noise: its folder or file.
    #[arg(long, value_name = "DIR_OR_FILE", value_parser = on_this_machine)]
    dit: PathBuf,
    /// The expert for high noise.
    #[arg(long, value_name = "DIR_OR_FILE", value_parser = on_this_machine)]
    dit_high: Option<PathBuf>,
    /// JSON with steps, shift, solver (or rule), guidance, boundary or first_low_step, threshold, K, retention; or sigmas and
    /// timesteps in place of steps and shift.
    #[arg(long, value_name = "FILE")]
    settings: PathBuf,
    /// Use this object of the settings file.
    #[arg(long, value_name = "NAME")]
    case: Option<String>,
    /// Devices of the stages, such as cpu,cpu.
    #[arg(long, value_delimiter = ',')]
    stages: Vec<String>,
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    precision: ProbePrecision,
}

impl SampleProbe {
    pub(super) fn run(&self, ui: &Ui) -> Result<u8> {
        let inputs = Inputs::open(&self.files.input)?;
        let settings = probe::sample::Settings::read(&self.settings, self.case.as_deref())?;
        let network = |path: &PathBuf| {
            let model = DitModel {
                model: path.clone(),
                config: None,
                device: None,
                stages: self.stages.clone(),
                precision: self.precision.clone(),
            };
            let (config, weights) = model.open()?;
            model.pipeline(&config, &weights, &Adapters::default())
        };
        let paths = self.dit_high.iter().chain([&self.dit]);
        let networks = paths.map(network).collect::<crate::Result<Vec<_>>>()?;
        let (outputs, skipped) = probe::sample::run(&networks, &inputs, &settings)?;
        probe::write(&self.files.output, &outputs)?;
        let text = format!("{}: {} steps skipped: {skipped:?}", self.files.output.display(), skipped.len());
        ui.tell(&text, &serde_json::json!({ "output": self.files.output, "skipped": skipped }));
        Ok(0)
    }
}
