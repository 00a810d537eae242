//! Reading an adapter file of any style.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::error::AdapterFileError;
use super::keys::{self, KeyStyle, Meaning, Part};
use super::peft::Settings;
use super::{AdapterFile, LoraPair};
use crate::weights::Checkpoint;
use crate::{Result, names};

/// Keys quoted in an error.
const EXAMPLES: usize = 4;

/// The keys of one module's parts.
#[derive(Default)]
pub(super) struct Keys {
    down: Option<String>,
    up: Option<String>,
    pub(super) alpha: Option<String>,
}

impl Keys {
    /// The keys of A and B.
    pub(super) fn pair(&self, path: &Path, module: &str) -> Result<(String, String), AdapterFileError> {
        let half = |found: &Option<String>, missing| AdapterFileError::HalfPair {
            path: path.to_owned(),
            module: module.to_owned(),
            found: found.clone().unwrap_or_default(),
            missing,
        };
        match (&self.down, &self.up) {
            (Some(down), Some(up)) => Ok((down.clone(), up.clone())),
            (Some(_), None) => Err(half(&self.down, "up factor (lora_B or lora_up)")),
            (None, Some(_)) => Err(half(&self.up, "down factor (lora_A or lora_down)")),
            (None, None) => Err(half(&self.alpha, "factors")),
        }
    }
}

/// Reads the adapter at `path`: ComfyUI/native, DiffSynth, diffusers, PEFT or kohya/musubi keys. Every key of the
/// file must be understood. Alpha is the module's own key, else PEFT's settings where the file has them, else `None`.
///
/// # Errors
/// [`AdapterFileError`], naming the key; [`crate::weights::WeightsError`] for a damaged file or values that are NaN
/// or infinite.
pub fn read(path: &Path) -> Result<AdapterFile> {
    let file = Checkpoint::open(path)?;
    let (found, style) = sort_keys(path, &file)?;
    let metadata = file.metadata().clone();
    let settings = Settings::find(path, &metadata, style)?;
    let mut modules = BTreeMap::new();
    for (module, keys) in found {
        let mut pair = read_pair(path, &file, &module, keys)?;
        if let (None, Some(settings)) = (pair.alpha, &settings) {
            let name = names::module_to_diffusers(&module).unwrap_or_default();
            pair.alpha = Some(settings.alpha(&name, pair.rank()));
        }
        modules.insert(module, pair);
    }
    Ok(AdapterFile { modules, metadata, style: Some(style) })
}

/// The keys by module, and the style of the first one.
pub(super) fn sort_keys(
    path: &Path,
    file: &Checkpoint,
) -> Result<(BTreeMap<String, Keys>, KeyStyle), AdapterFileError> {
    let mut modules: BTreeMap<String, Keys> = BTreeMap::new();
    let (mut unknown, mut style) = (Vec::new(), None);
    for key in file.names() {
        let Some(Meaning { module, part, style: spelt }) = keys::parse(key) else {
            unknown.push(key.to_owned());
            continue;
        };
        style.get_or_insert(spelt);
        let keys = modules.entry(module.clone()).or_default();
        let slot = match part {
            Part::Down => &mut keys.down,
            Part::Up => &mut keys.up,
            Part::Alpha => &mut keys.alpha,
        };
        if let Some(first) = slot.replace(key.to_owned()) {
            let (path, second) = (path.to_owned(), key.to_owned());
            return Err(AdapterFileError::Duplicate { path, module, first, second });
        }
    }
    match style {
        Some(style) if unknown.is_empty() => Ok((modules, style)),
        None if !unknown.iter().any(|key| key.contains("lora") || foreign_kind(key).is_some()) => {
            Err(AdapterFileError::NotAnAdapter { path: path.to_owned(), keys: unknown.len() })
        }
        _ => Err(unknown_keys(path, unknown)),
    }
}

fn unknown_keys(path: &Path, mut unknown: Vec<String>) -> AdapterFileError {
    let hint = unknown.iter().find_map(|key| foreign_kind(key));
    let count = unknown.len();
    unknown.truncate(EXAMPLES);
    AdapterFileError::UnknownKeys {
        path: path.to_owned(),
        count,
        examples: unknown,
        hint: hint.unwrap_or("they name no module of the Wan transformer; is the adapter for another model?"),
    }
}

/// Adapters of other kinds, by the words in their keys.
fn foreign_kind(key: &str) -> Option<&'static str> {
    let ends = |words: &[&str]| words.iter().any(|word| key.contains(word));
    if ends(&[".hada_", ".lokr_"]) {
        Some("LoHa and LoKr adapters cannot be used; convert it to LoRA first")
    } else if ends(&[".dora_scale", ".lora_magnitude_vector"]) {
        Some("DoRA adapters cannot be used; convert it to LoRA first")
    } else if ends(&[".diff", ".lora_B.bias", ".set_weight"]) {
        Some("differences of whole weights and of biases cannot be used; extract a plain LoRA first")
    } else {
        None
    }
}

fn read_pair(path: &Path, file: &Checkpoint, module: &str, keys: Keys) -> Result<LoraPair> {
    let (down, up) = keys.pair(path, module)?;
    let (a, b) = (matrix(path, file, &down)?, matrix(path, file, &up)?);
    if a.dims()[0] != b.dims()[1] || a.elem_count() == 0 || b.elem_count() == 0 {
        let (a, b) = (a.dims().to_vec(), b.dims().to_vec());
        let (path, module) = (path.to_owned(), module.to_owned());
        return Err(AdapterFileError::RankMismatch { path, module, a, b }.into());
    }
    let alpha = keys.alpha.map(|key| read_alpha(path, file, &key)).transpose()?;
    Ok(LoraPair { a, b, alpha })
}

fn matrix(path: &Path, file: &Checkpoint, key: &str) -> Result<Tensor> {
    let shape = file.shape(key).unwrap_or_default();
    if shape.len() != 2 {
        let (path, key, shape) = (path.to_owned(), key.to_owned(), shape.to_vec());
        return Err(AdapterFileError::NotAMatrix { path, key, shape }.into());
    }
    file.tensor(key, DType::F32, &Device::Cpu)
}

pub(super) fn read_alpha(path: &Path, file: &Checkpoint, key: &str) -> Result<f32> {
    let values: Vec<f32> = file.tensor(key, DType::F32, &Device::Cpu)?.flatten_all()?.to_vec1()?;
    match values[..] {
        [alpha] if alpha != 0.0 => Ok(alpha),
        _ => {
            let value = values.first().copied().unwrap_or(f32::NAN);
            Err(AdapterFileError::Alpha { path: path.to_owned(), key: key.to_owned(), value }.into())
        }
    }
}
