//! The DiT, ready to be measured, and a forward.

use std::collections::BTreeMap;
use std::ops::Range;

use kernels::{DType, Device};
use models::adapter::{Adapters, LoraConfig, Target};
use models::dit::{Architecture, Base, BlockPlan, DitConfig, Role, Streamed};
use models::vae::latent_frames;
use serde_json::{Map, Value, json};

use super::meter::{Measured, Meter};
use super::model::DitSource;
use super::profile::predicted;
use super::step::StepBench;
use super::{ClipSize, Repeats, device_name, random, rounded};
use crate::error::{Error, Result};
use crate::learning::ema::EmaConfig;
use crate::learning::optim::OptimizerConfig;
use crate::machine::devices::{DevicesConfig, Limits};
use crate::machine::forecast::{Decoding, LossTask, Networks, Task};
use crate::machine::memory::{self, Forecast, Machine, MemoryConfig, WeightPlace};
use crate::machine::precision::Precision;
use crate::pipeline::{MicroBatch, NetworkInput, Objective, ParkedWeights, Pipeline, WeightParking};

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
    /// The other expert, where two are trained.
    pub second: Option<Second>,
    pub tokens: usize,
    /// Of a training step.
    pub planned: Option<PlannedStep>,
}

/// An expert beside the one whose turn it is.
pub(super) struct Second {
    pub pipeline: Pipeline,
    /// Its matrices, where they wait in host memory.
    pub parked: Option<(WeightParking, ParkedWeights)>,
}

/// What a training step keeps, and takes.
pub(super) struct PlannedStep {
    pub keeping: Vec<BlockPlan>,
    ffn_tokens: usize,
    /// The blocks whose matrices are in host memory.
    streamed: Streamed,
    /// Where the networks are: two that were to be side by side may take turns.
    pub networks: Networks,
    pub forecast: Forecast,
}

impl DitBench<'_> {
    pub(super) fn ready(&self, step: Option<&StepBench>) -> Result<Ready> {
        let (name, config, weights) = self.source.open()?;
        let mut settled = self.devices.settle(config.layers)?;
        let (mut adapters, mut planned) = (Adapters::default(), None);
        if let Some(step) = step {
            let lora = LoraConfig { kind: step.kind, rank: Some(step.rank), ..LoraConfig::default() };
            let targets = lora.select(&config.adaptable_modules())?;
            let (split, of_step) = self.plan(&config, &targets, step, &settled)?;
            (settled.split, planned) = (split, Some(of_step));
            adapters = Adapters::fresh(&targets, &lora, 0, &Device::Cpu)?;
        }
        let devices = settled.open()?;
        let base = self.base(planned.as_ref());
        let load = || {
            let mut pipeline = Pipeline::load(&weights, &config, &devices, &adapters, base)?;
            pipeline.set_route(self.devices.transfer.into())?;
            if let Some(planned) = &planned {
                pipeline.set_ffn_tokens(planned.ffn_tokens);
            }
            Ok::<_, Error>(pipeline)
        };
        let mut pipeline = load()?;
        let networks = planned.as_ref().map_or(Networks::One, |planned| planned.networks);
        let second = match networks {
            Networks::One | Networks::MakesRoom => None,
            Networks::SideBySide => Some(Second { pipeline: load()?, parked: None }),
            Networks::InTurn => {
                let parking = WeightParking::new(&pipeline)?;
                let parked = parking.rest(&mut pipeline)?;
                let second = load()?;
                // The one that rests is the second from now on.
                let resting = std::mem::replace(&mut pipeline, second);
                Some(Second { pipeline: resting, parked: Some((parking, parked)) })
            }
        };
        let [_, frames, height, width] = self.latent_shape(&config)?;
        let tokens = config.tokens(frames, height, width);
        Ok(Ready { name, config, devices, pipeline, second, tokens, planned })
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
            kind: step.kind,
            factor: None,
            rank: step.rank,
            ranks: BTreeMap::new(),
            dropout: false,
            batch: step.batch,
            accumulate: step.accumulate,
            small: None,
            replicas: 1,
            latents: (frames, height, width),
            continues: false,
            networks: step.networks,
            decoding: Decoding::Beside,
            rule: OptimizerConfig::default().rule(),
            ema: EmaConfig::default(),
            norm_limit: None,
            objective: LossTask::default(),
        };
        let host = self.memory.host_memory.map(|host| host.0);
        let machine = Machine::here(devices, &Limits::measure(devices), task.base, config, host);
        let given = (!self.devices.split.is_empty()).then_some(devices.split.as_slice());
        let settled = memory::settle(&task, &machine, &self.memory, given, &memory::Shapes::default())?;
        let memory::Settled { choice, forecast, networks, streamed, .. } = settled;
        Ok((
            choice.split,
            PlannedStep {
                keeping: choice.blocks,
                ffn_tokens: choice.ffn_tokens,
                streamed,
                networks,
                forecast,
            },
        ))
    }

    /// How the model is held: as a training step was planned, or without one as it is asked for.
    pub(super) fn base(&self, planned: Option<&PlannedStep>) -> Base {
        let streamed = match (planned, self.memory.weights) {
            (Some(planned), _) => planned.streamed,
            (None, WeightPlace::Host) => Streamed::ALL,
            (None, WeightPlace::Auto | WeightPlace::Device) => Streamed::NONE,
        };
        Base { streamed, ..self.precision.dit() }
    }

    pub(super) fn latent_shape(&self, config: &DitConfig) -> Result<[usize; 4]> {
        let ClipSize { width, height, frames } = self.size;
        // The VAE of Wan 2.2, which has 48 channels, makes latents half as wide and high.
        let stride = config.kind.facts().vae.spatial_ratio();
        if [width, height].iter().any(|side| side % (2 * stride) != 0) {
            let why = format!("{width}x{height}: the sides must be multiples of {}", 2 * stride);
            return Err(Error::Setting { key: "size of the clip".into(), why });
        }
        Ok([config.in_channels, latent_frames(frames), height / stride, width / stride])
    }

    /// The input of `batch` clips, made on `device`.
    pub(super) fn input(&self, config: &DitConfig, batch: usize, device: &Device) -> Result<NetworkInput> {
        let [channels, frames, height, width] = self.latent_shape(config)?;
        let x_shape = [batch, channels, frames, height, width];
        let timestep = kernels::Tensor::full(500f32, batch, &Device::Cpu)?;
        let shaped = |role: Role, shape: Vec<usize>| {
            let shape: Vec<usize> = std::iter::once(batch).chain(shape).collect();
            random(role.name(), &shape, DType::F32, device)
        };
        let cond = config.conditioning((frames, height, width)).try_map(shaped)?;
        let x_bcthw = random("x", &x_shape, DType::F32, device)?;
        Ok(NetworkInput { x_bcthw, cond: cond.with(Role::TIMESTEP, timestep) })
    }

    pub(super) fn micro_batch(&self, ready: &Ready, step: &StepBench) -> Result<MicroBatch> {
        // On the host, where a run's batches come from.
        let input = self.input(&ready.config, step.batch, &Device::Cpu)?;
        let weights = vec![1.0 / (step.batch * step.accumulate) as f32; step.batch];
        let mut shape = input.x_bcthw.dims().to_vec();
        shape[1] = ready.config.out_channels;
        let target = random("target", &shape, DType::F32, &Device::Cpu)?;
        Ok(MicroBatch { input, target, weights, mask: None, objective: Objective::default(), dropout: None })
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
            "weights": self.precision.base.name(), "arithmetic": self.precision.arithmetic.name(), "stream": self.precision.stream,
            "attention": self.attention(ready),
            "frames": self.size.frames, "size": self.size.label(), "tokens": ready.tokens,
            "peak_gib": measured.peak_gib, "steady_peak_gib": measured.steady_peak_gib,
            "reserved_gib": measured.reserved_gib,
        }))
    }
}

/// One forward of one clip.
///
/// # Errors
/// A model that cannot be made.
pub fn forward(bench: &DitBench) -> Result<Value> {
    let ready = bench.ready(None)?;
    let input = bench.input(&ready.config, 1, &ready.devices[0].0)?; // a settled config has a stage
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

/// The fields of an object.
pub(super) fn fields(object: Value) -> Map<String, Value> {
    match object {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

/// Floating-point operations of one forward of one clip: in linear layers, in attention.
pub(super) fn flops(config: &DitConfig, tokens: usize) -> (f64, f64) {
    let blocks = config.layers + config.control.side_blocks();
    let (d, ffn, layers) = (config.dim as f64, config.ffn_dim as f64, blocks as f64);
    let (tokens, text) = (tokens as f64, config.text_len as f64);
    let linear = 2.0 * tokens * (6.0 * d * d + 2.0 * d * ffn) + 2.0 * text * 2.0 * d * d;
    let attention = 4.0 * tokens * tokens * d + 4.0 * tokens * text * d;
    (layers * linear, layers * attention)
}
