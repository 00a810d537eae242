//! `tandem best`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use crate::plan::Plan;
use crate::report::history::History;
use crate::report::scores::{Scored, scored};
use crate::report::{self, Facts};
use crate::watch::ui::Ui;

/// Rank the checkpoints of a run by their held-out loss, and write its report anew.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Best {
    /// The folder of the run.
    run: PathBuf,
}

const EXAMPLES: &str = "\
Examples:
  tandem best runs/my
  tandem best runs/my --json          # with the files of each step

The band is two standard errors of the change of the held-out loss since the first measurement. Of checkpoints that differ by less
than it the held-out loss does not tell which is better: look at their clips.";

impl Best {
    /// Prints the ranking.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let plan = Plan::read(&self.run.join("plan.toml"))?;
        let history = History::read(&self.run.join("metrics.jsonl"))?;
        let ranked = scored(&self.run, &history)?;
        let made = history.steps.last().map_or(0, |row| row.step);
        let state = format!("step {made} of {}", plan.train.steps);
        let report = report::write(&self.run, &plan, &Facts { state, ..Facts::default() })?;
        let mut text = String::new();
        if history.held_out.is_empty() {
            text.push_str(
                "nothing is held out, so there is no loss to rank by: data.held_out names clips for it\n",
            );
        }
        ranked.iter().for_each(|one| text.push_str(&in_words(one)));
        text.push_str(&format!("report: {}", report.display()));
        ui.tell(&text, &json!({ "steps": ranked, "report": report }));
        Ok(0)
    }
}

fn in_words(one: &Scored) -> String {
    let loss = one
        .held_out
        .map_or_else(String::new, |(loss, band)| format!("  held-out loss {loss:.5} +- {band:.5}"));
    let near = if one.is_near_best { "  (within the band of the least)" } else { "" };
    let mut text = format!("step {:>6}{loss}{near}\n", one.step);
    let files = one.contact_sheet.iter().chain(&one.adapters).chain(&one.checkpoint);
    files.for_each(|path| text.push_str(&format!("    {}\n", path.display())));
    text
}
