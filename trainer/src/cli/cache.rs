//! `tandem cache`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use super::devices::RecipeDevices;
use super::fetch::{Missing, resolved};
use super::plan::make;
use crate::train;
use crate::watch::interrupt::Interrupt;
use crate::watch::ui::Ui;

/// Encode clips and captions. Cached items are kept; an interrupted command loses nothing that was finished.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Cache {
    /// The recipe.
    recipe: PathBuf,
    /// Write the exact clips that will be trained into this folder, with their captions, and encode nothing.
    #[arg(long, value_name = "DIR")]
    preview: Option<PathBuf>,
    #[command(flatten)]
    devices: RecipeDevices,
}

const EXAMPLES: &str = "\
Examples:
  tandem cache my.toml
  tandem cache my.toml --preview preview   # look at the clips as they will be trained

Every key of a recipe is explained in recipes/README.md.";

impl Cache {
    /// Fills the cache, or writes the preview.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let ui = &ui.with_phases();
        let overrides = resolved(&self.recipe, self.devices.overrides(), Missing::Fetch, ui)?;
        let planned = make(&self.recipe, &overrides, ui)?;
        let Some(folder) = &self.preview else {
            let interrupt = Interrupt::listen().context("cannot listen for Ctrl-C")?;
            train::cache(&planned, &interrupt, ui)?;
            let cache = planned.plan.run.cache.display().to_string();
            let items = planned.dataset.windows.len();
            ui.tell(
                &format!("{items} clips are cached in {cache}"),
                &serde_json::json!({"items": items, "cache": cache}),
            );
            return Ok(0);
        };
        let bar = ui.bar("writing clips", planned.dataset.windows.len());
        let written = data::write_preview(folder, &planned.dataset, &mut |_, _| bar.inc(1))
            .map_err(crate::Error::from)?;
        bar.finish();
        let text = format!("{} clips are in {}", written.len(), folder.display());
        ui.tell(&text, &serde_json::json!({ "preview": written }));
        Ok(0)
    }
}
