//! `tandem doctor`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::doctor::{Standing, examine};
use crate::ui::Ui;

/// Say what this machine offers, which engines will run, what is missing and how to get it.
#[derive(Debug, Args)]
pub struct Doctor {
    /// The folder that runs would be written to.
    #[arg(long, default_value = "runs")]
    runs: PathBuf,
}

impl Doctor {
    /// Tells every finding.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        for finding in examine(&self.runs) {
            let mark = match finding.standing {
                Standing::Good => "ok",
                Standing::Missing => "--",
                Standing::Bad => "!!",
            };
            let mut line = format!("{mark} {:<12} {}", finding.what, finding.found);
            if let Some(way_out) = &finding.way_out {
                line.push_str(&format!("\n   {:<12} -> {way_out}", ""));
            }
            ui.tell(&line, &serde_json::to_value(&finding)?);
        }
        Ok(0)
    }
}
