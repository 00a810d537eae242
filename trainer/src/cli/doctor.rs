//! `tandem doctor`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::tools::doctor::{Standing, examine};
use crate::watch::ui::Ui;

/// Show what this machine offers, which engines will run, what is missing and how to get it.
///
/// Exits with 2 if something prevents runs (marked !!); what is merely missing (marked --) is not a failure.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Doctor {
    /// The folder that runs would be written to.
    #[arg(long, default_value = "runs")]
    runs: PathBuf,
}

const EXAMPLES: &str = "\
Examples:
  tandem doctor
  tandem doctor --runs /data/runs   # whether runs can be written there";

impl Doctor {
    /// Reports every finding; returns 2 if one of them prevents runs.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let findings = examine(&self.runs);
        for finding in &findings {
            let mark = match finding.standing {
                Standing::Good => "ok",
                Standing::Missing => "--",
                Standing::Bad => "!!",
            };
            let mut line = format!("{mark} {:<12} {}", finding.what, finding.found);
            if let Some(way_out) = &finding.way_out {
                line.push_str(&format!("\n   {:<12} -> {way_out}", ""));
            }
            ui.tell(&line, &serde_json::to_value(finding)?);
        }
        let is_broken = findings.iter().any(|finding| finding.standing == Standing::Bad);
        Ok(if is_broken { 2 } else { 0 })
    }
}
