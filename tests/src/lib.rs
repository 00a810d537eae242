//! Helpers of the proofs.

use std::path::PathBuf;

/// A file or folder of `tests/fixtures`.
pub fn fixture(relative: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(relative)
}
