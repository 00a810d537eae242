//! The DiT: a training step, and a forward.

use candle_core::Device;
use kernels::adamw::Update;
use models::adapter::{Adapters, LoraConfig};
use models::dit::DitConfig;
use models::vae::latent_frames;
use serde_json::{Value, json};

use super::model::DitSource;
use super::{ClipSize, Repeats, device_name, normal, peak_gib, reset_peak, rounded, timed};
use crate::base::LATENT_STRIDE;
use crate::devices::DevicesConfig;
use crate::error::Result;
use crate::memory::{MemoryConfig, choose};
use crate::optim::{Optimizer, checked_norm, clip_factor};
use crate::pipeline::{MicroBatch, NetworkInput, Pipeline};
use crate::precision::Precision;

/// A measurement of the DiT.
#[derive(Debug, Clone)]
pub struct DitBench<'a> {
    /// The model.
    pub source: DitSource<'a>,
    /// Stages, not yet settled.
    pub devices: DevicesConfig,
    /// How the model is held.
    pub precision: Precision,
    /// The clip.
    pub size: ClipSize,
    /// How often.
    pub repeats: Repeats,
}

/// A pipeline with what is said of it.
struct Ready {
    name: String,
    config: DitConfig,
    pipeline: Pipeline,
    tokens: usize,
}

impl DitBench<'_> {
    fn ready(&self, adapter: Option<&LoraConfig>) -> Result<Ready> {
        let (name, config, weights) = self.source.open()?;
        let devices = self.devices.settle(config.layers)?;
        let adapters = match adapter {
            Some(lora) => Adapters::fresh(&lora.select(&config.adaptable_modules())?, lora, 0, &Device::Cpu)?,
            None => Adapters::default(),
        };
        let pipeline = Pipeline::load(&weights, &config, &devices.open()?, &adapters, self.precision.dit())?;
        let [_, frames, height, width] = self.latent_shape(&config);
        let tokens = config.tokens(frames, height, width);
        Ok(Ready { name, config, pipeline, tokens })
    }

    fn latent_shape(&self, config: &DitConfig) -> [usize; 4] {
        let ClipSize { width, height, frames } = self.size;
        [config.in_channels, latent_frames(frames), height / LATENT_STRIDE, width / LATENT_STRIDE]
    }

    fn input(&self, config: &DitConfig, device: &Device) -> Result<NetworkInput> {
        let [channels, frames, height, width] = self.latent_shape(config);
        Ok(NetworkInput {
            x_bcthw: normal("x", &[1, channels, frames, height, width], device)?,
            timestep: candle_core::Tensor::new(&[500f32], &Device::Cpu)?,
            text_bsd: normal("text", &[1, config.text_len, config.text_dim], device)?,
        })
    }
}

/// An optimiser step of `accumulate` micro-batches of one clip, with a LoRA of `rank` on all the usual modules.
///
/// # Errors
/// A model that cannot be made, or a step that fails.
pub fn step(bench: &DitBench, rank: usize, accumulate: usize) -> Result<Value> {
    let lora = LoraConfig { rank, ..LoraConfig::default() };
    let Ready { name, config, mut pipeline, tokens } = bench.ready(Some(&lora))?;
    let device = pipeline.stages()[0].device.clone();
    let mut optimizer = Optimizer::new(&pipeline)?;
    let input = bench.input(&config, &device)?;
    let target = normal("target", input.x_bcthw.dims(), &device)?;
    let weights = vec![1.0 / accumulate as f32];
    let batch = MicroBatch { input, target, weights, mask: None, dropout: None };
    let batches = vec![batch; accumulate];
    let keeping = choose(&MemoryConfig::default(), config.layers);
    let mut made = 0;
    reset_peak();
    let seconds = timed(bench.repeats, &device, || {
        let outcome = pipeline.train(&batches, &keeping)?;
        let norm = checked_norm(&outcome.gradients, optimizer.states().keys())?;
        made += 1;
        let update = Update { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step: made };
        optimizer.update(&outcome.gradients, clip_factor(norm, 1.0), &update)?;
        optimizer.publish(&mut pipeline);
        Ok(())
    })?;
    // Forward and input gradients; what is replayed is no use to anyone.
    let (linear, attention) = flops(&config, tokens);
    let useful = accumulate as f64 * (2.0 * linear + 3.5 * attention);
    Ok(json!({
        "what": "train", "model": name, "device": device_name(&device), "stages": pipeline.stages().len(),
        "weights": bench.precision.base.name(), "stream": bench.precision.stream, "frames": bench.size.frames, "size": bench.size.label(), "tokens": tokens,
        "accumulate": accumulate, "rank": rank, "s_per_step": rounded(seconds, 4),
        "useful_tflops": rounded(useful / seconds / 1e12, 4), "peak_gib": peak_gib(&device),
    }))
}

/// One forward of one clip.
///
/// # Errors
/// A model that cannot be made.
pub fn forward(bench: &DitBench) -> Result<Value> {
    let Ready { name, config, pipeline, tokens } = bench.ready(None)?;
    let device = pipeline.stages()[0].device.clone();
    let input = bench.input(&config, &device)?;
    reset_peak();
    let seconds = timed(bench.repeats, &device, || pipeline.predict(std::slice::from_ref(&input)).map(drop))?;
    let (linear, attention) = flops(&config, tokens);
    Ok(json!({
        "what": "infer", "model": name, "device": device_name(&device), "stages": pipeline.stages().len(),
        "weights": bench.precision.base.name(), "stream": bench.precision.stream, "attention": "chunked", "frames": bench.size.frames, "size": bench.size.label(),
        "tokens": tokens, "s_per_forward": rounded(seconds, 4),
        "tflops": rounded((linear + attention) / seconds / 1e12, 4), "peak_gib": peak_gib(&device),
    }))
}

/// Floating-point operations of one forward of one clip: in linear layers, in attention.
fn flops(config: &DitConfig, tokens: usize) -> (f64, f64) {
    let (d, ffn, layers) = (config.dim as f64, config.ffn_dim as f64, config.layers as f64);
    let (tokens, text) = (tokens as f64, config.text_len as f64);
    let linear = 2.0 * tokens * (6.0 * d * d + 2.0 * d * ffn) + 2.0 * text * 2.0 * d * d;
    let attention = 4.0 * tokens * tokens * d + 4.0 * tokens * text * d;
    (layers * linear, layers * attention)
}
