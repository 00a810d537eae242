//! About how long sampling takes, before anything is loaded.

use std::time::{Duration, Instant};

use kernels::{DType, Device, Tensor};
use models::dit::DitConfig;
use models::dit::config::PATCH;
use models::published::Defaults;

use crate::base::BaseModel;
use crate::encode::prompt::ClipRequest;
use crate::error::Result;
use crate::machine::devices::{DevicesConfig, Limits};
use crate::machine::memory::Machine;

/// Share of a GPU's peak that a forward reaches.
const REACHED: f64 = 0.5;
/// Side of the square matrices whose product measures a CPU.
const SIDE: usize = 768;

/// Floating-point operations of one call of the network `dit` for a clip of `tokens` tokens: products and attention of all
/// blocks.
pub fn operations(dit: &DitConfig, tokens: usize) -> f64 {
    let [d, ffn, text, l] = [dit.dim, dit.ffn_dim, dit.text_len, tokens].map(|number| number as f64);
    let own = 8.0 * l * d * d + 4.0 * l * l * d;
    let cross = 4.0 * l * d * d + 4.0 * text * d * d + 4.0 * l * text * d;
    (own + cross + 4.0 * l * d * ffn) * dit.layers as f64
}

/// About how long the steps of `requests`, of which each skips some, take on `devices`, settled: by the peak of a GPU, and by a product that is measured
/// on a CPU. Text encoder and VAE are not counted.
///
/// # Errors
/// When the CPU cannot be measured.
pub fn forecast(
    (requests, skipped): (&[ClipRequest], &[usize]),
    (model, dit, defaults): (&BaseModel, &DitConfig, &Defaults),
    devices: &DevicesConfig,
) -> Result<Duration> {
    let machine = Machine::here(devices, &Limits::default(), model.precision.dit(), dit, None);
    let cpu = match devices.stages.iter().any(|name| name == "cpu") {
        true => speed_of_cpu()?,
        false => 0.0,
    };
    // Seconds that a stage takes for an operation of the whole network.
    let of_stage = |(index, card): (usize, &crate::machine::memory::Card)| {
        let part = devices.split[index] as f64 / dit.layers as f64;
        part / if card.name == "cpu" { cpu } else { card.flops * REACHED }
    };
    let stages: Vec<f64> = machine.stages.iter().enumerate().map(of_stage).collect();
    // Stages on one device take turns.
    let is_alone = devices.stages.iter().all(|name| *name == devices.stages[0]); // a settled config has a stage
    let slowest = if is_alone { stages.iter().sum() } else { stages.iter().copied().fold(0.0, f64::max) };
    let whole: f64 = stages.iter().sum();
    let mut seconds = 0.0;
    for (request, skipped) in requests.iter().zip(skipped) {
        // A step that is skipped runs no block.
        let steps = request.steps.saturating_sub(*skipped) as f64;
        let (frames, height, width) = defaults.latents(request.frames, request.height, request.width);
        let of_clip = operations(dit, frames * (height / PATCH) * (width / PATCH));
        let is_guided = request.guidance != 1.0 || request.guidance_high != 1.0;
        let calls = steps * if is_guided { 2.0 } else { 1.0 };
        seconds += calls * of_clip * slowest;
        // All clips go together, so the pipeline is filled once a step.
        seconds += steps * of_clip * (whole - slowest) / requests.len() as f64;
    }
    Ok(Duration::from_secs_f64(seconds.min(1e9)))
}

/// Operations a second of a product of f32 matrices on all cores.
fn speed_of_cpu() -> Result<f64> {
    let matrix = Tensor::full(0.5f32, (SIDE, SIDE), &Device::Cpu)?.to_dtype(DType::F32)?;
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let begun = Instant::now();
        drop(matrix.matmul(&matrix)?);
        best = best.min(begun.elapsed().as_secs_f64());
    }
    Ok(2.0 * (SIDE as f64).powi(3) / best.max(1e-6))
}

/// A time as people say it: `40 s`, `12 min`, `3 h 20 min`.
pub fn in_words(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{} s", seconds.max(1)),
        60..3600 => format!("{} min", (seconds + 30) / 60),
        _ => {
            let minutes = (seconds + 30) / 60;
            format!("{} h {} min", minutes / 60, minutes % 60)
        }
    }
}
