//! The summary at the end of a run: how the loss developed, and the paths of everything.

use std::path::{Path, PathBuf};

use super::RunFolder;
use crate::error::{Error, Result};
use crate::plan::Plan;
use crate::sample::CONTACT_SHEET;
use crate::train::export::shell_line;
use crate::watch::ui::Ui;

/// Where a run ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct End<'a> {
    /// Steps made.
    pub steps: u64,
    /// Adapter files.
    pub adapters: &'a [PathBuf],
    /// The picture of all clips.
    pub overview: Option<&'a Path>,
}

/// Prints how the loss developed, what to look at, the paths of everything, and how to make another clip.
pub(super) fn tell(plan: &Plan, folder: &RunFolder, end: End, ui: &Ui) -> Result<()> {
    let End { steps, adapters, overview } = end;
    let losses = losses(folder)?;
    // A tenth of the run at each end: single steps differ by their noise level far more than training changes them.
    let share = (losses.len() / 10).max(1);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len().max(1) as f64;
    let (first, last) =
        (mean(&losses[..share.min(losses.len())]), mean(&losses[losses.len().saturating_sub(share)..]));
    let samples = folder.root().join("samples");
    let sheet = Some(folder.samples(steps).join(CONTACT_SHEET)).filter(|sheet| sheet.is_file());
    let command = sample_command(plan, folder);
    let object = serde_json::json!({
        "finished": steps, "loss_first_tenth": first, "loss_last_tenth": last, "run": folder.root(),
        "adapters": adapters, "samples": samples, "contact_sheet": sheet, "overview": overview,
        "another_clip": command, "report": folder.report(),
    });
    let shown = |path: &Path| path.display().to_string();
    let mut lines = vec![format!(
        "done: {steps} steps, loss {first:.4} -> {last:.4} (means of the first and last tenth)"
    )];
    if let Some(overview) = overview {
        lines.push(format!("  look at   {}  (every set of clips, step by step)", shown(overview)));
    }
    if let Some(sheet) = &sheet {
        lines.push(format!("  and at    {}  (the last set)", shown(sheet)));
    }
    let files: Vec<String> = adapters.iter().map(|path| shown(path)).collect();
    lines.push(format!("  adapter   {}", files.join("\n            ")));
    if !plan.sample.clips.is_empty() {
        lines.push(format!("  clips     {}", shown(&samples)));
    }
    lines.push(format!(
        "  log       {}  (tensorboard --logdir {})",
        shown(&folder.metrics()),
        shown(folder.root())
    ));
    lines.push(format!("  report    {}", shown(&folder.report())));
    lines.push(format!("  plan      {}", shown(&folder.plan())));
    lines.push(format!("another clip, with this adapter and the settings of the run:\n  {command}"));
    ui.tell(&lines.join("\n"), &object);
    ui.event("finished", object);
    Ok(())
}

/// The command that makes another clip with the last adapter of the run, of its first prompt with the next seed.
fn sample_command(plan: &Plan, folder: &RunFolder) -> String {
    let first = plan.sample.clips.first();
    let prompt = first.map_or("what you would like to see", |clip| clip.prompt.as_str());
    let seed = first.map_or(plan.run.seed, |clip| clip.seed).wrapping_add(1).to_string();
    let (root, out) =
        (folder.root().display().to_string(), folder.root().join("clips").display().to_string());
    shell_line(&["tandem", "sample", &root, "--prompt", prompt, "--seed", &seed, "--out", &out])
}

/// The training losses in the log, in order.
pub(crate) fn losses(folder: &RunFolder) -> Result<Vec<f64>> {
    column(folder, "loss")
}

/// The held-out losses in the log, in order.
pub(crate) fn held_out_losses(folder: &RunFolder) -> Result<Vec<f64>> {
    column(folder, "eval_loss")
}

/// The numbers of the log's rows that have a field `name`.
fn column(folder: &RunFolder, name: &str) -> Result<Vec<f64>> {
    let path = folder.metrics();
    let text = std::fs::read_to_string(&path).map_err(|source| Error::Io { action: "read", path, source })?;
    let rows = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    Ok(rows.filter_map(|row| row[name].as_f64()).collect())
}
