//! `tandem average`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use models::Expert;
use models::adapter::average;
use models::adapter::files::{self, AdapterFile};

use super::adapter_output::{AdapterOutput, expert, note_expert};
use super::export::expert_of;
use crate::error::Error;
use crate::plan::Plan;
use crate::train::export::of_checkpoint;
use crate::watch::ui::Ui;

/// Average adapters of several steps of one run: often better than any of them, where the loss moves up and down.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Average {
    /// Adapter files of one run, or files of its `checkpoints` folder.
    #[arg(required = true, num_args = 2.., value_name = "ADAPTER")]
    inputs: Vec<PathBuf>,
    /// The file to write; a folder with --format peft.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// What each counts for, in the order of the adapters; alike unless given.
    #[arg(long, value_delimiter = ',', value_name = "NUMBERS")]
    weights: Vec<f64>,
    /// Which expert's adapter of checkpoints of both.
    #[arg(long, value_parser = expert())]
    expert: Option<Expert>,
    #[command(flatten)]
    how: AdapterOutput,
}

const EXAMPLES: &str = "\
Examples:
  tandem average runs/cat/adapters/cat_step-000750.safetensors runs/cat/adapters/cat_step-001000.safetensors --output cat-mean.safetensors
  tandem average runs/cat/checkpoints/step-000750.safetensors runs/cat/checkpoints/step-001000.safetensors --output cat-mean.safetensors
  tandem average a.safetensors b.safetensors --weights 1,3 --output mean.safetensors

The factors are averaged, not their products, so the adapters must be of one run. train.ema keeps an average while it trains.";

impl Average {
    /// Writes the average and verifies it by reading it back.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let inputs: Vec<&Path> = self.inputs.iter().map(PathBuf::as_path).collect();
        self.how.check_output(&self.output, &inputs)?;
        let weights = match self.weights.len() {
            0 => vec![1.0; inputs.len()],
            count if count == inputs.len() => self.weights.clone(),
            count => {
                let why = format!("has {count} numbers for {} adapters", inputs.len());
                return Err(Error::Setting { key: "--weights".into(), why }.into());
            }
        };
        let adapters = inputs.iter().zip(weights).map(|(path, weight)| Ok((self.read(path, ui)?, weight)));
        let mut mean = average(&adapters.collect::<Result<Vec<_>>>()?).map_err(Error::from)?;
        if let Some(note) = note_expert(&mut mean, &self.output, self.expert) {
            ui.note(&note);
        }
        let (text, object) = self.how.write(&self.output, &mean)?;
        ui.tell(&text, &object);
        Ok(0)
    }

    fn read(&self, path: &Path, ui: &Ui) -> Result<AdapterFile> {
        if let Some(folder) = path.parent().filter(|folder| folder.ends_with("checkpoints")) {
            let plan = Plan::read(&folder.with_file_name("plan.toml"))?;
            return Ok(of_checkpoint(path, expert_of(self.expert, &plan)?, self.how.format)?);
        }
        let adapter = files::read(path).map_err(Error::from)?;
        adapter.notes.iter().for_each(|note| ui.note(note));
        Ok(adapter)
    }
}
