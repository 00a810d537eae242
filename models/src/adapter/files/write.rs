//! Writing an adapter file, verified by reading it back.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::encode::encode;
use super::error::AdapterFileError;
use super::{AdapterFile, Precision, Style, verify_written};
use crate::weights::{WeightsError, tensor_hash, write_atomically, write_safetensors};
use crate::{Error, Result};

/// The tensors of a PEFT folder.
const PEFT_FILE: &str = "adapter_model.safetensors";

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Written {
    /// Adapted modules.
    pub modules: usize,
    /// Size of the file in bytes.
    pub bytes: u64,
    /// The largest difference of any number of a factor, read back, from its source: the rounding of the number format.
    pub largest_error: f64,
}

/// Writes `adapter` at `path`, reads it back, compares every factor, and only then gives the file its name; a PEFT
/// adapter is a folder of that name. An older file at `path` stays whole until that moment. The header gets `adapter.metadata`.
///
/// # Errors
/// An adapter without modules, a module without a name in `style`, values that `precision` cannot hold, the file
/// system, or a read-back that differs.
pub fn write(path: &Path, adapter: &AdapterFile, style: Style, precision: Precision) -> Result<Written> {
    if adapter.modules.is_empty() && adapter.differences.is_empty() {
        return Err(AdapterFileError::Empty { path: path.to_owned() }.into());
    }
    let tensors = encode(path, adapter, style, precision)?;
    let mut metadata = adapter.metadata.clone();
    metadata.retain(|key, _| !STALE.contains(&key.as_str()));
    let unverified = Unverified::beside(path);
    let named = || tensors.iter().map(|(key, tensor)| (key.as_str(), tensor));
    if style.is_kohya() {
        // Tools of this family recognise a file by the hash of its tensors, which does not cover the header.
        let hash = tensor_hash(path, named())?;
        metadata.insert("modelspec.hash_sha256".to_owned(), format!("0x{hash}"));
        metadata.insert("sshs_model_hash".to_owned(), hash);
    }
    write_safetensors(&unverified.0, named(), &metadata).map_err(|error| match error {
        // Errors name the final path, not the temporary one.
        Error::Weights(WeightsError::Io { source, .. }) => {
            AdapterFileError::Io { path: path.to_owned(), source }.into()
        }
        error => error,
    })?;
    let io = |source| AdapterFileError::Io { path: path.to_owned(), source };
    let largest_error = verify_written(&unverified.0, adapter, precision)?;
    let bytes = std::fs::metadata(&unverified.0).map_err(io)?.len();
    let place = match style {
        Style::Peft => {
            std::fs::create_dir_all(path).map_err(io)?;
            path.join(PEFT_FILE)
        }
        _ => path.to_owned(),
    };
    std::fs::rename(&unverified.0, place).map_err(io)?;
    if style == Style::Peft {
        write_peft_config(path, adapter)?;
    }
    Ok(Written { modules: adapter.modules.len(), bytes, largest_error })
}

/// Strings of a header that only applied to the file that it was read from.
const STALE: [&str; 4] =
    ["lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"];

/// Writes `adapter_config.json` into `folder`. The scale is in the factors, so every alpha is its rank.
fn write_peft_config(folder: &Path, adapter: &AdapterFile) -> Result<()> {
    let rank = adapter.ranks().last().copied().unwrap_or(1);
    let name = |module: &String| crate::names::module_to_diffusers(module);
    let ranks = adapter.modules.iter().filter_map(|(module, change)| Some((name(module)?, change.rank()?)));
    let others: BTreeMap<String, usize> = ranks.filter(|(_, own)| *own != rank).collect();
    let targets: Vec<String> = adapter.modules.keys().filter_map(name).collect();
    let config = serde_json::json!({
        "peft_type": "LORA", "task_type": null, "base_model_name_or_path": adapter.metadata.get("tandem.base_model"),
        "r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others, "target_modules": targets,
        "lora_dropout": 0.0, "bias": "none", "use_rslora": false, "use_dora": adapter.kinds().contains(&"DoRA"),
        "init_lora_weights": true, "inference_mode": true,
    });
    let path = folder.join(super::peft::CONFIG_FILE);
    let write = |source| AdapterFileError::Io { path: path.clone(), source };
    write_atomically(&path, |out| Ok(out.write_all(format!("{config:#}\n").as_bytes()).map_err(write)?))
}

/// Most bytes of a file's name in the name of its temporary file: file systems allow 255 in total.
const NAME_BYTES: usize = 100;

/// A file that is removed when dropped, unless it was renamed.
struct Unverified(PathBuf);

impl Unverified {
    fn beside(path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let name = &name[..name.floor_char_boundary(NAME_BYTES)];
        Self(path.with_file_name(format!(".{name}.{}.unverified.tmp", std::process::id())))
    }
}

impl Drop for Unverified {
    fn drop(&mut self) {
        // Already renamed, or never written: not an error.
        let _ = std::fs::remove_file(&self.0);
    }
}
