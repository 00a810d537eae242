//! The DiT: a training step, and a forward.

use std::ops::Range;

use kernels::{DType, Device};
use models::adapter::{AdapterKind, Adapters, LoraConfig, Target};
use models::dit::{BlockPlan, DitConfig, Role};
use models::vae::latent_frames;
use serde_json::{Map, Value, json};

use super::meter::{Measured, Meter};
use super::model::DitSource;
use super::profile::{predicted, profiled};
use super::{ClipSize, Repeats, device_name, random, rounded};
use crate::error::{Error, Result};
use crate::learning::optim::{Optimizer, OptimizerConfig};
use crate::machine::devices::{DevicesConfig, Limits};
use crate::machine::forecast::{Decoding, Networks, Task};
use crate::machine::memory::{self, Forecast, Machine, MemoryConfig};
use crate::machine::precision::Precision;
use crate::pipeline::{MicroBatch, NetworkInput, Pipeline};
use crate::train::{UpdateSettings, update};

/// A measurement of the DiT.
#[derive(Debug, Clone)]
pub struct DitBench<'a> {
    /// The model.
    pub source: DitSource<'a>,
    /// Stages, not yet settled.
    pub devices: DevicesConfig,
    /// The storage and dtypes of the model.
    pub precision: Precision,
    /// What a training step keeps.
    pub memory: MemoryConfig,
    /// The clip.
    pub size: ClipSize,
    /// How often.
    pub repeats: Repeats,
}

/// A pipeline with its report.
pub(super) struct Ready {
    name: String,
    pub config: DitConfig,
    /// Of each stage, with its blocks.
    pub devices: Vec<(Device, Range<usize>)>,
    pub pipeline: Pipeline,
    tokens: usize,
    /// Of a training step.
    planned: Option<PlannedStep>,
}

/// What a training step keeps, and takes.
struct PlannedStep {
    keeping: Vec<BlockPlan>,
    ffn_tokens: usize,
    forecast: Forecast,
}

impl DitBench<'_> {
    pub(super) fn ready(&self, step: Option<&StepBench>) -> Result<Ready> {
        let (name, config, weights) = self.source.open()?;
        let mut settled = self.devices.settle(config.layers)?;
        let (mut adapters, mut planned) = (Adapters::default(), None);
        if let Some(step) = step {
            let lora = LoraConfig { rank: Some(step.rank), ..LoraConfig::default() };
            let targets = lora.select(&config.adaptable_modules())?;
            let (split, of_step) = self.plan(&config, &targets, step, &settled)?;
            (settled.split, planned) = (split, Some(of_step));
            adapters = Adapters::fresh(&targets, &lora, 0, &Device::Cpu)?;
        }
        let devices = settled.open()?;
        let mut pipeline = Pipeline::load(&weights, &config, &devices, &adapters, self.precision.dit())?;
        pipeline.set_route(self.devices.transfer.into())?;
        if let Some(planned) = &planned {
            pipeline.set_ffn_tokens(planned.ffn_tokens);
        }
        let [_, frames, height, width] = self.latent_shape(&config)?;
        let tokens = config.tokens(frames, height, width);
        Ok(Ready { name, config, devices, pipeline, tokens, planned })
    }

    /// Blocks of each stage, and what a training step keeps: as `plan` chooses.
    fn plan(
        &self,
        config: &DitConfig,
        targets: &[Target],
        step: &StepBench,
        devices: &DevicesConfig,
    ) -> Result<(Vec<usize>, PlannedStep)> {
        let [_, frames, height, width] = self.latent_shape(config)?;
        let task = Task {
            dit: config.into(),
            base: self.precision.dit(),
            targets,
            kind: AdapterKind::Lora,
            factor: None,
            rank: step.rank,
            dropout: false,
            batch: 1,
            accumulate: step.accumulate,
            latents: (frames, height, width),
            networks: Networks::One,
            decoding: Decoding::Beside,
            rule: OptimizerConfig::default().rule(),
        };
        let host = self.memory.host_memory.map(|host| host.0);
        let machine = Machine::here(devices, &Limits::measure(devices), task.base, config, host);
        let given = (!self.devices.split.is_empty()).then_some(devices.split.as_slice());
        let settled = memory::settle(&task, &machine, &self.memory, given, &memory::Shapes::default())?;
        let memory::Settled { choice, forecast, .. } = settled;
        Ok((choice.split, PlannedStep { keeping: choice.blocks, ffn_tokens: choice.ffn_tokens, forecast }))
    }

    fn latent_shape(&self, config: &DitConfig) -> Result<[usize; 4]> {
        let ClipSize { width, height, frames } = self.size;
        // The VAE of Wan 2.2, which has 48 channels, makes latents half as wide and high.
        let stride = config.kind.facts().vae.spatial_ratio();
        if [width, height].iter().any(|side| side % (2 * stride) != 0) {
            let why = format!("{width}x{height}: the sides must be multiples of {}", 2 * stride);
            return Err(Error::Setting { key: "size of the clip".into(), why });
        }
        Ok([config.in_channels, latent_frames(frames), height / stride, width / stride])
    }

    pub(super) fn input(&self, config: &DitConfig, device: &Device) -> Result<NetworkInput> {
        let [channels, frames, height, width] = self.latent_shape(config)?;
        let x_shape = [1, channels, frames, height, width];
        let timestep = kernels::Tensor::new(&[500f32], &Device::Cpu)?;
        let cond = config
            .conditioning_shapes()
            .try_map(|role, [rows, width]| random(role.name(), &[1, rows, width], DType::F32, device))?;
        let x_bcthw = random("x", &x_shape, DType::F32, device)?;
        Ok(NetworkInput { x_bcthw, cond: cond.with(Role::TIMESTEP, timestep) })
    }

    fn micro_batch(&self, ready: &Ready, weight: f32) -> Result<MicroBatch> {
        // On the host, as a run's batches are.
        let input = self.input(&ready.config, &Device::Cpu)?;
        let mut shape = input.x_bcthw.dims().to_vec();
        shape[1] = ready.config.out_channels;
        let target = random("target", &shape, DType::F32, &Device::Cpu)?;
        Ok(MicroBatch { input, target, weights: vec![weight], mask: None, dropout: None })
    }

    /// What the attention of the first stage runs on.
    fn attention(&self, ready: &Ready) -> &'static str {
        let compute = self.precision.dit().frozen.compute;
        kernels::attention::engine(&ready.devices[0].0, compute, ready.config.head_size()).name
    }

    /// The fields of every measurement.
    pub(super) fn report(&self, what: &str, ready: &Ready, measured: &Measured) -> Map<String, Value> {
        let devices: Vec<String> = ready.devices.iter().map(|(device, _)| device_name(device)).collect();
        let blocks: Vec<usize> = ready.devices.iter().map(|(_, blocks)| blocks.len()).collect();
        fields(json!({
            "what": what, "model": ready.name, "gpus": measured.gpus, "stages": devices, "split": blocks,
            "weights": self.precision.base.name(), "stream": self.precision.stream,
            "attention": self.attention(ready),
            "frames": self.size.frames, "size": self.size.label(), "tokens": ready.tokens,
            "peak_gib": measured.peak_gib, "steady_peak_gib": measured.steady_peak_gib,
            "reserved_gib": measured.reserved_gib,
        }))
    }
}

/// A training step: the same one that a run makes, without its data.
#[derive(Debug, Clone, Copy)]
pub struct StepBench {
    /// Rank of the adapter, on all the usual modules.
    pub rank: usize,
    /// Micro-batches, each of one clip.
    pub accumulate: usize,
}

/// An optimiser step.
///
/// # Errors
/// A model that cannot be made, or a step that fails.
pub fn step(bench: &DitBench, step: StepBench) -> Result<Value> {
    let StepBench { rank, accumulate } = step;
    let mut ready = bench.ready(Some(&step))?;
    let config = OptimizerConfig::default();
    let mut optimizer = Optimizer::new(&ready.pipeline, config.rule())?;
    optimizer.publish(&mut ready.pipeline);
    let batches = vec![bench.micro_batch(&ready, 1.0 / accumulate as f32)?; accumulate];
    let (keeping, forecast) = match &ready.planned {
        Some(planned) => (planned.keeping.clone(), Some(planned.forecast.clone())),
        None => (vec![BlockPlan::default(); ready.config.layers], None),
    };
    let plans = ready.pipeline.plans(&keeping)?;
    let mut made = 0;
    let meter = Meter::of(ready.devices.iter().map(|(device, _)| device));
    let measured = meter.measure(bench.repeats, || {
        made += 1;
        let outcome = ready.pipeline.train(&batches, &plans)?;
        let settings = UpdateSettings { lr: config.lr, clip_norm: config.clip_norm, step: made };
        update(&mut ready.pipeline, &mut optimizer, &outcome, &settings).map(drop)
    })?;
    // Forward and input gradients; recomputation is not useful work.
    let (linear, attention) = flops(&ready.config, ready.tokens);
    let useful = accumulate as f64 * (2.0 * linear + 3.5 * attention);
    let mut report = bench.report("train", &ready, &measured);
    report.extend(fields(json!({
        "accumulate": accumulate, "rank": rank, "s_per_step": rounded(measured.seconds, 4),
        "useful_tflops": rounded(useful / measured.seconds / 1e12, 4),
    })));
    report.extend(forecast.as_ref().map(forecast_fields).unwrap_or_default());
    if bench.repeats.profile {
        report.insert("profile".into(), profiled(&ready.pipeline, &batches, &plans)?);
    }
    Ok(report.into())
}

/// One forward of one clip.
///
/// # Errors
/// A model that cannot be made.
pub fn forward(bench: &DitBench) -> Result<Value> {
    let ready = bench.ready(None)?;
    let input = bench.input(&ready.config, &ready.devices[0].0)?; // a settled config has a stage
    let meter = Meter::of(ready.devices.iter().map(|(device, _)| device));
    let predict = || ready.pipeline.predict(std::slice::from_ref(&input)).map(drop);
    let measured = meter.measure(bench.repeats, predict)?;
    let (linear, attention) = flops(&ready.config, ready.tokens);
    let mut report = bench.report("infer", &ready, &measured);
    report.extend(fields(json!({
        "s_per_forward": rounded(measured.seconds, 4),
        "tflops": rounded((linear + attention) / measured.seconds / 1e12, 4),
    })));
    if bench.repeats.profile {
        report.insert("profile".into(), predicted(&ready.pipeline, &input)?);
    }
    Ok(report.into())
}

/// The forecast for the measurement: GiB of each device as in `peak_gib`, and what is kept.
fn forecast_fields(forecast: &Forecast) -> Map<String, Value> {
    let gib = |bytes: u64| rounded(bytes as f64 / f64::from(1 << 30), 2);
    let mut devices: Vec<(&str, u64)> = Vec::new();
    for stage in &forecast.stages {
        match devices.iter_mut().find(|(device, _)| *device == stage.device) {
            Some((_, peak)) => *peak += stage.memory.peak,
            None => devices.push((&stage.device, stage.memory.peak)),
        }
    }
    let runs = forecast.stages.iter().flat_map(|stage| &stage.keep);
    let keep: Vec<String> = runs.map(|run| format!("{} x {run}", run.count)).collect();
    let host: u64 = forecast.stages.iter().map(|stage| stage.memory.host).sum();
    fields(json!({
        "forecast_gib": devices.into_iter().map(|(_, peak)| gib(peak)).collect::<Vec<_>>(),
        "forecast_host_gib": gib(host), "keep": keep, "ffn_tokens": forecast.ffn_tokens,
    }))
}

/// The fields of an object.
pub(super) fn fields(object: Value) -> Map<String, Value> {
    match object {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

/// Floating-point operations of one forward of one clip: in linear layers, in attention.
fn flops(config: &DitConfig, tokens: usize) -> (f64, f64) {
    let (d, ffn, layers) = (config.dim as f64, config.ffn_dim as f64, config.layers as f64);
    let (tokens, text) = (tokens as f64, config.text_len as f64);
    let linear = 2.0 * tokens * (6.0 * d * d + 2.0 * d * ffn) + 2.0 * text * 2.0 * d * d;
    let attention = 4.0 * tokens * tokens * d + 4.0 * tokens * text * d;
    (layers * linear, layers * attention)
}
