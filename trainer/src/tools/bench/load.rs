//! Reading a checkpoint onto devices, beside what limits it: reading the files, and the links of the devices.
//!
//! What it should take, for files in the page cache, is 1.3 times bytes / link at most: the copy out of the page cache is shared by all
//! cores and overlaps with the copies to the devices, which are made in pieces of 2 MiB; several layers are read at once, so that one's
//! tensors are allocated and quantised while another's are copied. 28.6 GB are 0.7 s at the 55 GB/s of PCIe 5 x16, 1.5 s at the
//! 25 GB/s of PCIe 4, as far as the cores read that fast (`read_gb_s`). The load that writes the cache of quantised weights should take
//! as long as their copies to host memory more (`first_s`), and its file is on the disk later (`written_s`).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Instant;

use kernels::Device;
use kernels::fill::{PIECE, link_speed};

use models::adapter::Adapters;
use models::dit::Base;
use models::weights::{CacheOutcome, Checkpoint, QuantisedFile, Storage, TensorSpec, Weights};
use serde_json::{Value, json};

use super::checkpoint::Made;
use super::meter::{Measured, Meter, host_peak_gib};
use super::model::dit_preset;
use super::{Repeats, rounded};
use crate::base::{DitFiles, Part, locate};
use crate::error::{Error, Result};
use crate::machine::devices::DevicesConfig;
use crate::machine::precision::in_words;
use crate::pipeline::Pipeline;

/// What is loaded.
#[derive(Debug, Clone, Copy)]
pub enum LoadSource<'a> {
    /// A DiT of published sizes by name: written into a folder below this one first, and removed in the end.
    Preset(&'a str, &'a Path),
    /// The same, written into this folder, where it stays.
    Written(&'a str, &'a Path),
    /// A checkpoint: a DiT's folder, or a file of any weights.
    Checkpoint(&'a Path),
}

/// How a checkpoint is loaded.
#[derive(Debug, Clone, Copy)]
pub struct LoadBench<'a> {
    /// How weights are stored on the devices.
    pub base: Base,
    /// The devices.
    pub devices: &'a DevicesConfig,
    /// The folder of quantised weights, which are written before the first load that counts.
    pub quantised: Option<&'a Path>,
    /// How often.
    pub repeats: Repeats,
}

/// Loading a checkpoint: a DiT as training loads it, onto its stages; other weights one by one onto the first
/// device, each dropped again.
///
/// # Errors
/// A checkpoint that cannot be made or read.
pub fn load(source: LoadSource, bench: LoadBench) -> Result<Value> {
    match source {
        LoadSource::Preset(name, scratch) => {
            let made = Made::new(&dit_preset(name)?, scratch)?;
            report(name, made.folder(), bench)
        }
        LoadSource::Written(name, folder) => {
            let made = Made::kept(&dit_preset(name)?, folder)?;
            report(name, made.folder(), bench)
        }
        LoadSource::Checkpoint(path) => report(&path.display().to_string(), path, bench),
    }
}

fn report(name: &str, path: &Path, bench: LoadBench) -> Result<Value> {
    let is_dit = |at: &PathBuf| Checkpoint::open(at).is_ok_and(|own| own.contains("patch_embedding.weight"));
    let loaded = match locate(path, Part::Dit).ok().filter(is_dit) {
        Some(dit) => load_dit(&dit, bench)?,
        None => load_any(path, bench)?,
    };
    let Loaded { measured, bytes, tensors, read_speed, link_speed, first } = loaded;
    let speed = bytes as f64 / measured.seconds;
    let mut report = json!({
        "what": "load", "model": name, "gpus": measured.gpus, "weights": in_words(bench.base.frozen), "tensors": tensors,
        "bytes": bytes, "s": rounded(measured.seconds, 4), "gb_s": rounded(speed / 1e9, 3),
        "read_gb_s": rounded(read_speed / 1e9, 3),
        "link_gb_s": link_speed.map(|link| rounded(link / 1e9, 3)),
        "times_link": link_speed.map(|link| rounded(link / speed, 3)),
        "peak_gib": measured.peak_gib, "host_peak_gib": host_peak_gib(),
    });
    if let Some(First { loaded, written }) = first {
        report["first_s"] = json!(rounded(loaded, 4));
        report["written_s"] = json!(rounded(written, 4));
    }
    Ok(report)
}

struct Loaded {
    measured: Measured,
    bytes: u64,
    tensors: usize,
    /// Bytes a second from the files to host memory.
    read_speed: f64,
    /// Bytes a second from pinned host memory to all GPUs at once.
    link_speed: Option<f64>,
    /// Of the load before, which wrote the cache of quantised weights.
    first: Option<First>,
}

/// Seconds of a load from its start, until the weights were on the devices and until their cache was on the disk.
struct First {
    loaded: f64,
    written: f64,
}

/// Seconds for which links are measured.
const LINK_SECONDS: f64 = 0.5;

/// Bytes a second over the links of those of `devices` that are GPUs, all at once.
fn links<'a>(devices: impl IntoIterator<Item = &'a Device>) -> Result<Option<f64>> {
    let mut gpus: Vec<&Device> = Vec::new();
    for device in devices.into_iter().filter(|device| device.is_cuda()) {
        if gpus.iter().all(|other| other.location() != device.location()) {
            gpus.push(device);
        }
    }
    let together = Barrier::new(gpus.len());
    let measure = |device: &Device| {
        together.wait();
        link_speed(device, LINK_SECONDS)
    };
    let speeds = thread::scope(|scope| {
        let threads: Vec<_> = gpus.iter().map(|gpu| scope.spawn(|| measure(gpu))).collect();
        let join = |t: thread::ScopedJoinHandle<_>| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p));
        threads.into_iter().map(join).collect::<kernels::Result<Vec<_>>>()
    })?;
    Ok(speeds.into_iter().flatten().reduce(|a, b| a + b))
}

/// Bytes a second that all cores read from the files of `checkpoint`, in pieces as loading reads them.
fn reading(checkpoint: &Checkpoint) -> Result<f64> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Io { action: "read", path, source }
    };
    let (start, mut bytes) = (Instant::now(), 0);
    for path in checkpoint.files() {
        let file = File::open(path).map_err(io(path))?;
        let (length, next) = (file.metadata().map_err(io(path))?.len(), AtomicU64::new(0));
        let read = || -> Result<()> {
            let mut piece = vec![0; PIECE];
            loop {
                let at = next.fetch_add(PIECE as u64, Ordering::Relaxed);
                let Some(left) = length.checked_sub(at).filter(|left| *left > 0) else { return Ok(()) };
                let part = &mut piece[..left.min(PIECE as u64) as usize];
                file.read_exact_at(part, at).map_err(io(path))?;
            }
        };
        let cores = thread::available_parallelism().map_or(1, usize::from);
        thread::scope(|scope| {
            let threads: Vec<_> = (0..cores).map(|_| scope.spawn(read)).collect();
            let join =
                |t: thread::ScopedJoinHandle<_>| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p));
            threads.into_iter().try_for_each(join)
        })?;
        bytes += length;
    }
    Ok(bytes as f64 / start.elapsed().as_secs_f64())
}

fn load_dit(dit: &Path, LoadBench { base, devices, quantised, repeats }: LoadBench) -> Result<Loaded> {
    let file = Checkpoint::open(dit).map_err(models::Error::from)?;
    let (mut bytes, tensors) = (file.total_bytes(), file.entries().count());
    let files = DitFiles::at(dit, None)?;
    let (config, _) = files.open()?;
    let split = devices.settle(config.layers)?.open()?;
    let meter = Meter::of(split.iter().map(|(device, _)| device));
    let none = Adapters::default();
    let open = || -> Result<(Weights, Option<Arc<QuantisedFile>>)> {
        let (config, weights) = files.open()?;
        let (Some(folder), Storage::Quantised(format)) = (quantised, base.frozen.storage) else {
            return Ok((weights, None));
        };
        let cache = QuantisedFile::open(folder, &weights, &config.tensors(), format, 0)?;
        let cache = cache.map(|file| Arc::new(file.behind(u64::MAX)));
        Ok(match &cache {
            Some(file) => (weights.cached_in(file.clone()), cache),
            None => (weights, None),
        })
    };
    let written = |cache: &QuantisedFile| match cache.finish() {
        CacheOutcome::NotWritten(why) => Err(Error::from(kernels::Error::msg(why))),
        _ => Ok(()),
    };
    // All that a start does with the files.
    let load = || -> Result<Option<Arc<QuantisedFile>>> {
        let (weights, cache) = open()?;
        drop(Pipeline::load(&weights, &config, &split, &none, base)?);
        Ok(cache)
    };
    let start = Instant::now();
    let first = match quantised.map(|_| load()).transpose()?.flatten() {
        Some(cache) => {
            bytes = bytes - cache.replaces() + cache.bytes();
            let loaded = start.elapsed().as_secs_f64();
            written(&cache)?;
            Some(First { loaded, written: start.elapsed().as_secs_f64() })
        }
        None => None,
    };
    let measured = meter.measure(repeats, || load()?.map_or(Ok(()), |cache| written(&cache)))?;
    let link_speed = links(split.iter().map(|(device, _)| device))?;
    Ok(Loaded { measured, bytes, tensors, read_speed: reading(&file)?, link_speed, first })
}

fn load_any(
    path: &Path,
    LoadBench { base: Base { frozen, .. }, devices, repeats, .. }: LoadBench,
) -> Result<Loaded> {
    let file = Checkpoint::open(path).map_err(models::Error::from)?;
    let (bytes, read_speed) = (file.total_bytes(), reading(&file)?);
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
    let link_speed = links([device])?;
    Ok(Loaded { measured, bytes, tensors: specs.len(), read_speed, link_speed, first: None })
}
