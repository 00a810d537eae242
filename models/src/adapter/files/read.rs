//! Reading an adapter file of any style.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kernels::{DType, Device, Tensor, loha, lokr};

use super::error::AdapterFileError;
use super::keys::{KeyStyle, Part, tensor_of};
use super::peft::Settings;
use super::provenance::START_ON;
use super::sort::{Keys, Sorted, sort};
use super::{AdapterFile, LoraPair};
use crate::delta::{Change, DoraPair, Magnitude};
use crate::weights::Checkpoint;
use crate::{Expert, Result, names};

/// Modules quoted in a note.
const QUOTED: usize = 3;

/// Names of an adapter in a folder: PEFT's own, then diffusers'.
const IN_FOLDER: [&str; 3] =
    ["adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors"];

/// The adapter file that `path` means: itself, or the one in a PEFT or diffusers folder.
///
/// # Errors
/// A folder without one.
pub fn locate(path: &Path) -> Result<PathBuf, AdapterFileError> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let mut places = IN_FOLDER.iter().map(|name| path.join(name));
    places
        .find(|place| place.is_file())
        .ok_or_else(|| AdapterFileError::NoFile { path: path.to_owned(), looked: IN_FOLDER.join(", ") })
}

/// Reads the adapter at `path`, a file or a PEFT folder: ComfyUI/native, DiffSynth, diffusers, PEFT or kohya/musubi
/// keys. Every key must be understood. Alpha is the module's own key, else PEFT's settings where the file has
/// them, else the rank.
///
/// # Errors
/// [`AdapterFileError`], naming the key; [`crate::weights::WeightsError`] for a damaged file or values that are NaN
/// or infinite.
pub fn read(path: &Path) -> Result<AdapterFile> {
    let path = &locate(path)?;
    let file = Checkpoint::open(path)?;
    let Sorted { modules, style, expert } = sort(path, &file)?;
    let metadata = file.metadata().clone();
    let settings = Settings::find(path, &metadata, style)?;
    let mut reader =
        Reader { path, file: &file, style, settings, without_alpha: Vec::new(), zero_alpha: Vec::new() };
    let mut adapter = AdapterFile { style: Some(style), ..AdapterFile::default() };
    for (module, keys) in modules {
        reader.differences(&module, &keys, &mut adapter.differences)?;
        if let Some(change) = reader.change(&module, &keys)? {
            adapter.modules.insert(module, change);
        }
    }
    adapter.notes = reader.notes();
    if let Some(below) = metadata.get(START_ON) {
        adapter.notes.push(format!(
            "{}: it was trained on top of other adapters, which it does not hold: apply them beside it ({below})",
            path.display()
        ));
    }
    adapter.expert = expert.or_else(|| marked_expert(path, &metadata));
    adapter.metadata = metadata;
    Ok(adapter)
}

/// The expert named in a header or a file's name.
fn marked_expert(path: &Path, metadata: &BTreeMap<String, String>) -> Option<Expert> {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    metadata.get("tandem.expert").and_then(|text| Expert::in_name(text)).or_else(|| Expert::in_name(&stem))
}

/// A file that is being read.
struct Reader<'a> {
    path: &'a Path,
    file: &'a Checkpoint,
    style: KeyStyle,
    settings: Option<Settings>,
    without_alpha: Vec<String>,
    zero_alpha: Vec<String>,
}

impl Reader<'_> {
    /// The change of `module`; `None` where it has only differences.
    fn change(&mut self, module: &str, keys: &Keys) -> Result<Option<Change>> {
        let has = |parts: &[Part]| parts.iter().any(|part| keys.contains_key(part));
        let kinds = [
            has(&[Part::Down, Part::Up, Part::DoraScale, Part::MagnitudeVector, Part::UpBias]),
            has(&[Part::HadaW1A, Part::HadaW1B, Part::HadaW2A, Part::HadaW2B]),
            has(&[Part::LokrW1, Part::LokrW1A, Part::LokrW1B, Part::LokrW2, Part::LokrW2A, Part::LokrW2B]),
        ];
        let change = match kinds {
            [true, false, false] => self.low_rank(module, keys)?,
            [false, true, false] => self.loha(module, keys)?,
            [false, false, true] => self.lokr(module, keys)?,
            [false, false, false] => match keys.get(&Part::Alpha) {
                Some(found) => return Err(self.half(module, found, "factors").into()),
                None => return Ok(None),
            },
            _ => {
                let (path, module) = (self.path.to_owned(), module.to_owned());
                let keys = keys.values().cloned().collect();
                return Err(AdapterFileError::TwoKinds { path, module, keys }.into());
            }
        };
        Ok(Some(change))
    }

    /// A LoRA, or a DoRA.
    fn low_rank(&mut self, module: &str, keys: &Keys) -> Result<Change> {
        let [down, up] = match (keys.get(&Part::Down), keys.get(&Part::Up)) {
            (Some(down), Some(up)) => [down, up],
            (Some(down), None) => {
                return Err(self.half(module, down, "up factor (lora_B or lora_up)").into());
            }
            (None, Some(up)) => {
                return Err(self.half(module, up, "down factor (lora_A or lora_down)").into());
            }
            (None, None) => {
                let found = keys.values().next().cloned().unwrap_or_default(); // one of them brought us here
                return Err(self.half(module, &found, "factors").into());
            }
        };
        let (a, b) = (self.matrix(module, down)?, self.matrix(module, up)?);
        if a.dims()[0] != b.dims()[1] || a.elem_count() == 0 || b.elem_count() == 0 {
            let (a, b) = (a.dims().to_vec(), b.dims().to_vec());
            let (path, module) = (self.path.to_owned(), module.to_owned());
            return Err(AdapterFileError::RankMismatch { path, module, a, b }.into());
        }
        let alpha = self.alpha(module, keys, a.dims()[0])?;
        let pair = LoraPair { a, b, alpha };
        let out = pair.b.dims()[0];
        let magnitude = match (keys.get(&Part::DoraScale), keys.get(&Part::MagnitudeVector)) {
            (None, None) => return Ok(Change::Lora(pair)),
            (Some(base), None) => Magnitude::OfBase(self.lengths(base, out)?),
            (None, Some(merged)) => Magnitude::OfMerged(self.lengths(merged, out)?),
            (Some(first), Some(second)) => {
                let (path, module) = (self.path.to_owned(), module.to_owned());
                let (first, second) = (first.clone(), second.clone());
                return Err(AdapterFileError::Duplicate { path, module, first, second }.into());
            }
        };
        Ok(Change::Dora(DoraPair { pair, magnitude }))
    }

    fn loha(&mut self, module: &str, keys: &Keys) -> Result<Change> {
        let part = |part: Part, name: &'static str| match keys.get(&part) {
            Some(key) => self.matrix(module, key),
            None => {
                let found = keys.values().find(|key| key.contains("hada")).cloned().unwrap_or_default();
                Err(self.half(module, &found, name).into())
            }
        };
        let [w1_a, w1_b] = [part(Part::HadaW1A, "hada_w1_a")?, part(Part::HadaW1B, "hada_w1_b")?];
        let [w2_a, w2_b] = [part(Part::HadaW2A, "hada_w2_a")?, part(Part::HadaW2B, "hada_w2_b")?];
        let fits = |a: &Tensor, b: &Tensor| a.dims()[1] == b.dims()[0] && a.elem_count() * b.elem_count() > 0;
        let is_one = w1_a.dims()[0] == w2_a.dims()[0] && w1_b.dims()[1] == w2_b.dims()[1];
        if !is_one || !fits(&w1_a, &w1_b) || !fits(&w2_a, &w2_b) {
            let shapes = [&w1_a, &w1_b, &w2_a, &w2_b].map(|t| t.dims().to_vec());
            return Err(self.misfit(module, "LoHa", &shapes).into());
        }
        let rank = w1_b.dims()[0];
        let scale = self.alpha(module, keys, rank)?.map_or(1.0, |alpha| f64::from(alpha) / rank as f64);
        Ok(Change::Loha(loha::Factors { w1_a, w1_b, w2_a, w2_b, scale }))
    }

    fn lokr(&mut self, module: &str, keys: &Keys) -> Result<Change> {
        let half = |[whole, a, b]: [Part; 3], name: &'static str| -> Result<lokr::Half> {
            match (keys.get(&whole), keys.get(&a), keys.get(&b)) {
                (Some(whole), None, None) => Ok(lokr::Half::Full(self.matrix(module, whole)?)),
                (None, Some(a), Some(b)) => {
                    let (a, b) = (self.matrix(module, a)?, self.matrix(module, b)?);
                    if a.dims()[1] != b.dims()[0] || a.elem_count() * b.elem_count() == 0 {
                        return Err(self
                            .misfit(module, "LoKr", &[a.dims().to_vec(), b.dims().to_vec()])
                            .into());
                    }
                    Ok(lokr::Half::Low(a, b))
                }
                _ => {
                    let found = keys.values().find(|key| key.contains("lokr")).cloned().unwrap_or_default();
                    Err(self.half(module, &found, name).into())
                }
            }
        };
        let w1 = half([Part::LokrW1, Part::LokrW1A, Part::LokrW1B], "lokr_w1, whole or as a and b")?;
        let w2 = half([Part::LokrW2, Part::LokrW2A, Part::LokrW2B], "lokr_w2, whole or as a and b")?;
        let mut factors = lokr::Factors { w1, w2, scale: 1.0 };
        // LyCORIS and ComfyUI: without low-rank factors there is no rank, and alpha has no meaning.
        if let Some(rank) = Change::Lokr(factors.clone()).rank() {
            let alpha = self.alpha(module, keys, rank)?;
            factors.scale = alpha.map_or(1.0, |alpha| f64::from(alpha) / rank as f64);
        }
        Ok(Change::Lokr(factors))
    }

    /// The differences of whole tensors under the name of `module`.
    fn differences(&self, module: &str, keys: &Keys, into: &mut BTreeMap<String, Tensor>) -> Result<()> {
        for part in [Part::Diff, Part::DiffBias, Part::UpBias] {
            let Some(key) = keys.get(&part) else { continue };
            let mut tensor = self.file.tensor(key, DType::F32, &Device::Cpu)?;
            if part == Part::UpBias {
                let rank =
                    keys.get(&Part::Down).and_then(|key| self.file.shape(key)).map_or(1, |shape| shape[0]);
                let settings = self.settings.as_ref();
                let name = names::module_to_diffusers(module).unwrap_or_default();
                let alpha = settings.map_or(rank as f32, |settings| settings.alpha(&name, rank));
                tensor = (tensor * (f64::from(alpha) / rank as f64))?;
            }
            let name = tensor_of(module, part);
            if let Some(other) = into.insert(name, tensor).and(keys.get(&Part::DiffBias)) {
                let (path, module) = (self.path.to_owned(), module.to_owned());
                let (first, second) = (other.clone(), key.clone());
                return Err(AdapterFileError::Duplicate { path, module, first, second }.into());
            }
        }
        Ok(())
    }

    /// A factor as a matrix; the axes of the patch convolution's kernel count as one.
    fn matrix(&self, module: &str, key: &str) -> Result<Tensor> {
        let shape = self.file.shape(key).unwrap_or_default();
        let may_be_deep = module == "patch_embedding" && shape.len() > 2;
        if shape.len() != 2 && !may_be_deep {
            let (path, key, shape) = (self.path.to_owned(), key.to_owned(), shape.to_vec());
            return Err(AdapterFileError::NotAMatrix { path, key, shape }.into());
        }
        Ok(self.file.tensor(key, DType::F32, &Device::Cpu)?.flatten_from(1)?)
    }

    /// DoRA's magnitudes, one for each of `out` rows.
    fn lengths(&self, key: &str, out: usize) -> Result<Tensor> {
        let shape = self.file.shape(key).unwrap_or_default();
        let is_column = shape.first() == Some(&out) && shape.iter().product::<usize>() == out;
        if !is_column {
            let (path, key, shape) = (self.path.to_owned(), key.to_owned(), shape.to_vec());
            return Err(AdapterFileError::NotLengths { path, key, shape, out }.into());
        }
        Ok(self.file.tensor(key, DType::F32, &Device::Cpu)?.flatten_all()?)
    }

    /// Alpha by the file's own key, else by PEFT's settings; `None` means the rank.
    fn alpha(&mut self, module: &str, keys: &Keys, rank: usize) -> Result<Option<f32>> {
        let Some(key) = keys.get(&Part::Alpha) else {
            if let Some(settings) = &self.settings {
                let name = names::module_to_diffusers(module).unwrap_or_default();
                settings.check_rank(self.path, &name, rank)?;
                return Ok(Some(settings.alpha(&name, rank)));
            }
            if self.style == KeyStyle::Kohya {
                self.without_alpha.push(module.to_owned());
            }
            return Ok(None);
        };
        match read_alpha(self.path, self.file, key, self.style)? {
            Some(alpha) => Ok(Some(alpha)),
            None => {
                self.zero_alpha.push(module.to_owned());
                Ok(None)
            }
        }
    }

    /// Notes for the user.
    fn notes(&self) -> Vec<String> {
        let note = |modules: &[String], what: &str| {
            let quoted = modules[..modules.len().min(QUOTED)].join(", ");
            let more = if modules.len() > QUOTED { ", ..." } else { "" };
            (!modules.is_empty()).then(|| {
                format!(
                    "{}: {} modules {what}; alpha = rank is assumed, as in kohya's programs ({quoted}{more})",
                    self.path.display(),
                    modules.len()
                )
            })
        };
        [note(&self.without_alpha, "have no alpha"), note(&self.zero_alpha, "have an alpha of 0")]
            .into_iter()
            .flatten()
            .collect()
    }

    fn half(&self, module: &str, found: &str, missing: &'static str) -> AdapterFileError {
        let (path, module) = (self.path.to_owned(), module.to_owned());
        AdapterFileError::HalfPair { path, module, found: found.to_owned(), missing }
    }

    fn misfit(&self, module: &str, kind: &'static str, shapes: &[Vec<usize>]) -> AdapterFileError {
        let (path, module) = (self.path.to_owned(), module.to_owned());
        AdapterFileError::Misfit { path, module, kind, shapes: shapes.to_vec() }
    }
}

/// The alpha under `key`; `None` for the 0 of a kohya file, which its programs read as the rank.
pub(super) fn read_alpha(path: &Path, file: &Checkpoint, key: &str, style: KeyStyle) -> Result<Option<f32>> {
    let values: Vec<f32> = file.tensor(key, DType::F32, &Device::Cpu)?.flatten_all()?.to_vec1()?;
    match values[..] {
        [0.0] if style == KeyStyle::Kohya => Ok(None),
        [alpha] if alpha != 0.0 => Ok(Some(alpha)),
        _ => {
            let value = values.first().copied().unwrap_or(f32::NAN);
            Err(AdapterFileError::Alpha { path: path.to_owned(), key: key.to_owned(), value }.into())
        }
    }
}
