//! Speed and memory of single parts, each told as one JSON object, to be held against other implementations.
//!
//! Field names are common ones: `s_per_step`, `useful_tflops` (recomputation not counted), `peak_gib`. The device is a
//! parameter of every measurement; weights may be made from a seed, because only shapes matter here.

mod dit;
mod model;
mod parts;

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use kernels::random::Key;
use serde_json::{Value, json};

pub use dit::{DitBench, forward, step};
pub use model::{DIT_PRESETS, DitSource, dit_preset, umt5_preset, vae_preset};
pub use parts::{VaeBench, attention, load, text, usual_tiles, vae};

use crate::error::Result;

/// How often a measurement is made: the median counts.
#[derive(Debug, Clone, Copy)]
pub struct Repeats {
    /// Runs before the first one that counts.
    pub warmup: usize,
    /// Runs that count.
    pub iters: usize,
}

/// Width, height and frames of a clip in pixels.
#[derive(Debug, Clone, Copy)]
pub struct ClipSize {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// 4n+1.
    pub frames: usize,
}

impl ClipSize {
    /// `height x width`.
    fn label(self) -> String {
        format!("{}x{}", self.height, self.width)
    }
}

/// Median seconds of a run of `work`.
///
/// # Errors
/// The first error of `work`.
fn timed(repeats: Repeats, device: &Device, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    for _ in 0..repeats.warmup {
        work()?;
    }
    device.synchronize()?;
    let mut seconds = Vec::new();
    for _ in 0..repeats.iters.max(1) {
        let start = Instant::now();
        work()?;
        device.synchronize()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

/// Normal numbers of the stream `name`.
fn normal(name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
    let values = Key::new(0, name, &[]).normals(shape.iter().product());
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(DType::F32)?.to_device(device)?)
}

/// Forgets the peak so far, where the system can: then a measurement tells its own.
fn reset_peak() {
    // Refused without privileges on some systems: the peak is then that of the process.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Largest memory of the process in GiB on the CPU, as a list with one entry; null where it is not known.
fn peak_gib(device: &Device) -> Value {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
    match (device, kib) {
        (Device::Cpu, Some(kib)) => json!([rounded(kib / 1024.0 / 1024.0, 2)]),
        _ => Value::Null,
    }
}

/// `cpu`, `cuda:0`, ...
fn device_name(device: &Device) -> String {
    match device.location() {
        candle_core::DeviceLocation::Cpu => "cpu".to_owned(),
        candle_core::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        candle_core::DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

fn rounded(value: f64, digits: i32) -> f64 {
    let unit = 10f64.powi(digits);
    (value * unit).round() / unit
}
