//! Why a checkpoint was refused, or could not be written.

use std::path::{Path, PathBuf};

use super::dtype::StoredDType;

/// The result of reading or writing weights.
pub type Result<T, E = WeightsError> = std::result::Result<T, E>;

/// Why a checkpoint was refused. Every message names the file or the tensor, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The file could not be read or written.
    #[error("{path}: cannot {action}: {source}")]
    Io {
        /// What was being done: "open", "read", "write".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system answered.
        source: std::io::Error,
    },
    /// The file is not what its name promises, or was cut off or damaged.
    #[error("{path}: {reason}")]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it and what to do.
        reason: String,
    },
    /// The tensors of the file are not those of the model; every difference at once.
    #[error(
        "{path}: the tensors do not fit this model; fetch the file again, or name the one that belongs to it{report}"
    )]
    Mismatch {
        /// The file or folder.
        path: PathBuf,
        /// The missing, unexpected and misshapen names, in groups.
        report: MismatchReport,
    },
    /// The checkpoint has no tensor of this name.
    #[error("{path}: there is no tensor named `{name}`")]
    NoSuchTensor {
        /// The file or folder.
        path: PathBuf,
        /// The name asked for.
        name: String,
    },
    /// A weight is NaN or infinite, in the file or after conversion.
    #[error(
        "{path}: tensor `{name}` holds a value that is not finite as {dtype} ({value}, element {index}); \
         download or export this file again"
    )]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The dtype it was read into.
        dtype: String,
        /// The first offending value.
        value: f64,
        /// Its index in the flattened tensor.
        index: usize,
    },
    /// The stored dtype cannot be turned into the one that was asked for.
    #[error(
        "{path}: tensor `{name}` is stored as {stored}, which cannot be read as {wanted}; use the bf16, fp16, f32 or fp8 \
         (float8_e4m3fn) file of the same"
    )]
    Conversion {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The dtype in the file.
        stored: StoredDType,
        /// The dtype asked for.
        wanted: String,
    },
}

impl WeightsError {
    /// A damaged or unexpected file.
    pub(crate) fn file(path: &Path, reason: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), reason: reason.into() }
    }

    /// Turns an I/O error into one that names the file and what was being done to it.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

/// Names listed per group of a [`MismatchReport`] before "and N more".
const LISTED: usize = 20;

/// All differences between the tensors of a file and those of a model.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct MismatchReport {
    /// Expected names (as the file would spell them) that the file lacks.
    pub missing: Vec<String>,
    /// Names in the file that the model does not use.
    pub unexpected: Vec<String>,
    /// Name, expected shape, shape in the file.
    pub misshapen: Vec<(String, Vec<usize>, Vec<usize>)>,
}

impl MismatchReport {
    /// Whether there is nothing to report.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.misshapen.is_empty()
    }
}

impl std::fmt::Display for MismatchReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        group(f, "missing", &self.missing, |name| name.clone())?;
        group(f, "unexpected", &self.unexpected, |name| name.clone())?;
        group(f, "misshapen", &self.misshapen, |(name, expected, found)| {
            format!("{name}: expected {expected:?}, found {found:?}")
        })
    }
}

fn group<T>(
    f: &mut std::fmt::Formatter<'_>,
    title: &str,
    items: &[T],
    line: impl Fn(&T) -> String,
) -> std::fmt::Result {
    if items.is_empty() {
        return Ok(());
    }
    write!(f, "\n  {title} ({}):", items.len())?;
    for item in items.iter().take(LISTED) {
        write!(f, "\n    {}", line(item))?;
    }
    if items.len() > LISTED {
        write!(f, "\n    and {} more", items.len() - LISTED)?;
    }
    Ok(())
}
