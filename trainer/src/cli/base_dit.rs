//! A base model's DiT, as the commands that read weights name it: a folder or a file.

use std::path::Path;

use models::Expert;
use models::dit::DitConfig;
use models::weights::Weights;

use crate::base::{Dits, locate_dits};
use crate::error::{Error, Result};

/// The DiT of a checkpoint folder, its own folder, or its file.
pub struct BaseDit;

impl BaseDit {
    /// Opens the DiT at `path`; of two experts the one that is named.
    ///
    /// # Errors
    /// What is no Wan DiT; a folder of two experts where none is named.
    pub fn open(path: &Path, expert: Option<Expert>) -> Result<(DitConfig, Weights)> {
        let dits = locate_dits(path)?;
        match (&dits, expert) {
            (Dits::Single(files), _) => files.open(),
            (Dits::Experts { .. }, Some(expert)) => dits.of(expert).open(),
            (Dits::Experts { .. }, None) => Err(Error::Setting {
                key: "--expert".into(),
                why: format!("{} holds two experts; say `high` or `low`", path.display()),
            }),
        }
    }
}
