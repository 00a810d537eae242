//! A run as its folder shows it.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::process::{memory_of, tail};
use crate::error::Result;
use crate::plan::Plan;
use crate::train::kept;

/// How a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(in crate::serve) enum Status {
    /// It waits for its devices.
    Queued,
    /// It trains.
    Running,
    /// It saves, to stop.
    Stopping,
    /// It is stopped and can go on.
    Paused,
    /// All steps are made.
    Finished,
    /// An error has ended it.
    Failed,
}

/// A run in a list.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(in crate::serve) struct RunView {
    pub name: String,
    pub status: Status,
    /// Optimiser steps made, and those of the recipe.
    pub step: u64,
    pub steps: Option<u64>,
    /// Mean loss of the last steps.
    pub loss: Option<f64>,
    /// Seconds of a step, a mean of the last ones.
    pub seconds_per_step: Option<f64>,
    /// Seconds that the steps left will take, clips not counted.
    pub seconds_left: Option<f64>,
    /// The base model.
    pub model: Option<String>,
    pub devices: Vec<String>,
    /// What the run waits for.
    pub waits_for: Option<String>,
    pub error: Option<String>,
    /// Bytes of host memory that its process has.
    pub host_memory: Option<u64>,
    /// Whether it can be resumed from here.
    pub has_recipe: bool,
    /// Sets of clips.
    pub samples: Vec<ClipSet>,
    /// Adapters that there are.
    pub checkpoints: Vec<Kept>,
}

/// The clips that were made after a step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(in crate::serve) struct ClipSet {
    pub step: u64,
    /// Names of their files.
    pub files: Vec<String>,
}

/// An adapter of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(in crate::serve) struct Kept {
    /// The step, nothing at the end.
    pub step: Option<u64>,
    /// The names of its files; none where there is only a checkpoint.
    pub files: Vec<String>,
}

/// What the last rows of a run's log say.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Last {
    pub step: u64,
    pub loss: Option<f64>,
    pub seconds: Option<f64>,
}

/// Steps whose mean is shown.
const SMOOTHED_OVER: usize = 50;
/// Bytes of a log in which those are looked for.
const TAIL: u64 = 64 << 10;

impl Last {
    /// Of the run in `folder`.
    pub fn of(folder: &Path) -> Self {
        let text = tail(&folder.join("metrics.jsonl"), TAIL);
        let rows = text.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let rows: Vec<Value> = rows.filter(|row| row["loss"].is_f64()).take(SMOOTHED_OVER).collect();
        let mean = |key: &str, most: usize| {
            let values: Vec<f64> = rows.iter().take(most).filter_map(|row| row[key].as_f64()).collect();
            (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
        };
        Self {
            step: rows.first().and_then(|row| row["step"].as_u64()).unwrap_or(0),
            loss: mean("loss", SMOOTHED_OVER),
            seconds: mean("seconds", 20),
        }
    }
}

/// The devices that a run of `plan` trains on, those of all replicas on this host.
pub(in crate::serve) fn devices_of(plan: &Plan) -> Vec<String> {
    let stages = &plan.devices.stages;
    let mut devices: Vec<String> = Vec::new();
    for replica in 0..plan.devices.replicas.named() {
        for stage in stages {
            let number = stage.strip_prefix("cuda:").and_then(|number| number.parse::<usize>().ok());
            let name = match number {
                Some(number) => format!("cuda:{}", number + replica * stages.len()),
                None => stage.clone(),
            };
            if !devices.contains(&name) {
                devices.push(name);
            }
        }
    }
    devices
}

impl RunView {
    /// Of the run `name` in `folder`, as far as the folder says: its status is finished or paused.
    pub fn of(name: &str, folder: &Path, worker: Option<u32>) -> Self {
        let plan = Plan::read(&folder.join("plan.toml")).ok();
        let Last { step, loss, seconds } = Last::of(folder);
        let steps = plan.as_ref().map(|plan| plan.train.steps);
        let is_over = steps.is_some_and(|steps| step >= steps);
        let left = steps.map(|steps| steps.saturating_sub(step));
        Self {
            name: name.to_owned(),
            status: match (worker, is_over) {
                (Some(_), _) => Status::Running,
                (None, true) => Status::Finished,
                (None, false) => Status::Paused,
            },
            step,
            steps,
            loss,
            seconds_per_step: seconds,
            seconds_left: seconds.zip(left).map(|(seconds, left)| seconds * left as f64),
            model: plan.as_ref().map(|plan| plan.model.name.clone()),
            devices: plan.as_ref().map_or_else(Vec::new, devices_of),
            waits_for: None,
            error: None,
            host_memory: worker.and_then(memory_of),
            has_recipe: false,
            samples: samples(&folder.join("samples")),
            checkpoints: plan.as_ref().and_then(|plan| checkpoints(plan, folder).ok()).unwrap_or_default(),
        }
    }
}

/// Names of the visible entries of `folder`, in order.
pub(in crate::serve) fn names_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().filter_map(|entry| entry.ok());
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.filter(|name| !name.starts_with('.')).collect();
    names.sort();
    names
}

fn samples(folder: &Path) -> Vec<ClipSet> {
    let set = |name: String| {
        let step = name.strip_prefix("step-")?.parse().ok()?;
        let is_clip = |file: &String| {
            let is_film = [".mp4", ".gif", ".webp"].iter().any(|ending| file.ends_with(ending));
            is_film && !file.ends_with(".preview.mp4")
        };
        let files: Vec<String> = names_in(&folder.join(&name)).into_iter().filter(is_clip).collect();
        (!files.is_empty()).then_some(ClipSet { step, files })
    };
    names_in(folder).into_iter().filter_map(set).collect()
}

fn checkpoints(plan: &Plan, folder: &Path) -> Result<Vec<Kept>> {
    let ranges = plan.trained_ranges();
    let experts: Vec<_> = ranges.iter().map(|range| range.expert()).collect();
    let files = |step: Option<u64>| {
        let paths = experts.iter().filter_map(|expert| kept::written(plan, folder, step, *expert));
        let name = |path: PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned());
        paths.filter_map(name).collect::<Vec<_>>()
    };
    let mut found = Vec::new();
    for step in kept::steps(plan, folder, experts.first().copied().flatten())? {
        found.push(Kept { step: Some(step), files: files(Some(step)) });
    }
    let last = files(None);
    if !last.is_empty() {
        // The state of the last step is what the final files were written from.
        found.retain(|kept| kept.step != Some(plan.train.steps) || !kept.files.is_empty());
        found.push(Kept { step: None, files: last });
    }
    Ok(found)
}
