//! `tandem cache`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use data::DataError;
use serde_json::json;

use super::devices::RecipeDevices;
use super::fetch::{Missing, resolved};
use super::plan::make;
use crate::error::Error;
use crate::plan::Planned;
use crate::tools::checks;
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
    /// Look at all clips and write what may be wrong with them into this page, and encode nothing: black and frozen clips, scene
    /// changes, repeated frames, bars, sources that are enlarged, clips that are nearly the same.
    #[arg(long, value_name = "FILE", conflicts_with = "preview")]
    report: Option<PathBuf>,
    #[command(flatten)]
    devices: RecipeDevices,
}

const EXAMPLES: &str = "\
Examples:
  tandem cache my.toml
  tandem cache my.toml --report clips.html # what may be wrong with them
  tandem cache my.toml --preview preview   # look at the clips as they will be trained

Every key of a recipe is explained in recipes/README.md.";

impl Cache {
    /// Fills the cache, or writes the preview.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let ui = &ui.with_phases();
        let overrides = resolved(&self.recipe, self.devices.overrides(), Missing::Fetch, ui)?;
        let planned = make(&self.recipe, &overrides, ui)?;
        if let Some(path) = &self.report {
            return report(path, &planned, ui);
        }
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

/// Writes the page of what may be wrong with the clips, and prints it.
fn report(path: &Path, planned: &Planned, ui: &Ui) -> Result<u8> {
    let interrupt = Interrupt::listen().context("cannot listen for Ctrl-C")?;
    let bar = ui.bar("looking at clips", planned.dataset.sources.len());
    let checked = data::check(&planned.dataset, &mut || {
        bar.inc(1);
        if interrupt.is_asked() { Err(DataError::Stopped) } else { Ok(()) }
    });
    let checked = checked.map_err(|error| match error {
        DataError::Stopped => Error::Interrupted,
        other => other.into(),
    })?;
    bar.finish();
    let page = checks::page(&planned.plan.run.name, &checked)?;
    data::atomic::write(path, |file| std::io::Write::write_all(file, page.as_bytes()))
        .map_err(|source| Error::Io { action: "write", path: path.to_owned(), source })?;
    let found: Vec<_> = checked.iter().filter(|clip| !clip.findings.is_empty()).collect();
    let mut text = String::new();
    for clip in &found {
        clip.findings.iter().for_each(|finding| text.push_str(&format!("{}: {finding}\n", clip.id)));
    }
    text.push_str(&format!(
        "{} clips, {} of them with something to look at: {}",
        checked.len(),
        found.len(),
        path.display()
    ));
    let clips: Vec<_> =
        checked.iter().map(|clip| json!({ "id": clip.id, "findings": clip.findings })).collect();
    ui.tell(&text, &json!({ "clips": clips, "report": path }));
    Ok(0)
}
