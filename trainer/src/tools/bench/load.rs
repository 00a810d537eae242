//! Reading a checkpoint onto devices.

use std::path::{Path, PathBuf};

use models::adapter::Adapters;
use models::dit::Base;
use models::weights::{Checkpoint, Frozen, TensorSpec, Weights};
use serde_json::{Value, json};

use super::checkpoint::Made;
use super::meter::{Measured, Meter, host_peak_gib};
use super::model::dit_preset;
use super::{Repeats, rounded};
use crate::base::{DitFiles, Part, locate};
use crate::error::Result;
use crate::machine::devices::DevicesConfig;
use crate::machine::precision::in_words;
use crate::pipeline::Pipeline;

/// What is loaded.
#[derive(Debug, Clone, Copy)]
pub enum LoadSource<'a> {
    /// A DiT of published sizes by name: written into a folder below this one first, and removed in the end.
    Preset(&'a str, &'a Path),
    /// A checkpoint: a DiT's folder, or a file of any weights.
    Checkpoint(&'a Path),
}

/// Loading a checkpoint: a DiT as training loads it, onto its stages; other weights one by one onto the first
/// device, each dropped again.
///
/// # Errors
/// A checkpoint that cannot be made or read.
pub fn load(source: LoadSource, base: Base, devices: &DevicesConfig, repeats: Repeats) -> Result<Value> {
    match source {
        LoadSource::Preset(name, scratch) => {
            let made = Made::new(&dit_preset(name)?, scratch)?;
            report(name, made.folder(), base, devices, repeats)
        }
        LoadSource::Checkpoint(path) => report(&path.display().to_string(), path, base, devices, repeats),
    }
}

fn report(name: &str, path: &Path, base: Base, devices: &DevicesConfig, repeats: Repeats) -> Result<Value> {
    let is_dit = |at: &PathBuf| Checkpoint::open(at).is_ok_and(|own| own.contains("patch_embedding.weight"));
    let loaded = match locate(path, Part::Dit).ok().filter(is_dit) {
        Some(dit) => load_dit(&dit, base, devices, repeats)?,
        None => load_any(path, base.frozen, devices, repeats)?,
    };
    let Loaded { measured, bytes, tensors } = loaded;
    Ok(json!({
        "what": "load", "model": name, "gpus": measured.gpus, "weights": in_words(base.frozen), "tensors": tensors,
        "bytes": bytes, "s": rounded(measured.seconds, 4),
        "gb_s": rounded(bytes as f64 / measured.seconds / 1e9, 3), "peak_gib": measured.peak_gib,
        "host_peak_gib": host_peak_gib(),
    }))
}

struct Loaded {
    measured: Measured,
    bytes: u64,
    tensors: usize,
}

fn load_dit(dit: &Path, base: Base, devices: &DevicesConfig, repeats: Repeats) -> Result<Loaded> {
    let file = Checkpoint::open(dit).map_err(models::Error::from)?;
    let (bytes, tensors) = (file.total_bytes(), file.entries().count());
    let (config, weights) = DitFiles::at(dit, None)?.open()?;
    let split = devices.settle(config.layers)?.open()?;
    let meter = Meter::of(split.iter().map(|(device, _)| device));
    let none = Adapters::default();
    let measured =
        meter.measure(repeats, || Pipeline::load(&weights, &config, &split, &none, base).map(drop))?;
    Ok(Loaded { measured, bytes, tensors })
}

fn load_any(path: &Path, frozen: Frozen, devices: &DevicesConfig, repeats: Repeats) -> Result<Loaded> {
    let file = Checkpoint::open(path).map_err(models::Error::from)?;
    let bytes = file.total_bytes();
    let floats = file.entries().filter(|(_, entry)| entry.dtype.is_float());
    let specs: Vec<TensorSpec> =
        floats.map(|(name, entry)| TensorSpec::new(name, entry.shape.as_slice())).collect();
    let weights = Weights::from_checkpoint(file, &specs, |_| None, |_| true).map_err(models::Error::from)?;
    let split = devices.settle(devices.stages.len().max(1))?.open()?;
    let (device, meter) = (&split[0].0, Meter::of([&split[0].0])); // a settled config has a stage
    let measured = meter.measure(repeats, || {
        for TensorSpec { name, shape, .. } in &specs {
            match shape.len() {
                2 => drop(weights.matrix(name, frozen, device)?),
                _ => drop(weights.tensor(name, frozen.compute, device)?),
            }
        }
        Ok(())
    })?;
    Ok(Loaded { measured, bytes, tensors: specs.len() })
}
