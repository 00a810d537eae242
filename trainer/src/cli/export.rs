//! `tandem export`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use models::adapter::files::{self, AdapterFile, Style};
use models::expert::Expert;

use super::adapter_output::{AdapterOutput, expert};
use crate::error::Error;
use crate::learning::Share;
use crate::plan::Plan;
use crate::train::export::of_checkpoint;
use crate::watch::ui::Ui;

/// Write an adapter in another format: from an adapter file, or from a checkpoint of a run.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Export {
    /// An adapter file in any style, or a file of a run's `checkpoints` folder.
    input: PathBuf,
    /// The file to write; a folder with --format peft.
    output: PathBuf,
    /// Of a checkpoint that holds the adapters of both experts, which one.
    #[arg(long, value_parser = expert())]
    expert: Option<Expert>,
    #[command(flatten)]
    how: AdapterOutput,
}

const EXAMPLES: &str = "\
Examples:
  tandem export runs/cat/adapters/cat.safetensors cat-kohya.safetensors --format kohya
  tandem export runs/cat/checkpoints/step-000250.safetensors cat-250.safetensors
  tandem export runs/cat/checkpoints/step-000250.safetensors cat_high_noise.safetensors --expert high";

impl Export {
    /// Writes the file and compares what it reads back.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        self.how.check_output(&self.output, &[&self.input])?;
        let adapter = self.adapter(self.how.format)?;
        let (text, object) = self.how.write(&self.output, &adapter)?;
        ui.tell(&text, &object);
        Ok(0)
    }

    /// The adapter of the input, with its header.
    fn adapter(&self, style: Style) -> crate::Result<AdapterFile> {
        let Some(folder) = self.input.parent().filter(|folder| folder.ends_with("checkpoints")) else {
            return Ok(files::read(&self.input)?);
        };
        let plan = Plan::read(&folder.with_file_name("plan.toml"))?;
        of_checkpoint(&self.input, self.expert_of(&plan)?, style)
    }

    /// The expert whose adapter is written: the one that is asked for, else the only one that the run trains.
    fn expert_of(&self, plan: &Plan) -> crate::Result<Option<Expert>> {
        let refuse = |why: &str| Err(Error::Setting { key: "--expert".into(), why: why.into() });
        let trained: Vec<Expert> = plan.shares().into_iter().filter_map(Share::expert).collect();
        match (self.expert, trained.as_slice()) {
            (None, [_, _]) => {
                refuse("this checkpoint holds the adapters of both experts; say `high` or `low`")
            }
            (Some(asked), trained) if !trained.contains(&asked) => {
                refuse(&format!("the run of this checkpoint does not train the expert for {asked} noise"))
            }
            (asked, trained) => Ok(asked.or(trained.first().copied())),
        }
    }
}
