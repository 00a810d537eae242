//! The adapters that a run has kept: their files, and its checkpoints.

use std::path::{Path, PathBuf};

use models::adapter::files::Style;
use models::expert::Expert;

use super::checkpoint;
use super::export::{self, Part};
use crate::error::{Error, Result};
use crate::plan::Plan;

/// The adapter file of the run of `plan` in `folder`, at its end or after `step` steps, in the first of its formats that is there.
pub fn written(plan: &Plan, folder: &Path, step: Option<u64>, expert: Option<Expert>) -> Option<PathBuf> {
    let label = step.map(|step| format!("step-{step:06}"));
    let part = Part { label: label.as_deref(), expert };
    let path = |style: &Style| folder.join("adapters").join(export::file_name(&plan.run.name, *style, part));
    plan.export.formats.iter().map(path).find(|path| path.exists())
}

/// The steps after which there is an adapter file or a checkpoint, ascending.
///
/// # Errors
/// A folder that cannot be listed.
pub fn steps(plan: &Plan, folder: &Path, expert: Option<Expert>) -> Result<Vec<u64>> {
    let mut steps = checkpoint::steps(&folder.join("checkpoints"))?;
    let adapters = folder.join("adapters");
    let io = |source| Error::Io { action: "list", path: adapters.clone(), source };
    for entry in std::fs::read_dir(&adapters).map_err(io)? {
        let name = entry.map_err(io)?.file_name().to_string_lossy().into_owned();
        let step = name.split("step-").nth(1).and_then(|rest| rest.get(..6)?.parse::<u64>().ok());
        steps.extend(step.filter(|step| written(plan, folder, Some(*step), expert).is_some()));
    }
    steps.sort_unstable();
    steps.dedup();
    Ok(steps)
}
