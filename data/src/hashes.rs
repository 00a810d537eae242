//! Content hashes of clips, remembered between runs so that a folder of clips is not read again each time.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::atomic;
use crate::cache::Cache;
use crate::error::{DataError, Result};
use crate::key::hex;
use crate::media::Media;

/// Hashes by path, each valid for one size and one time of change.
#[derive(Debug)]
pub struct ContentHashes {
    index: PathBuf,
    known: BTreeMap<String, Known>,
    /// Whether the index on disk is another, or damaged.
    changed: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Known {
    bytes: u64,
    /// Nanoseconds since 1970.
    modified: u128,
    sha256: String,
}

impl ContentHashes {
    /// Loads what `cache` remembers. An index that is missing or damaged only costs time: it starts empty.
    pub fn open(cache: &Cache) -> Self {
        let index = cache.folder().join("content-hashes.json");
        let bytes = std::fs::read(&index).ok();
        let known = bytes.as_deref().and_then(|bytes| serde_json::from_slice(bytes).ok());
        let changed = bytes.is_some() && known.is_none();
        Self { index, known: known.unwrap_or_default(), changed }
    }

    /// SHA-256 of a clip's bytes, as hexadecimal digits; for a folder of pictures, of the list of their hashes.
    ///
    /// # Errors
    /// [`DataError::Io`] naming the file.
    pub fn of(&mut self, media: &Media) -> Result<String> {
        match media {
            Media::Video(path) | Media::Animation(path) | Media::Still(path) => self.of_file(path),
            Media::Pictures { files, .. } => {
                let mut hash = Sha256::new();
                for file in files {
                    hash.update(self.of_file(file)?);
                }
                Ok(hex(&hash.finalize()))
            }
        }
    }

    fn of_file(&mut self, path: &Path) -> Result<String> {
        let metadata = std::fs::metadata(path).map_err(DataError::io("read", path))?;
        let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let modified = modified.map_or(0, |since| since.as_nanos());
        let name = path.canonicalize().map_err(DataError::io("read", path))?.to_string_lossy().into_owned();
        if let Some(known) = self.known.get(&name)
            && (known.bytes, known.modified) == (metadata.len(), modified)
        {
            return Ok(known.sha256.clone());
        }
        let sha256 = hash_file(path).map_err(DataError::io("read", path))?;
        self.known.insert(name, Known { bytes: metadata.len(), modified, sha256: sha256.clone() });
        self.changed = true;
        Ok(sha256)
    }

    /// Writes the index if anything was added, or if it was damaged.
    ///
    /// # Errors
    /// [`DataError::Io`] naming the index.
    pub fn save(&mut self) -> Result<()> {
        if !self.changed {
            return Ok(());
        }
        let text = serde_json::to_vec(&self.known).map_err(|error| DataError::encode(&self.index, error))?;
        atomic::write(&self.index, |file| file.write_all(&text))
            .map_err(DataError::io("write", &self.index))?;
        self.changed = false;
        Ok(())
    }
}

fn hash_file(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hash.finalize())),
            count => hash.update(&buffer[..count]),
        }
    }
}
