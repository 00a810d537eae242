//! A whole short run at real size, from files that are made for it: every phase with the time that it took.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::run_files::prepared;
use super::{ClipSize, rounded};
use crate::error::{Error, Result};
use crate::machine::devices::DevicesConfig;
use crate::machine::precision::{Arithmetic, WeightFormat};
use crate::plan::Plan;
use crate::sample::magcache::CacheConfig;
use crate::train::{self, Ending, RunFolder};
use crate::watch::interrupt::Interrupt;
use crate::watch::ui::Ui;

/// A whole run that is measured.
#[derive(Debug, Clone)]
pub struct RunBench<'a> {
    /// Sizes by name: one of `dit_presets`.
    pub model: &'a str,
    /// Temporary folder of files, run and cache.
    pub scratch: &'a Path,
    /// Stages.
    pub devices: DevicesConfig,
    /// Storage of the DiT; `None` for bf16.
    pub base: Option<WeightFormat>,
    /// What products with the DiT's matrices are computed in.
    pub arithmetic: Option<Arithmetic>,
    /// Of the clips that are trained and of those that are sampled.
    pub size: ClipSize,
    /// Optimiser steps. There is a checkpoint in the middle and one at the end.
    pub steps: u64,
    /// Micro-batches of a step.
    pub accumulate: usize,
    /// Rank of the adapter.
    pub rank: usize,
    /// Solver steps of the clips before and after training.
    pub solver_steps: usize,
    /// MagCache's rule for the clips after training; those before measure its table.
    pub cache: Option<&'a CacheConfig>,
}

/// Writes a checkpoint of random weights and two clips, plans a run on them, and trains: phases and rows of the log are
/// reported to `ui`, and everything is returned as one object.
///
/// # Errors
/// An unknown model, what the plan refuses, what stops the run, and files that cannot be written.
pub fn whole(bench: &RunBench, interrupt: &Interrupt, ui: &Ui) -> Result<Value> {
    let begun = std::time::Instant::now();
    let (_made, recipe) = prepared(bench, ui)?;
    let mut planned = ui.phase("planning", || Plan::make(&recipe, &mut |_, _| {}))?;
    let folder = RunFolder::begin(&mut planned.plan)?;
    match train::train(&planned, &folder, interrupt, ui)? {
        Ending::Finished => {}
        Ending::Interrupted => return Err(Error::Interrupted),
    }
    let seconds = step_seconds(&folder.metrics())?;
    let (first, mut later) = (seconds.first().copied(), seconds.get(1..).unwrap_or_default().to_vec());
    later.sort_by(f64::total_cmp);
    Ok(json!({
        "what": "run", "model": bench.model, "stages": planned.plan.devices.stages,
        "weights": planned.plan.model.precision.base.name(),
        "arithmetic": planned.plan.model.precision.arithmetic.name(), "size": bench.size.label(),
        "frames": bench.size.frames, "rank": bench.rank, "accumulate": bench.accumulate, "steps": bench.steps,
        "first_step_s": first.map(|s| rounded(s, 3)),
        "s_per_step": later.get(later.len() / 2).map(|s| rounded(*s, 3)),
        "phases": phases(ui), "s": rounded(begun.elapsed().as_secs_f64(), 2),
    }))
}

/// Seconds of each step, from the log at `path`.
pub(super) fn step_seconds(path: &Path) -> Result<Vec<f64>> {
    let io = |source| Error::Io { action: "read", path: path.to_owned(), source };
    let text = fs::read_to_string(path).map_err(io)?;
    let rows = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(rows.filter_map(|row| row["seconds"].as_f64()).collect())
}

/// The phases by name, in the order in which each was first done, with how often and how long in all.
fn phases(ui: &Ui) -> Vec<Value> {
    let mut report: Vec<(&str, usize, f64)> = Vec::new();
    for done in ui.phases() {
        match report.iter_mut().find(|(label, ..)| *label == done.label) {
            Some((_, times, seconds)) => {
                *times += 1;
                *seconds += done.seconds;
            }
            None => report.push((done.label, 1, done.seconds)),
        }
    }
    let row = |(label, times, seconds)| json!({ "phase": label, "times": times, "s": rounded(seconds, 3) });
    report.into_iter().map(row).collect()
}
