//! What the server remembers of a run that it was asked to train, in a file of its own: it survives the server.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A run that was started here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::serve) struct Record {
    /// Its name, and that of its folder.
    pub name: String,
    /// Its recipe.
    pub recipe: PathBuf,
    /// The devices that it trains on.
    pub devices: Vec<String>,
    /// What is wanted of it.
    pub wanted: Wanted,
    /// Its place in the queue: lower ones are first.
    pub place: u64,
    /// Why it ended, where it failed.
    pub error: Option<String>,
    /// The memory that the plan forecast, as `tandem plan --json` tells it.
    pub memory: serde_json::Value,
}

/// What is wanted of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(in crate::serve) enum Wanted {
    /// It waits for its devices.
    Queued,
    /// It trains, or has ended by itself.
    Started,
    /// It is to save and stop, or has.
    Paused,
}

impl Record {
    fn path(folder: &Path, name: &str) -> PathBuf {
        folder.join(format!("{name}.json"))
    }

    /// The file of what the run prints.
    pub fn log(folder: &Path, name: &str) -> PathBuf {
        folder.join(format!("{name}.log"))
    }

    /// Writes it into `folder`.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        write_json(&Self::path(folder, &self.name), self)
    }

    /// Removes the one of `name` from `folder`.
    pub fn remove(folder: &Path, name: &str) -> Result<()> {
        let path = Self::path(folder, name);
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::Io { action: "remove", path, source })
            }
            _ => Ok(()),
        }
    }

    /// All records in `folder`.
    ///
    /// # Errors
    /// A folder that cannot be listed, and a file that is no record.
    pub fn all(folder: &Path) -> Result<Vec<Self>> {
        let io = |source| Error::Io { action: "list", path: folder.to_owned(), source };
        let mut records = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(io)? {
            let path = entry.map_err(io)?.path();
            if path.extension().is_some_and(|ending| ending == "json") {
                records.push(read_json(&path)?);
            }
        }
        Ok(records)
    }
}

/// Reads a file that the server has written.
///
/// # Errors
/// A file that cannot be read, or that someone else has written.
pub(in crate::serve) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let io = |source| Error::Io { action: "read", path: path.to_owned(), source };
    let bytes = std::fs::read(path).map_err(io)?;
    serde_json::from_slice(&bytes).map_err(|error| io(error.into()))
}

/// Writes `value` as the file at `path`, whole or not at all.
///
/// # Errors
/// A file that cannot be written.
pub(in crate::serve) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let io = |source| Error::Io { action: "write", path: path.to_owned(), source };
    let bytes = serde_json::to_vec_pretty(value).map_err(|error| io(error.into()))?;
    data::atomic::write(path, |file| std::io::Write::write_all(file, &bytes)).map_err(io)
}
