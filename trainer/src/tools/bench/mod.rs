//! Speed and memory of single parts, each reported as one JSON object, to compare with other implementations.
//!
//! Field names are those of `bench/torch_peer.py`, which measures PyTorch at the same shapes: `s_per_step`,
//! `useful_tflops` (recomputation not counted), `peak_gib`. Weights may be made from a seed: only shapes matter here.

mod checkpoint;
mod clips;
mod dit;
mod load;
mod meter;
mod model;
mod parts;
mod profile;
mod replicas;
mod run;
mod run_files;
mod step;

use kernels::random::Key;
use kernels::{DType, Device, Tensor};

pub use clips::ClipsBench;
pub use dit::{DitBench, forward};
pub use load::{LoadBench, LoadSource, load};
pub use model::{DitSource, dit_preset, dit_presets, umt5_preset, vae_preset};
pub use parts::{AttentionBench, VaeBench, attention, text, usual_tiles, vae};
pub use replicas::{ReplicasBench, Start, replicas};
pub use run::{RunBench, whole};
pub use step::{StepBench, step};

use crate::error::Result;

/// How often a measurement is made: the median counts.
#[derive(Debug, Clone, Copy)]
pub struct Repeats {
    /// Runs before the first one that counts.
    pub warmup: usize,
    /// Runs that count.
    pub iters: usize,
    /// Whether one more run is profiled.
    pub profile: bool,
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

/// A random tensor of the stream `name`, deviation 1, generated on its device.
fn random(name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    Ok(kernels::random::fill(shape, Key::new(0, name, &[]), 1.0, dtype, device)?)
}

/// `cpu`, `cuda:0`, ...
fn device_name(device: &Device) -> String {
    match device.location() {
        kernels::DeviceLocation::Cpu => "cpu".to_owned(),
        kernels::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        kernels::DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

/// Bytes in GiB, as rows tell them.
fn gib(bytes: u64) -> f64 {
    rounded(bytes as f64 / f64::from(1 << 30), 2)
}

fn rounded(value: f64, digits: i32) -> f64 {
    let unit = 10f64.powi(digits);
    (value * unit).round() / unit
}
