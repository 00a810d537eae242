//! About how long sampling takes, before anything is loaded.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use kernels::{DType, Device, Tensor};
use models::dit::DitConfig;
use models::weights::Frozen;

use crate::encode::prompt::ClipRequest;
use crate::error::Result;
use crate::machine::memory::Machine;

/// Share of a GPU's peak that a forward reaches.
const REACHED: f64 = 0.5;
/// Side of the square matrices whose product measures a CPU.
const SIDE: usize = 768;

/// Operations of one call of the network `dit` for a clip of `tokens` tokens: products and attention of all blocks.
pub fn operations(dit: &DitConfig, tokens: usize) -> [f64; 2] {
    let [d, ffn, text, l] = [dit.dim, dit.ffn_dim, dit.text_len, tokens].map(|number| number as f64);
    let products = 12.0 * l * d * d + 4.0 * text * d * d + 4.0 * l * d * ffn;
    let attention = 4.0 * l * l * d + 4.0 * l * text * d;
    let blocks = dit.layers + dit.control.side_blocks();
    [products, attention].map(|of_block| of_block * blocks as f64)
}

/// How often as long exchanging tokens for heads around each attention makes a call, on devices that reach each other directly.
const EXCHANGE: f64 = 1.1;

/// How long a solver step of all clips takes on `stages` equal devices in `groups` groups that have the whole network each, or
/// have it on each of `sharing` devices that share the tokens of a call, as calls of the whole network on one device; `halves` are the
/// calls of each clip.
///
/// A group's devices are busy all the time where enough calls are in flight; the next step of a clip waits for all of its
/// calls to come out of the pipeline.
pub fn time_of_round(halves: &[usize], stages: usize, (groups, sharing): (usize, usize)) -> f64 {
    let groups = groups.clamp(1, stages.max(1));
    if sharing > 1 {
        return halves.iter().sum::<usize>().div_ceil(groups) as f64 / sharing as f64 * EXCHANGE;
    }
    let (depth, lanes) = (stages / groups, halves.iter().sum::<usize>().div_ceil(groups));
    let of_clip = if groups > 1 { 1 } else { halves.iter().copied().max().unwrap_or(1) };
    lanes.max(depth + of_clip - 1) as f64 / depth as f64
}

/// About how long the steps of `requests`, of which each skips some, take on `machine`, whose stages have `split` blocks each, in
/// `groups` groups with the whole network, or with it on each of `sharing` devices that share tokens: by the peak of a GPU, and by a product that is measured on a CPU. Text encoder and VAE
/// are not counted.
///
/// # Errors
/// When the CPU cannot be measured.
pub fn forecast(
    (requests, skipped): (&[ClipRequest], &[usize]),
    (dit, frozen): (&DitConfig, Frozen),
    (machine, split, [groups, sharing]): (&Machine, &[usize], [NonZeroUsize; 2]),
) -> Result<Duration> {
    let cpu = match machine.stages.iter().any(|card| card.name == "cpu") {
        true => speed_of_cpu()?,
        false => 0.0,
    };
    // Stages on one device take turns.
    let is_alone = machine.devices().len() == 1;
    // Seconds that the slowest stage takes for its part of the network's operations.
    let slowest = |[products, attention]: [f64; 2]| -> f64 {
        let of_stage = |(index, card): (usize, &crate::machine::memory::Card)| {
            let part = split[index] as f64 / dit.layers as f64;
            part * match card.name.as_str() {
                "cpu" => (products + attention) / cpu,
                _ => (products / card.product_ops(frozen) + attention / card.flops) / REACHED,
            }
        };
        let stages = machine.stages.iter().enumerate().map(of_stage);
        if is_alone { stages.sum() } else { stages.fold(0.0, f64::max) }
    };
    let halves = |request: &ClipRequest| match request.guidance != 1.0 || request.guidance_high != 1.0 {
        true => 2,
        false => 1,
    };
    let all: Vec<usize> = requests.iter().map(halves).collect();
    let devices = if is_alone { 1 } else { machine.stages.len() };
    // Against devices that are never idle.
    let round = time_of_round(&all, devices, (groups.get(), sharing.get()));
    let fill = round * devices as f64 / all.iter().sum::<usize>().max(1) as f64;
    let mut seconds = 0.0;
    for (request, skipped) in requests.iter().zip(skipped) {
        // A step that is skipped runs no block.
        let steps = request.steps.saturating_sub(*skipped) as f64;
        let ((frames, height, width), pieces) = (request.latents(dit), request.pieces(dit));
        let tokens = dit.tokens(frames, height, width);
        let past = dit.tokens_of_past(height, width);
        let of_clip = slowest(operations(dit, tokens));
        let of_others = (pieces - 1) as f64 * slowest(operations(dit, tokens + past));
        seconds += steps * halves(request) as f64 * (of_clip + of_others) * fill;
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
