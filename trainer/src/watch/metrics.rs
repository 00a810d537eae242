//! `metrics.jsonl`: one JSON object a step. When a run is resumed, the file is truncated to its length at the checkpoint.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use models::expert::Expert;
use serde::Serialize;

use crate::error::{Error, Result};

/// The result of a step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepRow {
    /// Optimiser steps made, this one included.
    pub step: u64,
    /// Epoch of its first item, from 0.
    pub epoch: u64,
    /// Weighted mean squared error of the velocity.
    pub loss: f64,
    /// That of the priors beside the clips, with its weight, where the step had any; it is not part of `loss`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prior: Option<f64>,
    /// Norm of all gradients together, before clipping.
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Tokens of its clips, where steps end by them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<usize>,
    /// Sigma of each sample.
    pub sigma: Vec<f64>,
    /// Wall-clock time of the step.
    pub seconds: f64,
    /// Clip of each sample.
    pub items: Vec<String>,
    /// In a run that trains both experts, the results of those that had a micro-batch.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub experts: BTreeMap<Expert, ExpertRow>,
    /// In a run on several replicas, what each spent its time on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replicas: Option<ReplicasRow>,
    /// Sigma and mean squared error of each micro-batch, for a curve per range of noise levels in TensorBoard; not a field of the
    /// row.
    #[serde(skip)]
    pub by_sigma: Vec<(f64, f64)>,
}

/// What the replicas of a run spent the time of a step on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ReplicasRow {
    /// Seconds that each took for its micro-batches, in the order of the ranks.
    pub compute_seconds: Vec<f64>,
    /// Seconds from when this one had made its own until it had the sums of all gradients: waiting for the slowest included.
    pub exchange_seconds: f64,
}

/// The result of a step for one of two experts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ExpertRow {
    /// Mean over its own samples.
    pub loss: f64,
    /// Norm of its gradients, before clipping.
    pub grad_norm: f64,
    /// Its micro-batches.
    pub micro_batches: usize,
    /// Its updates, this one included.
    pub updates: u64,
}

/// The held-out loss.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EvalRow {
    /// Optimiser steps made.
    pub step: u64,
    /// The expert, of a model of two.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert: Option<Expert>,
    /// Mean over items and sigmas.
    pub eval_loss: f64,
    /// Mean over items for each of nine sigmas: 0.1 .. 0.9, or evenly spaced in an expert's range.
    pub by_sigma: Vec<f64>,
}

/// What a run was told while it trained.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ToldRow {
    /// Optimiser steps made before it.
    pub step: u64,
    /// As it was told, such as `lr=0.00005`.
    pub told: String,
}

/// The open log of a run.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl Metrics {
    /// Opens the log at `path` and truncates it to its first `bytes` bytes: 0 for a new run.
    ///
    /// # Errors
    /// When the file is shorter than that, or cannot be written.
    pub fn open(path: PathBuf, bytes: u64) -> Result<Self> {
        let io = |source| Error::Io { action: "write", path: path.clone(), source };
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(io)?;
        if file.metadata().map_err(io)?.len() < bytes {
            return Err(Error::LogCut { path });
        }
        file.set_len(bytes).map_err(io)?;
        Ok(Self { path, file, bytes })
    }

    /// Appends one object.
    pub fn write(&mut self, row: &impl Serialize) -> Result<()> {
        let io = |source| Error::Io { action: "write", path: self.path.clone(), source };
        let mut line = serde_json::to_vec(row).map_err(|e| io(e.into()))?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(io)?;
        self.bytes += line.len() as u64;
        Ok(())
    }

    /// Makes sure that everything written is on the disk; the length of the file then.
    pub fn sync(&self) -> Result<u64> {
        let io = |source| Error::Io { action: "write", path: self.path.clone(), source };
        self.file.sync_data().map_err(io)?;
        Ok(self.bytes)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
