//! `tandem export`, also called `convert`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use models::adapter::complete;
use models::adapter::files::{self, AdapterFile};
use models::expert::Expert;

use super::adapter_output::{AdapterOutput, expert, note_expert};
use super::base_dit::BaseDit;
use crate::error::Error;
use crate::learning::NoiseRange;
use crate::plan::Plan;
use crate::train::export::of_checkpoint;
use crate::watch::ui::Ui;

/// Write an adapter in any format: from an adapter file in any other, or from a checkpoint of a run.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Export {
    /// An adapter in any format, a file or a PEFT folder; or a file of a run's `checkpoints` folder.
    input: PathBuf,
    /// The file to write; a folder with --format peft.
    output: PathBuf,
    #[command(flatten)]
    how: AdapterOutput,
    /// Multiply the adapter's effect by this, so that strength 1 of the new file is this strength of the old one.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    strength: f64,
    /// The expert of a two-expert model: which adapter of a checkpoint to write, or which expert a file without that
    /// information is for.
    #[arg(long, value_parser = expert())]
    expert: Option<Expert>,
    /// The model that an adapter file was made for, a folder or a DiT's file: needed to convert a DoRA between PEFT's and
    /// ComfyUI's conventions.
    #[arg(long, value_name = "PATH")]
    base: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  tandem export runs/cat/adapters/cat.safetensors cat-kohya.safetensors --format kohya
  tandem export runs/cat/checkpoints/step-000250.safetensors cat-250.safetensors
  tandem export runs/cat/checkpoints/step-000250.safetensors cat_high_noise.safetensors --expert high
  tandem export style.safetensors style-peft --format peft
  tandem export style.safetensors style-half.safetensors --strength 0.5";

impl Export {
    /// Writes the file and verifies it by reading it back.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        if !self.strength.is_finite() || self.strength == 0.0 {
            let why = format!("{} is not a finite number other than 0", self.strength);
            return Err(Error::Setting { key: "--strength".into(), why }.into());
        }
        self.how.check_output(&self.output, &[&self.input])?;
        let mut adapter = match self.input.parent().filter(|folder| folder.ends_with("checkpoints")) {
            Some(folder) => {
                let plan = Plan::read(&folder.with_file_name("plan.toml"))?;
                of_checkpoint(&self.input, expert_of(self.expert, &plan)?, self.how.format)?
            }
            None => self.adapter(ui)?,
        };
        strengthen(&mut adapter, self.strength)?;
        let (text, object) = self.how.write(&self.output, &adapter)?;
        ui.tell(&text, &object);
        Ok(0)
    }

    /// The adapter of a file.
    fn adapter(&self, ui: &Ui) -> Result<AdapterFile> {
        let mut adapter = files::read(&self.input).map_err(Error::from)?;
        adapter.notes.iter().for_each(|note| ui.note(note));
        if let Some(note) = note_expert(&mut adapter, &self.output, self.expert) {
            ui.note(&note);
        }
        if let Some(base) = &self.base {
            let (_, weights) = BaseDit::open(base, self.expert)?;
            complete(&mut adapter, &weights).map_err(Error::from)?;
        }
        Ok(adapter)
    }
}

/// The expert that is meant in a checkpoint of `plan`'s run, where `asked` is asked for.
///
/// # Errors
/// One that the run does not train, and none where it trains both.
pub(super) fn expert_of(asked: Option<Expert>, plan: &Plan) -> crate::Result<Option<Expert>> {
    let refuse = |why: &str| Err(Error::Setting { key: "--expert".into(), why: why.into() });
    let trained: Vec<Expert> = plan.trained_ranges().into_iter().filter_map(NoiseRange::expert).collect();
    match (asked, trained.as_slice()) {
        (None, [_, _]) => refuse("this checkpoint has the adapters of both experts; give `high` or `low`"),
        (Some(asked), trained) if !trained.contains(&asked) => {
            refuse(&format!("the run of this checkpoint does not train the expert for {asked} noise"))
        }
        (asked, trained) => Ok(asked.or(trained.first().copied())),
    }
}

/// Multiplies the effect of `adapter` by `strength`.
fn strengthen(adapter: &mut AdapterFile, strength: f64) -> Result<()> {
    if strength == 1.0 {
        return Ok(());
    }
    for (module, change) in &mut adapter.modules {
        *change = change.scaled(strength).ok_or_else(|| Error::Setting {
            key: "--strength".into(),
            why: format!("{module} is a DoRA, whose strength cannot be written into a file"),
        })?;
    }
    for difference in adapter.differences.values_mut() {
        *difference = (&*difference * strength)?;
    }
    Ok(())
}
