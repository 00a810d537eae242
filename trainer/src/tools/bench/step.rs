//! A training step, and what was forecast of it.

use models::adapter::AdapterKind;
use models::dit::BlockPlan;
use serde_json::{Map, Value, json};

use super::dit::{DitBench, Ready, Second, fields, flops};
use super::meter::Meter;
use super::profile::profiled;
use super::{gib, rounded};
use crate::error::Result;
use crate::learning::optim::{Optimizer, OptimizerConfig};
use crate::machine::forecast::Networks;
use crate::machine::memory::Forecast;
use crate::train::{UpdateSettings, update};

/// A training step: the same one that a run makes, without its data.
#[derive(Debug, Clone, Copy)]
pub struct StepBench {
    /// What the adapter is made of.
    pub kind: AdapterKind,
    /// Its rank, on all the usual modules.
    pub rank: usize,
    /// Clips of a micro-batch.
    pub batch: usize,
    /// Micro-batches.
    pub accumulate: usize,
    /// The networks that are trained. Of two each has its turn every other step.
    pub networks: Networks,
}

/// An optimiser step.
///
/// # Errors
/// A model that cannot be made, or a step that fails.
pub fn step(bench: &DitBench, step: StepBench) -> Result<Value> {
    let StepBench { kind, rank, batch, accumulate, .. } = step;
    let mut ready = bench.ready(Some(&step))?;
    let config = OptimizerConfig::default();
    let mut optimizer = Optimizer::new(&ready.pipeline, config.rule())?;
    optimizer.publish(&mut ready.pipeline);
    let mut of_second = None;
    if let Some(second) = &mut ready.second {
        let own = Optimizer::new(&second.pipeline, config.rule())?;
        own.publish(&mut second.pipeline);
        of_second = Some(own);
    }
    let batches = vec![bench.micro_batch(&ready, &step)?; accumulate];
    let (keeping, forecast) = match &ready.planned {
        Some(planned) => (planned.keeping.clone(), Some(planned.forecast.clone())),
        None => (vec![BlockPlan::default(); ready.config.layers], None),
    };
    let networks = ready.planned.as_ref().map_or(Networks::One, |planned| planned.networks);
    let plans = ready.pipeline.plans(&keeping)?;
    let mut made = 0;
    let devices = ready.devices.clone();
    let meter = Meter::of(devices.iter().map(|(device, _)| device));
    let measured = meter.measure(bench.repeats, || {
        made += 1;
        if let Some(of_second) = &mut of_second {
            ready.change_turns()?;
            std::mem::swap(&mut optimizer, of_second);
        }
        let outcome = ready.pipeline.train(&batches, &plans)?;
        let settings = UpdateSettings { lr: config.lr, clip_norm: config.clip_norm, step: made };
        update(&mut ready.pipeline, &mut optimizer, &outcome, &settings)
    })?;
    // Forward and input gradients; recomputation is not useful work.
    let (linear, attention) = flops(&ready.config, ready.tokens);
    let useful = (batch * accumulate) as f64 * (2.0 * linear + 3.5 * attention);
    let mut report = bench.report("train", &ready, &measured);
    report.extend(fields(json!({
        "kind": kind, "rank": rank, "batch": batch, "accumulate": accumulate, "networks": networks,
        "s_per_step": rounded(measured.seconds, 4),
        "useful_tflops": rounded(useful / measured.seconds / 1e12, 4),
    })));
    report.extend(forecast.as_ref().map(forecast_fields).unwrap_or_default());
    if bench.repeats.profile {
        report.insert("profile".into(), profiled(&ready.pipeline, &batches, &plans)?);
    }
    Ok(report.into())
}

impl Ready {
    /// Gives the other expert its turn: where one rests, the two change places.
    fn change_turns(&mut self) -> Result<()> {
        let Some(Second { pipeline, parked }) = &mut self.second else { return Ok(()) };
        if let Some((parking, resting)) = parked.take() {
            let left = parking.exchange(&mut self.pipeline, pipeline, resting)?;
            *parked = Some((parking, left));
        }
        std::mem::swap(&mut self.pipeline, pipeline);
        Ok(())
    }
}

/// The forecast for the measurement: GiB of each device as in `peak_gib`, and what is kept.
fn forecast_fields(forecast: &Forecast) -> Map<String, Value> {
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
