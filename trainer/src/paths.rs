//! Paths in recipes.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The existing file or folder `path` of `key`, relative to the recipe's folder `from`.
///
/// # Errors
/// [`Error::NotThere`].
pub fn existing(key: &str, from: &Path, path: &Path) -> Result<PathBuf> {
    let path = from.join(path);
    match path.exists() {
        true => Ok(path),
        false => Err(Error::NotThere { key: key.to_owned(), path }),
    }
}
