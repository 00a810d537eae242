//! How good each checkpoint of a run is, as far as its held-out loss tells.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::history::History;
use crate::error::{Error, Result};
use crate::sample::CONTACT_SHEET;

/// What there is of a step, and its held-out loss.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scored {
    /// Steps made.
    pub step: u64,
    /// The held-out loss then, and two standard errors of its change since the first.
    pub held_out: Option<(f64, f64)>,
    /// Whether its held-out loss is within the band of the best one: which of these is better is for the eye.
    pub is_near_best: bool,
    /// The state to go on from, or to export.
    pub checkpoint: Option<PathBuf>,
    /// Adapter files.
    pub adapters: Vec<PathBuf>,
    /// The picture of its clips.
    pub contact_sheet: Option<PathBuf>,
}

/// What there is of each step of the run in the folder `root`: those with a checkpoint, an adapter file or clips; best first, and
/// those without a held-out loss behind them in the order of the steps.
///
/// # Errors
/// Folders that cannot be read.
pub fn scored(root: &Path, history: &History) -> Result<Vec<Scored>> {
    let mut steps: BTreeMap<u64, Scored> = BTreeMap::new();
    for path in files(&root.join("checkpoints"))? {
        if let Some(step) =
            step_of(&path).filter(|_| path.extension().is_some_and(|end| end == "safetensors"))
        {
            at(&mut steps, step).checkpoint = Some(path);
        }
    }
    let made = history.steps.last().map_or(0, |row| row.step);
    for path in files(&root.join("adapters"))? {
        // Those of the end have no step in their names.
        at(&mut steps, step_of(&path).unwrap_or(made)).adapters.push(path);
    }
    for path in files(&root.join("samples"))? {
        let sheet = path.join(CONTACT_SHEET);
        if let Some(step) = step_of(&path).filter(|_| sheet.is_file()) {
            at(&mut steps, step).contact_sheet = Some(sheet);
        }
    }
    let mut scored: Vec<Scored> = steps.into_values().collect();
    scored.iter_mut().for_each(|one| one.held_out = history.held_out_at(one.step));
    let loss = |one: &Scored| one.held_out.map_or(f64::INFINITY, |(loss, _)| loss);
    scored.sort_by(|a, b| loss(a).total_cmp(&loss(b)).then(a.step.cmp(&b.step)));
    if let Some((best, _)) = scored.first().and_then(|one| one.held_out) {
        for one in &mut scored {
            one.is_near_best = one.held_out.is_some_and(|(loss, band)| loss - band <= best);
        }
    }
    Ok(scored)
}

/// What is known of a step, nothing at first.
fn at(steps: &mut BTreeMap<u64, Scored>, step: u64) -> &mut Scored {
    steps.entry(step).or_insert_with(|| Scored {
        step,
        held_out: None,
        is_near_best: false,
        checkpoint: None,
        adapters: Vec::new(),
        contact_sheet: None,
    })
}

/// What is in a folder, by name; nothing where there is none.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let io = |source| Error::Io { action: "list", path: folder.to_owned(), source };
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let entries = std::fs::read_dir(folder).map_err(io)?;
    let mut paths =
        entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>().map_err(io)?;
    paths.sort();
    Ok(paths)
}

/// The number behind `step-` in a name.
fn step_of(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_string_lossy().into_owned();
    let digits = name.split("step-").nth(1)?;
    digits[..digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len())].parse().ok()
}
