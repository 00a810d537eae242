//! `--force`: existing files are only overwritten on request.

use std::path::Path;

use clap::Args;

use crate::error::Error;

/// Whether existing files are overwritten.
#[derive(Debug, Args)]
pub struct Force {
    /// Overwrite existing files.
    #[arg(long)]
    force: bool,
}

impl Force {
    /// Refuses `output`, which `key` names, if it exists and `--force` was not given.
    ///
    /// # Errors
    /// [`Error::Setting`] with the file and both solutions.
    pub fn check(&self, output: &Path, key: &str) -> crate::Result<()> {
        // A dangling link would be replaced, too.
        if self.force || output.symlink_metadata().is_err() {
            return Ok(());
        }
        let why = format!("{} exists; --force overwrites it, or name another", output.display());
        Err(Error::Setting { key: key.to_owned(), why })
    }
}
