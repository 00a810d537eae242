//! A file of a checkpoint, opened once and read from any number of threads.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::error::{Result, WeightsError};

/// An open file, with its path for messages. What replaces the file at that path later is not read.
#[derive(Debug)]
pub(crate) struct StoredFile {
    path: PathBuf,
    handle: File,
}

impl StoredFile {
    /// Opens `path`.
    pub fn open(path: &Path) -> Result<Self> {
        let handle = File::open(path).map_err(WeightsError::io("open", path))?;
        Ok(Self { path: path.to_owned(), handle })
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length now.
    pub fn length(&self) -> Result<u64> {
        Ok(self.handle.metadata().map_err(WeightsError::io("read", &self.path))?.len())
    }

    /// Fills `bytes` from `offset` on.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.handle.read_exact_at(bytes, offset).map_err(WeightsError::io("read", &self.path))
    }

    /// `count` bytes from `offset` on.
    pub fn bytes_at(&self, offset: u64, count: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.read_at(offset, &mut bytes)?;
        Ok(bytes)
    }
}
