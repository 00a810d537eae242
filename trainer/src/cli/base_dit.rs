//! A base model's DiT as an argument of commands that read weights: a folder or a file.

use std::path::Path;

use models::Expert;
use models::dit::DitConfig;
use models::weights::Weights;

use crate::base::{Dits, locate_dits};
use crate::error::{Error, Result};

/// The DiT of a checkpoint folder, its own folder, or its file.
pub struct BaseDit;

impl BaseDit {
    /// Opens the DiT at `path`; of two experts the given one.
    ///
    /// # Errors
    /// If it is not a Wan DiT, or a folder of two experts and none is given.
    pub fn open(path: &Path, expert: Option<Expert>) -> Result<(DitConfig, Weights)> {
        let dits = locate_dits(path)?;
        match (&dits, expert) {
            (Dits::Single(files), _) => files.open(),
            (Dits::Experts { .. }, Some(expert)) => dits.of(expert).open(),
            (Dits::Experts { .. }, None) => Err(Error::Setting {
                key: "--expert".into(),
                why: format!("{} has two experts; give `high` or `low`", path.display()),
            }),
        }
    }
}
