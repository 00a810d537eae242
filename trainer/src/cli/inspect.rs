//! `tandem inspect`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::fetch::on_this_machine;
use crate::tools::inspect::inspect;
use crate::watch::ui::Ui;

/// Show what an adapter, a checkpoint or a folder is. Only headers are read.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Inspect {
    /// A file, a folder of a model or of a run, or a model of the hub in the cache.
    #[arg(value_parser = on_this_machine)]
    path: PathBuf,
}

const EXAMPLES: &str = "\
Examples:
  tandem inspect style.safetensors
  tandem inspect runs/cat
  tandem inspect Wan-AI/Wan2.1-T2V-14B";

impl Inspect {
    /// Prints what it is.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let report = inspect(&self.path)?;
        let mut object = serde_json::json!({ "path": self.path });
        if let (Some(object), serde_json::Value::Object(found)) = (object.as_object_mut(), report.to_json()) {
            object.extend(found);
        }
        ui.tell(&format!("{}: {report}", self.path.display()), &object);
        Ok(0)
    }
}
