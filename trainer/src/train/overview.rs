//! One picture of everything that was sampled: a row for each prompt, a column for each step.

use std::fs;
use std::path::PathBuf;

use data::Film;

use super::RunFolder;
use crate::error::{Error, Result};
use crate::plan::Plan;
use crate::sample::clip_name;
use crate::watch::ui::Ui;

/// Width of a picture in it, in pixels; a clip that is narrower has its own.
const CELL: u32 = 256;

/// Writes `overview.png` into the folder of the run: the frame in the middle of every clip of the plan that is there. `None`
/// where no clips are.
///
/// # Errors
/// Clips that cannot be read, a file that cannot be written.
pub(super) fn write(plan: &Plan, folder: &RunFolder, ui: &Ui) -> Result<Option<PathBuf>> {
    let (clips, steps) = (&plan.sample.clips, steps(folder)?);
    let Some(format) = plan.sample.formats.first().filter(|_| !clips.is_empty() && !steps.is_empty()) else {
        return Ok(None);
    };
    let bar = ui.bar("overview", clips.len() * steps.len());
    let mut rows = Vec::new();
    for (index, clip) in clips.iter().enumerate() {
        let name = format!("{}.{}", clip_name(index, &clip.prompt), format.extension());
        let mut row: Vec<Option<Film>> = Vec::new();
        for step in &steps {
            let path = folder.samples(*step).join(&name);
            // Prompts may have been changed between two parts of a run.
            row.push(path.is_file().then(|| data::middle_frame(&path)).transpose()?);
            bar.inc(1);
        }
        rows.push((clip.prompt.clone(), row));
    }
    bar.finish();
    let path = folder.root().join("overview.png");
    let heads: Vec<String> = steps.iter().map(|step| format!("step {step}")).collect();
    let widest = clips.iter().map(|clip| clip.width).max().unwrap_or(CELL);
    data::picture_table(&path, &heads, &rows, widest.min(CELL))?;
    Ok(Some(path))
}

/// The steps that clips were made after.
fn steps(folder: &RunFolder) -> Result<Vec<u64>> {
    let path = folder.root().join("samples");
    let io = |source| Error::Io { action: "list", path: path.clone(), source };
    let mut steps = Vec::new();
    for entry in fs::read_dir(&path).map_err(io)? {
        let name = entry.map_err(io)?.file_name().to_string_lossy().into_owned();
        steps.extend(name.strip_prefix("step-").and_then(|step| step.parse::<u64>().ok()));
    }
    steps.sort_unstable();
    Ok(steps)
}
