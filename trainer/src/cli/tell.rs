//! `tandem tell`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use crate::train::Asked;
use crate::watch::ui::Ui;

/// Tell a run that is training what to do after its current step: make clips, save, stop, pause, or take another learning rate.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Tell {
    /// The folder of the run.
    run: PathBuf,
    /// `sample` makes the clips of the recipe, `save` a checkpoint with adapter files; `stop` saves and ends as Ctrl-C does;
    /// `pause` holds the run until `continue` or `stop`, with its models on the cards; `lr=5e-5` takes the place of optimizer.lr.
    #[arg(value_name = "WHAT", required = true, num_args = 1..)]
    what: Vec<Asked>,
}

const EXAMPLES: &str = "\
Examples:
  tandem tell runs/my sample            # clips now
  tandem tell runs/my save stop         # adapter files of this step, and end
  tandem tell runs/my lr=5e-5           # from the next step on; the schedule goes on with it

A learning rate is noted in the run's told.jsonl and log, so that a run that is resumed from an earlier step takes it at the same step
again. A file of that name in the run's folder `requests` does the same: `echo 5e-5 > runs/my/requests/lr`.";

impl Tell {
    /// Asks for all.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        for asked in &self.what {
            asked.of_running(&self.run)?;
        }
        let told: Vec<String> = self.what.iter().map(ToString::to_string).collect();
        let text =
            format!("told {} to {}; it acts after its current step", self.run.display(), told.join(", "));
        ui.tell(&text, &json!({ "run": self.run, "told": told }));
        Ok(0)
    }
}
