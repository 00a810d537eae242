//! Checkpoints: everything that a run needs to go on bit for bit, in one file that is whole or not there.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use data::Cursor;
use kernels::adamw::State;
use models::expert::Expert;
use models::weights::{Checkpoint as TensorFile, write_safetensors};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Optimiser steps made.
    pub step: u64,
    /// Next item.
    pub cursor: Cursor,
    /// Updates of each expert, where both are trained: an optimiser step may have none for one of them.
    #[serde(default, skip_serializing_if = "Updates::is_none")]
    pub updates: Updates,
    /// Length of the metrics file at this point, in bytes.
    pub metrics_bytes: u64,
    /// Length of the TensorBoard file at this point, in bytes.
    pub events_bytes: u64,
}

/// Updates made of each of two experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Updates {
    /// Of the one for high noise.
    pub high: u64,
    /// Of the one for low noise.
    pub low: u64,
}

impl Updates {
    fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Those of `expert`.
    pub fn of(&mut self, expert: Expert) -> &mut u64 {
        match expert {
            Expert::High => &mut self.high,
            Expert::Low => &mut self.low,
        }
    }
}

/// The states of all networks of a run, each name behind that of its expert where there are two: `high.<name>`.
pub type States = BTreeMap<String, State>;

/// The name in a checkpoint of the tensor `name` of a network.
pub fn state_name(expert: Option<Expert>, name: &str) -> String {
    expert.map_or_else(|| name.to_owned(), |expert| format!("{expert}.{name}"))
}

/// The part of `states` that is `expert`'s, by the names that it has there.
pub fn states_of(states: &States, expert: Option<Expert>) -> States {
    let own = |name: &String| match expert {
        None => Some(name.clone()),
        Some(expert) => name.strip_prefix(&format!("{expert}.")).map(str::to_owned),
    };
    states.iter().filter_map(|(name, state)| Some((own(name)?, state.clone()))).collect()
}

/// Header key of [`Progress`].
const PROGRESS: &str = "tandem.progress";
/// What the tensors of a state are called behind the parameter's name.
const PARTS: [&str; 3] = ["parameter", "first", "second"];

/// The file of the checkpoint after `step` steps.
pub fn path(folder: &Path, step: u64) -> PathBuf {
    folder.join(format!("step-{step:06}.safetensors"))
}

/// Writes a checkpoint, then deletes all but the newest `keep_last`. The one before stays whole until this one is.
///
/// # Errors
/// When the file cannot be written: a full disk leaves no half-written file.
pub fn save(folder: &Path, progress: Progress, states: &States, keep_last: usize) -> Result<PathBuf> {
    let mut tensors = Vec::new();
    for (name, State { parameter, first, second }) in states {
        for (part, tensor) in PARTS.into_iter().zip([parameter, first, second]) {
            tensors.push((format!("{name}.{part}"), tensor));
        }
    }
    let progress_text =
        serde_json::to_string(&progress).map_err(|e| Error::PlanText { why: e.to_string() })?;
    let header = BTreeMap::from([(PROGRESS.to_owned(), progress_text)]);
    let path = path(folder, progress.step);
    let views = tensors.iter().map(|(name, tensor)| (name.as_str(), *tensor));
    write_safetensors(&path, views, &header)?;
    for old in all(folder)?.into_iter().rev().skip(keep_last) {
        fs::remove_file(&old).map_err(|source| Error::Io { action: "delete", path: old, source })?;
    }
    Ok(path)
}

/// Reads a checkpoint.
///
/// # Errors
/// When it is damaged or is no checkpoint of a run.
pub fn load(path: &Path) -> Result<(Progress, States)> {
    let file = TensorFile::open(path).map_err(models::Error::from)?;
    let foreign = || Error::NotACheckpoint { path: path.to_owned() };
    let progress = file.metadata().get(PROGRESS).ok_or_else(foreign)?;
    let progress = serde_json::from_str(progress).map_err(|_| foreign())?;
    let mut states = BTreeMap::new();
    for name in file.names().filter_map(|name| name.strip_suffix(".parameter")) {
        let read = |part: &str| -> Result<Tensor> {
            Ok(file.tensor(&format!("{name}.{part}"), DType::F32, &Device::Cpu)?)
        };
        let [parameter, first, second] = PARTS.map(read);
        states.insert(name.to_owned(), State { parameter: parameter?, first: first?, second: second? });
    }
    Ok((progress, states))
}

/// The steps of the checkpoints of a folder, ascending.
///
/// # Errors
/// A folder that cannot be listed.
pub fn steps(folder: &Path) -> Result<Vec<u64>> {
    let step = |path: PathBuf| path.file_stem()?.to_str()?.strip_prefix("step-")?.parse().ok();
    Ok(all(folder)?.into_iter().filter_map(step).collect())
}

/// The newest checkpoint of a folder.
pub fn newest(folder: &Path) -> Result<Option<PathBuf>> {
    Ok(all(folder)?.pop())
}

/// The checkpoints of a folder, oldest first.
fn all(folder: &Path) -> Result<Vec<PathBuf>> {
    let io = |source| Error::Io { action: "list", path: folder.to_owned(), source };
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let step = name.strip_prefix("step-").and_then(|rest| rest.strip_suffix(".safetensors"));
        if let Some(step) = step.and_then(|step| step.parse::<u64>().ok()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}
