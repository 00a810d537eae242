//! What a run was told while it trained that changes what it learns: the learning rate. It is kept in `told.jsonl`, with the step
//! after which it was told, so that a run that goes on from an earlier checkpoint makes the same steps again.

use std::io::{ErrorKind, Write};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::RunFolder;
use crate::error::{Error, Result};
use crate::replicas::Replicas;

/// What a run was told, in the order of the steps.
#[derive(Debug, Default)]
pub(super) struct Told {
    path: PathBuf,
    entries: Vec<ToldRate>,
}

/// A learning rate, from a step on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ToldRate {
    /// Steps that were made before it.
    pub step: u64,
    /// In place of `optimizer.lr`.
    pub lr: f64,
}

impl Told {
    /// What the run in `folder` was told before; other ranks are told by rank 0, which alone need see the folder.
    ///
    /// # Errors
    /// A file that cannot be read, or that this program did not write.
    pub fn open(folder: &RunFolder, replicas: &mut Replicas) -> Result<Self> {
        let path = folder.root().join("told.jsonl");
        let mut text = String::new();
        if replicas.is_first() {
            text = match std::fs::read_to_string(&path) {
                Ok(text) => text,
                Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
                Err(source) => return Err(Error::Io { action: "read", path, source }),
            };
        }
        if replicas.world() > 1 {
            text = String::from_utf8_lossy(&replicas.broadcast(text.into_bytes())?).into_owned();
        }
        let entries = text.lines().map(serde_json::from_str).collect::<std::result::Result<_, _>>();
        let entries = entries.map_err(|error| Error::Io {
            action: "read",
            path: path.clone(),
            source: error.into(),
        })?;
        Ok(Self { path, entries })
    }

    /// What a rate of the schedule is multiplied by in the step after `step` steps, where `lr` is the recipe's.
    pub fn factor(&self, step: u64, lr: f64) -> f64 {
        self.entries.iter().rfind(|told| told.step <= step).map_or(1.0, |told| told.lr / lr)
    }

    /// The rate that was told after exactly `step` steps.
    pub fn at(&self, step: u64) -> Option<f64> {
        self.entries.iter().find(|told| told.step == step).map(|told| told.lr)
    }

    /// Notes a rate, in place of all that were told for later steps.
    pub fn note(&mut self, told: ToldRate) {
        self.entries.retain(|earlier| earlier.step < told.step);
        self.entries.push(told);
    }

    /// Writes all to the run's folder.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self) -> Result<()> {
        let written = data::atomic::write(&self.path, |file| {
            for entry in &self.entries {
                writeln!(file, "{}", serde_json::to_string(entry)?)?;
            }
            Ok(())
        });
        written.map_err(|source| Error::Io { action: "write", path: self.path.clone(), source })
    }
}
