//! `tandem convert`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use models::Expert;
use models::adapter::complete;
use models::adapter::files::{self, AdapterFile};

use super::adapter_output::{AdapterOutput, expert, tell_expert};
use super::base_dit::BaseDit;
use crate::error::Error;
use crate::watch::ui::Ui;

/// Write an adapter file in another format.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Convert {
    /// An adapter in any format, a file or a PEFT folder.
    input: PathBuf,
    /// The file to write; a folder with --format peft.
    output: PathBuf,
    #[command(flatten)]
    how: AdapterOutput,
    /// Multiply what the adapter does by this, so that strength 1 of the new file is this strength of the old one.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    strength: f64,
    /// The expert of a two-expert model that it was made for, where the file does not say so.
    #[arg(long, value_parser = expert())]
    expert: Option<Expert>,
    /// The model that it was made for, a folder or a DiT's file: a DoRA needs it to go from PEFT's rule to ComfyUI's or back.
    #[arg(long, value_name = "PATH")]
    base: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  tandem convert style.safetensors style-peft --format peft
  tandem convert style.safetensors style-half.safetensors --strength 0.5
  tandem convert style.safetensors style_low_noise.safetensors --expert low --format kohya";

impl Convert {
    /// Writes the file and compares what it reads back.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        if !self.strength.is_finite() || self.strength == 0.0 {
            let why = format!("{} is not a finite number other than 0", self.strength);
            return Err(Error::Setting { key: "--strength".into(), why }.into());
        }
        self.how.check_output(&self.output, &[&self.input])?;
        let mut adapter = files::read(&self.input).map_err(Error::from)?;
        adapter.notes.iter().for_each(|note| ui.note(note));
        if let Some(note) = tell_expert(&mut adapter, &self.output, self.expert) {
            ui.note(&note);
        }
        if let Some(base) = &self.base {
            let (_, weights) = BaseDit::open(base, self.expert)?;
            complete(&mut adapter, &weights).map_err(Error::from)?;
        }
        strengthen(&mut adapter, self.strength)?;
        let (text, object) = self.how.write(&self.output, &adapter)?;
        ui.tell(&text, &object);
        Ok(0)
    }
}

/// Multiplies everything that `adapter` adds by `strength`.
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
