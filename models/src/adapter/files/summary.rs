//! What an adapter file holds, from its header alone.

use std::collections::BTreeMap;
use std::path::Path;

use super::KeyStyle;
use super::read::{read_alpha, sort_keys};
use crate::Result;
use crate::weights::{Checkpoint, StoredDType};

/// The factors of one module, by their shapes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ModuleSummary {
    /// Width of the module's input.
    pub input: usize,
    /// Width of its output.
    pub output: usize,
    /// Rank of the factors.
    pub rank: usize,
    /// The module's own alpha, where the file has one.
    pub alpha: Option<f32>,
    /// Type of the factors in the file.
    pub dtype: StoredDType,
}

/// What an adapter file holds.
#[derive(Debug, Clone)]
pub struct AdapterSummary {
    /// How its keys are spelt.
    pub style: KeyStyle,
    /// Its modules by official name.
    pub modules: BTreeMap<String, ModuleSummary>,
}

/// Summarises `file`. Of its tensors only the alphas are read, which are single numbers.
///
/// # Errors
/// As [`super::read`], where the header shows it: keys that are not understood, half pairs.
pub fn summary(path: &Path, file: &Checkpoint) -> Result<AdapterSummary> {
    let (found, style) = sort_keys(path, file)?;
    let mut modules = BTreeMap::new();
    for (module, keys) in found {
        let alpha = keys.alpha.as_ref().map(|key| read_alpha(path, file, key)).transpose()?;
        let (down, up) = keys.pair(path, &module)?;
        let (a, b) = (file.shape(&down).unwrap_or_default(), file.shape(&up).unwrap_or_default());
        let axis = |shape: &[usize], axis: usize| shape.get(axis).copied().unwrap_or(0);
        let dtype = file.dtype(&down).unwrap_or(StoredDType::F32);
        let (input, output, rank) = (axis(a, 1), axis(b, 0), axis(a, 0));
        modules.insert(module, ModuleSummary { input, output, rank, alpha, dtype });
    }
    Ok(AdapterSummary { style, modules })
}
