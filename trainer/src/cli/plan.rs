//! `tandem plan`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::devices::RecipeDevices;
use super::fetch::{Missing, resolved};
use crate::plan::{self, Overrides, Planned};
use crate::ui::Ui;

/// Resolve a recipe and print what it means. Nothing is written.
#[derive(Debug, Args)]
pub struct Plan {
    /// The recipe.
    recipe: PathBuf,
    #[command(flatten)]
    devices: RecipeDevices,
}

impl Plan {
    /// Prints the plan.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let overrides = resolved(&self.recipe, self.devices.overrides(), Missing::Tell, ui)?;
        let planned = make(&self.recipe, &overrides, ui)?;
        let forecast = &planned.forecast;
        let object = serde_json::json!({ "plan": planned.plan, "memory": forecast });
        let text = format!("{}\n{}\n{forecast}", planned.plan.to_toml()?, buckets(&planned));
        ui.tell(&text, &object);
        Ok(0)
    }
}

/// Settles a recipe with a bar over the reading of the clips.
pub fn make(recipe: &std::path::Path, overrides: &Overrides, ui: &Ui) -> crate::Result<Planned> {
    let mut bar = None;
    let planned = plan::Plan::make_with(recipe, overrides, &mut |done, total| {
        let bar = bar.get_or_insert_with(|| ui.bar("reading clips", total));
        if done > 0 {
            bar.inc(1);
        }
        if done == total {
            bar.finish();
        }
    })?;
    planned.dataset.notes.iter().for_each(|note| ui.note(note));
    if let Some(like) = planned.plan.train.like {
        let taken = planned.taken.iter().map(|taken| format!("\n  {taken}")).collect::<String>();
        ui.note(&format!("as in {}, where the recipe says nothing:{taken}", like.name()));
    }
    Ok(planned)
}

/// The buckets as a table.
pub fn buckets(planned: &Planned) -> String {
    let mut lines =
        vec![format!("{:>6} {:>6} {:>7} {:>7} {:>8}", "width", "height", "frames", "clips", "windows")];
    for row in planned.dataset.table().rows {
        let bucket = row.bucket;
        let mut line = format!(
            "{:>6} {:>6} {:>7} {:>7} {:>8}",
            bucket.width, bucket.height, bucket.frames, row.clips, row.windows
        );
        if row.enlarged > 0 {
            line.push_str(&format!("   {} of them smaller than this and enlarged", row.enlarged));
        }
        lines.push(line);
    }
    lines.join("\n")
}
