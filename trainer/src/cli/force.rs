//! `--force`: files that are there already are overwritten only when asked for.

use std::path::Path;

use clap::Args;

use crate::error::Error;

/// Whether files that are there are overwritten.
#[derive(Debug, Args)]
pub struct Force {
    /// Overwrite files that are there already.
    #[arg(long)]
    force: bool,
}

impl Force {
    /// Refuses `output`, which `key` names, where something is there and `--force` was not given.
    ///
    /// # Errors
    /// [`Error::Setting`] with the file and both ways out.
    pub fn check(&self, output: &Path, key: &str) -> crate::Result<()> {
        // A link to nothing is something that would be replaced, too.
        if self.force || output.symlink_metadata().is_err() {
            return Ok(());
        }
        let why = format!("{} exists; --force overwrites it, or name another", output.display());
        Err(Error::Setting { key: key.to_owned(), why })
    }
}
