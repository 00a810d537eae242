//! Checkpoints: everything that a run needs to go on bit for bit, in one file that is whole or not there, with a checksum of
//! everything in it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use data::Cursor;
use kernels::optimiser::State;
use kernels::{DType, Device, Tensor};
use models::expert::Expert;
use models::weights::{Checkpoint as TensorFile, WeightsError, write_safetensors};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::error::{Error, Result};
use crate::learning::optim::{Average, Globals, Rule, Saved};

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Optimiser steps made.
    pub step: u64,
    /// Next item.
    pub cursor: Cursor,
    /// Updates of each expert, where both are trained: an optimiser step may have none for one of them.
    #[serde(default, skip_serializing_if = "Updates::is_none")]
    pub updates: Updates,
    /// Length of the metrics file at this point, in bytes.
    pub metrics_bytes: u64,
    /// Length of the TensorBoard file at this point, in bytes.
    pub events_bytes: u64,
}

/// Updates made of each of two experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Updates {
    /// Of the one for high noise.
    pub high: u64,
    /// Of the one for low noise.
    pub low: u64,
}

impl Updates {
    fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Those of `expert`.
    pub fn of(&mut self, expert: Expert) -> &mut u64 {
        match expert {
            Expert::High => &mut self.high,
            Expert::Low => &mut self.low,
        }
    }
}

/// The name in a checkpoint of what is called `name` in a network, where two experts are trained: `high.<name>`.
fn state_name(expert: Option<Expert>, name: &str) -> String {
    expert.map_or_else(|| name.to_owned(), |expert| format!("{expert}.{name}"))
}

/// What the optimisers of all networks of a run keep, as one: each name behind that of its expert where there are two.
pub fn joined(networks: impl IntoIterator<Item = (Option<Expert>, Saved)>) -> Saved {
    let mut all = Saved::default();
    for (expert, Saved { rule, globals, tensors, average }) in networks {
        (all.rule, all.average) = (rule, average);
        all.globals.extend(globals.into_iter().map(|(name, value)| (state_name(expert, &name), value)));
        all.tensors.extend(tensors.into_iter().map(|(name, state)| (state_name(expert, &name), state)));
    }
    all
}

/// The part of `saved` that is `expert`'s, by the names that it has there.
pub fn part_of(saved: &Saved, expert: Option<Expert>) -> Saved {
    fn own<T: Clone>(all: &BTreeMap<String, T>, prefix: &str) -> BTreeMap<String, T> {
        let own = |(name, value): (&String, &T)| Some((name.strip_prefix(prefix)?.to_owned(), value.clone()));
        all.iter().filter_map(own).collect()
    }
    let prefix = state_name(expert, "");
    let (globals, tensors) = (own(&saved.globals, &prefix), own(&saved.tensors, &prefix));
    Saved { rule: saved.rule.clone(), globals, tensors, average: saved.average }
}

/// Header key of [`Progress`].
const PROGRESS: &str = "tandem.progress";
/// Header key of the optimiser: a JSON [`Header`]. Versions that had AdamW alone did not write it.
const OPTIMISER: &str = "tandem.optimiser";
/// Header key of the checksums: a JSON object with one for each tensor, and those of the texts of the other keys.
const CHECKSUMS: &str = "tandem.checksums";
/// What the parameter of a state is called behind its name; the others are called as the rule names them.
const PARAMETER: &str = "parameter";
/// What the average of a parameter is called behind its name.
const AVERAGE: &str = "average";
/// The rule of checkpoints that name none.
const FORMER_RULE: &str = "adamw";

/// What the header says of the optimiser.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    rule: String,
    globals: Globals,
    #[serde(default, skip_serializing_if = "is_none")]
    average: Average,
}

fn is_none(average: &Average) -> bool {
    *average == Average::None
}

/// The file of the checkpoint after `step` steps.
pub fn path(folder: &Path, step: u64) -> PathBuf {
    folder.join(format!("step-{step:06}.safetensors"))
}

/// Writes a checkpoint, then deletes all but the newest `keep_last`. The one before stays whole until this one is.
///
/// # Errors
/// When the file cannot be written: a full disk leaves no half-written file.
pub fn save(folder: &Path, progress: Progress, saved: &Saved, keep_last: usize) -> Result<PathBuf> {
    let mut tensors = Vec::new();
    for (name, state) in &saved.tensors {
        let (names, mut slots) = (slots(&saved.rule, &state.parameter)?, state.slots.as_slice());
        tensors.push((format!("{name}.{PARAMETER}"), &state.parameter));
        if let (Average::Kept, Some((average, own))) = (saved.average, slots.split_last()) {
            tensors.push((format!("{name}.{AVERAGE}"), average));
            slots = own;
        }
        tensors.extend(names.iter().zip(slots).map(|(slot, tensor)| (format!("{name}.{slot}"), tensor)));
    }
    let (rule, globals, average) = (saved.rule.clone(), saved.globals.clone(), saved.average);
    let optimiser = Header { rule, globals, average };
    let mut header =
        BTreeMap::from([(PROGRESS.to_owned(), json(&progress)?), (OPTIMISER.to_owned(), json(&optimiser)?)]);
    let mut checksums: Checksums =
        header.iter().map(|(key, text)| (key.clone(), digits(xxh3_128(text.as_bytes())))).collect();
    for (name, tensor) in &tensors {
        checksums.insert(name.clone(), checksum(name, tensor)?);
    }
    header.insert(CHECKSUMS.to_owned(), json(&checksums)?);
    let path = path(folder, progress.step);
    let views = tensors.iter().map(|(name, tensor)| (name.as_str(), *tensor));
    write_safetensors(&path, views, &header)?;
    for old in all(folder)?.into_iter().rev().skip(keep_last) {
        fs::remove_file(&old).map_err(|source| Error::Io { action: "delete", path: old, source })?;
    }
    Ok(path)
}

/// Reads a checkpoint and compares everything in it with its checksums. Checkpoints of versions without checksums are taken
/// as they are.
///
/// # Errors
/// [`Error::NotACheckpoint`] for another file, [`Error::DamagedCheckpoint`] with what is damaged and the checkpoint before,
/// [`Error::ForeignCheckpoint`] for one of an optimiser that this version does not have.
pub fn load(path: &Path) -> Result<(Progress, Saved)> {
    let damaged = |why: String| Error::DamagedCheckpoint { path: path.to_owned(), why, before: before(path) };
    let foreign = || Error::NotACheckpoint { path: path.to_owned() };
    let file = TensorFile::open(path).map_err(|error| unreadable(path, models::Error::from(error)))?;
    let header = file.metadata();
    let Some(text) = header.get(PROGRESS) else {
        let is_one = header.contains_key(CHECKSUMS);
        return Err(if is_one {
            damaged("its position in the run is missing".to_owned())
        } else {
            foreign()
        });
    };
    let checksums = checksums(header, file.names()).map_err(damaged)?;
    let progress = serde_json::from_str(text).map_err(|_| foreign())?;
    let optimiser = match header.get(OPTIMISER) {
        Some(text) => serde_json::from_str(text).map_err(|_| foreign())?,
        None => {
            let (rule, globals) = (FORMER_RULE.to_owned(), Globals::new());
            Header { rule, globals, average: Average::None }
        }
    };
    let read = |name: String| -> Result<Tensor> {
        // Codes of moments in 8 bits stay what they are.
        let whole =
            file.dtype(&name).filter(|stored| !stored.is_float()).and_then(|stored| stored.to_candle());
        let dtype = whole.unwrap_or(DType::F32);
        let tensor = file.tensor(&name, dtype, &Device::Cpu).map_err(|error| unreadable(path, error))?;
        match checksums.get(&name) {
            Some(expected) if *expected != checksum(&name, &tensor)? => {
                Err(damaged(format!("the tensor `{name}` does not match its checksum")))
            }
            _ => Ok(tensor),
        }
    };
    if Rule::slots_of(&optimiser.rule, 0).is_none() {
        return Err(Error::ForeignCheckpoint);
    }
    let mut tensors = BTreeMap::new();
    for name in file.names().filter_map(|name| name.strip_suffix(PARAMETER)?.strip_suffix('.')) {
        let parameter = read(format!("{name}.{PARAMETER}"))?;
        let average = (optimiser.average == Average::Kept).then_some(&AVERAGE);
        let slots = slots(&optimiser.rule, &parameter)?.iter().chain(average);
        let slots = slots.map(|slot| format!("{name}.{slot}"));
        let slots = slots.filter(|slot| file.contains(slot)).map(read).collect::<Result<_>>()?;
        tensors.insert(name.to_owned(), State { parameter, slots });
    }
    let Header { rule, globals, average } = optimiser;
    Ok((progress, Saved { rule, globals, tensors, average }))
}

/// A digest of all numbers of `saved` with their names.
///
/// # Errors
/// A device that fails.
pub fn digest(saved: &Saved) -> Result<Vec<u8>> {
    super::start::digest(saved, super::start::Digested::Everything)
}

/// What the rule called `rule` can keep of `parameter`.
///
/// # Errors
/// [`Error::ForeignCheckpoint`] for a rule that is not here.
fn slots(rule: &str, parameter: &Tensor) -> Result<&'static [&'static str]> {
    Rule::slots_of(rule, parameter.rank()).ok_or(Error::ForeignCheckpoint)
}

fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::PlanText { why: e.to_string() })
}

/// The checksums in `header` of a checkpoint with the tensors `names`, after a look at the header's own texts; none in one of
/// a version without them.
///
/// # Errors
/// What is damaged.
fn checksums<'a>(
    header: &BTreeMap<String, String>,
    names: impl Iterator<Item = &'a str>,
) -> Result<Checksums, String> {
    let Some(text) = header.get(CHECKSUMS) else {
        return if header.len() == 1 {
            Ok(Checksums::new())
        } else {
            Err("its checksums are missing".to_owned())
        };
    };
    let mut checksums: Checksums =
        serde_json::from_str(text).map_err(|_| "its checksums cannot be read".to_owned())?;
    for (key, what) in [(PROGRESS, "its position in the run"), (OPTIMISER, "what it says of the optimiser")] {
        let found = header.get(key).map(|text| digits(xxh3_128(text.as_bytes())));
        if checksums.remove(key) != found {
            return Err(format!("{what} does not match its checksum"));
        }
    }
    match checksums.keys().map(String::as_str).eq(names) {
        true => Ok(checksums),
        false => Err("it holds other tensors than it has checksums for".to_owned()),
    }
}

/// Checksums by name.
type Checksums = BTreeMap<String, String>;

/// Values that are hashed at once: few enough that their memory is used again and again.
const PIECE: usize = 1 << 14;

/// XXH3 over name, shape and values of an f32 tensor: finds damage, and keeps up with the disk. Nobody is to be kept from
/// forging a checkpoint, who could as well write another adapter.
fn checksum(name: &str, tensor: &Tensor) -> Result<String> {
    let mut hash = Xxh3::new();
    let shape: Vec<String> = tensor.dims().iter().map(usize::to_string).collect();
    hash.update(format!("{name}\0{}\0", shape.join("x")).as_bytes());
    let flat = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?;
    let count = flat.elem_count();
    for begin in (0..count).step_by(PIECE) {
        let piece = flat.narrow(0, begin, PIECE.min(count - begin))?.to_vec1::<f32>()?;
        let bytes: Vec<[u8; 4]> = piece.into_iter().map(f32::to_le_bytes).collect();
        hash.update(bytes.as_flattened());
    }
    Ok(digits(hash.digest128()))
}

fn digits(hash: u128) -> String {
    format!("{hash:032x}")
}

/// A file that cannot be read as a checkpoint: damaged, unless the system refused to read it.
fn unreadable(path: &Path, error: models::Error) -> Error {
    let why = match &error {
        models::Error::Weights(WeightsError::Io { .. }) => return Error::from(error),
        models::Error::Weights(WeightsError::File { .. }) => {
            "its header does not describe what follows (it was cut off or overwritten)".to_owned()
        }
        models::Error::Weights(WeightsError::NotFinite { name, .. }) => {
            format!("the tensor `{name}` holds a value that is not finite")
        }
        _ => error.to_string(),
    };
    Error::DamagedCheckpoint { path: path.to_owned(), why, before: before(path) }
}

/// The newest checkpoint that is older than the one at `path`.
fn before(path: &Path) -> Option<PathBuf> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let all = all(folder).ok()?;
    let at = all.iter().position(|other| other.file_name() == path.file_name())?;
    all.into_iter().take(at).next_back()
}

/// The steps of the checkpoints of a folder, ascending.
///
/// # Errors
/// A folder that cannot be listed.
pub fn steps(folder: &Path) -> Result<Vec<u64>> {
    let step = |path: PathBuf| path.file_stem()?.to_str()?.strip_prefix("step-")?.parse().ok();
    Ok(all(folder)?.into_iter().filter_map(step).collect())
}

/// The newest checkpoint of a folder.
pub fn newest(folder: &Path) -> Result<Option<PathBuf>> {
    Ok(all(folder)?.pop())
}

/// The checkpoints of a folder, oldest first.
fn all(folder: &Path) -> Result<Vec<PathBuf>> {
    let io = |source| Error::Io { action: "list", path: folder.to_owned(), source };
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let step = name.strip_prefix("step-").and_then(|rest| rest.strip_suffix(".safetensors"));
        if let Some(step) = step.and_then(|step| step.parse::<u64>().ok()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}
