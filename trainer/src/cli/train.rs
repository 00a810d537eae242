//! `tandem train`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use super::devices::RecipeDevices;
use super::fetch::{Missing, resolved};
use super::plan::{buckets, experts, make};
use crate::plan::Overrides;
use crate::train::{self, Ending, RunFolder};
use crate::watch::interrupt::{INTERRUPTED, Interrupt, OnStop};
use crate::watch::ui::Ui;

/// Train an adapter. Clips that are not cached are encoded first. Ctrl-C finishes the step, saves and stops.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Train {
    /// The recipe.
    recipe: PathBuf,
    /// Resume from the last checkpoint of this recipe's newest run, or of the run in the folder RUN. The result is that of a
    /// run that was never interrupted, bit for bit (on GPUs with devices.deterministic).
    #[arg(long, value_name = "RUN", num_args = 0..=1, require_equals = true)]
    resume: Option<Option<PathBuf>>,
    #[command(flatten)]
    devices: RecipeDevices,
}

const EXAMPLES: &str = "\
Examples:
  tandem train my.toml
  tandem train my.toml --resume              # continue the newest run of this recipe
  tandem train my.toml --resume=runs/my-2    # continue this run
  tandem train my.toml --set train.steps=20  # a quick trial
  tandem --json train my.toml     # a JSON object for each step

Every key of a recipe is explained in recipes/README.md.";

impl Train {
    /// Trains to the end, or until Ctrl-C.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let ui = &ui.with_phases();
        // Before listening for Ctrl-C, which then ends a download at once; nothing is lost.
        let overrides = resolved(&self.recipe, self.devices.overrides(), Missing::Fetch, ui)?;
        let interrupt = Interrupt::listen_to(OnStop::Save).context("cannot listen for Ctrl-C")?;
        let overrides = Overrides { interrupt: interrupt.clone(), ..overrides };
        let mut planned = ui.phase("planning", || make(&self.recipe, &overrides, ui))?;
        let folder = match &self.resume {
            Some(run) => RunFolder::resume(&mut planned, run.as_deref(), |line| ui.note(line))?,
            None => RunFolder::begin(&mut planned.plan)?,
        };
        folder.warning().into_iter().for_each(|line| ui.note(line));
        let plan = &planned.plan;
        ui.say(&format!(
            "{}: {} on {} clips ({} windows), {} steps of {} x {}, rank {} on {} modules, stages {}",
            plan.run.name,
            plan.model.name,
            plan.dataset.clips,
            plan.dataset.items,
            plan.train.steps,
            plan.train.accumulate,
            plan.train.batch,
            plan.adapter.rank(),
            planned.targets.len(),
            plan.devices.stages.join(" + "),
        ));
        let experts = experts(plan)?;
        ui.say(&format!("{}\n{experts}run folder: {}", buckets(&planned), folder.root().display()));
        let ending = train::train(&planned, &folder, &interrupt, ui);
        let is_over = matches!(ending, Ok(Ending::Finished));
        if self.resume.is_none() && !is_over && folder.is_untouched()? {
            ui.note(&format!("nothing was trained: {} is removed", folder.root().display()));
            folder.discard()?;
        }
        match ending? {
            Ending::Finished => Ok(0),
            Ending::Interrupted => Ok(INTERRUPTED),
        }
    }
}
