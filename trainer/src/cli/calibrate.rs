//! `tandem calibrate`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use models::vae::Tiling;

use super::sample::{Done, Sample};
use crate::error::Error;
use crate::machine::forecast::Residuals;
use crate::sample::Course;
use crate::sample::magcache::{Made, Table, skips::high_steps};
use crate::watch::ui::Ui;

/// Measure a MagCache table for a model with its adapters, from the steps of one clip.
///
/// The clip is made with the same options as by `sample`, without the VAE. The table is for that model, adapter, shift and
/// guidance; it serves other prompts and numbers of steps.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Calibrate {
    #[command(flatten)]
    sample: Sample,
    /// File of the table. Default: next to the adapter, in the folder of the run, or in the model's.
    #[arg(long, value_name = "FILE")]
    table: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  tandem calibrate runs/cat
  tandem calibrate --model Wan2.1-T2V-14B --lora cat.safetensors --prompt \"a cat on a roof\"";

impl Calibrate {
    /// Measures the table.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let (sample, ui) = (&self.sample, &ui.with_phases());
        let mut job = sample.job(ui)?;
        job.requests.truncate(1);
        let named = self.table.clone().or_else(|| sample.tables(&job).into_iter().next());
        let missing = || Error::Setting { key: "--table".into(), why: "names no file".into() };
        let path = named.ok_or_else(missing)?;
        sample.force().check(&path, "--table")?;
        sample.find_networks(&mut job, ui)?;
        sample.lay(&mut job, (Residuals::Measured, Tiling::Off, None), ui)?;
        if !sample.is_worth_it(&job, None, ui)? {
            ui.note("nothing was measured");
            return Ok(0);
        }
        let (request, boundary) = (job.requests[0].clone(), job.model.clip_boundary(&job.basis.dit));
        let adapters = job.networks.iter().flat_map(|network| &network.adapters);
        let adapters = adapters.map(|adapter| adapter.name.clone()).collect();
        let made = Made::with(&job.model, adapters, &request);
        let Done { stepped, .. } =
            sample.steps(job, Course { measured: Some(0), ..Course::default() }, ui)?;
        let steps = request.schedule()?.steps();
        let table = Table::measured(&stepped.changes, steps, high_steps(&request, boundary)?, made);
        table.write(&path)?;
        let text = format!("{}: a table of {steps} steps", path.display());
        ui.tell(&text, &serde_json::json!({ "table": path, "steps": steps }));
        Ok(0)
    }
}
