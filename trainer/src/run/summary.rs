//! The last words of a run: how the loss went, and where everything lies.

use std::path::PathBuf;

use super::RunFolder;
use crate::error::{Error, Result};
use crate::plan::Plan;
use crate::ui::Ui;

/// Tells how the loss went and where everything lies.
pub(super) fn tell(plan: &Plan, folder: &RunFolder, adapters: &[PathBuf], ui: &Ui) -> Result<()> {
    let losses = losses(folder)?;
    // A tenth of the run at each end: single steps differ by their noise level far more than training changes them.
    let share = (losses.len() / 10).max(1);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len().max(1) as f64;
    let (first, last) =
        (mean(&losses[..share.min(losses.len())]), mean(&losses[losses.len().saturating_sub(share)..]));
    let samples = folder.root().join("samples");
    let object = serde_json::json!({
        "finished": plan.train.steps, "loss_first_tenth": first, "loss_last_tenth": last,
        "run": folder.root(), "adapters": adapters, "samples": samples,
    });
    let mut lines = vec![
        format!(
            "done: {} steps, loss {first:.4} -> {last:.4} (means of the first and last tenth)",
            plan.train.steps
        ),
        format!(
            "  adapter   {}",
            adapters.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join("\n            ")
        ),
    ];
    if !plan.sample.clips.is_empty() {
        lines.push(format!("  clips     {}", samples.display()));
    }
    lines.push(format!("  log       {}  (and TensorBoard events beside it)", folder.metrics().display()));
    lines.push(format!("  plan      {}", folder.plan().display()));
    ui.tell(&lines.join("\n"), &object);
    Ok(())
}

/// The training losses in the log, in order.
fn losses(folder: &RunFolder) -> Result<Vec<f64>> {
    let path = folder.metrics();
    let text = std::fs::read_to_string(&path).map_err(|source| Error::Io { action: "read", path, source })?;
    let rows = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    Ok(rows.filter_map(|row| row["loss"].as_f64()).collect())
}
