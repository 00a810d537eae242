//! Clips in flight: how busy the stages are while several clips are sampled.

use kernels::Tensor;
use models::dit::pass::FFN_TOKENS;
use serde_json::{Value, json};

use super::dit::{DitBench, Ready, fields};
use super::meter::Meter;
use super::{gib, rounded};
use crate::error::Result;
use crate::machine::devices::Limits;
use crate::machine::forecast::{Calls, ClipShape, Forecaster, Task};
use crate::machine::memory::Machine;
use crate::pipeline::{self, Blocks, NetworkInput, Pipeline, Returns, run_all};
use crate::sample::magcache::{CacheConfig, Halves, Table, skipped};
use crate::solver::SolverKind;

/// Halves of the guidance.
const HALVES: usize = 2;
/// Solver steps of each clip.
const STEPS: usize = 4;

/// A few solver steps of `clips` clips with guidance, without the solver: in flight as a session has them, and drained after
/// each step, as where all clips wait for the last.
///
/// `busy` is the share of the stages' time that one call alone accounts for: calls x seconds of one / (stages x seconds of
/// all). Of several unlike GPUs it is a mean.
///
/// # Errors
/// A model that cannot be made.
pub fn clips(bench: &DitBench, clips: usize) -> Result<Value> {
    let ready = bench.ready(None)?;
    let [first, _] = ready.pipeline.ends();
    let input = bench.input(&ready.config, 1, first)?;
    let meter = Meter::of(ready.devices.iter().map(|(device, _)| device));
    let predict = |count: usize| {
        let inputs = vec![input.clone(); count];
        ready.pipeline.predict(&inputs).map(drop)
    };
    let one = meter.measure(bench.repeats, || predict(1))?.seconds;
    let flowing =
        meter.measure(bench.repeats, || in_flight(&ready.pipeline, &input, [clips, STEPS], &run_all))?;
    let drained = meter.measure(bench.repeats, || (0..STEPS).try_for_each(|_| predict(HALVES * clips)))?;
    let calls = (HALVES * clips * STEPS) as f64;
    let busy = |seconds: f64| rounded(calls * one / (ready.devices.len() as f64 * seconds), 3);
    let of_step = |seconds: f64| rounded(seconds / (clips * STEPS) as f64, 4);
    let mut report = bench.report("clips", &ready, &flowing);
    report.extend(fields(json!({
        "clips": clips, "s_per_forward": rounded(one, 4),
        "s_per_step": of_step(flowing.seconds), "busy": busy(flowing.seconds),
        "drained_s_per_step": of_step(drained.seconds), "drained_busy": busy(drained.seconds),
        "forecast_gib": forecast(bench, &ready, clips)?,
    })));
    Ok(report.into())
}

/// What was forecast of `clips` clips in flight, GiB of each device as `peak_gib` has them.
fn forecast(bench: &DitBench, ready: &Ready, clips: usize) -> Result<Vec<f64>> {
    let [_, frames, height, width] = bench.latent_shape(&ready.config)?;
    let latents = (frames, height, width);
    let task = Task::without_training(&ready.config, bench.precision.dit(), latents);
    let devices = bench.devices.settle(ready.config.layers)?;
    let machine = Machine::here(&devices, &Limits::default(), task.base, &ready.config, None);
    let solver = SolverKind::Euler;
    let shape = ClipShape { latents, halves: HALVES, solver, has_picture: false, is_cached: false };
    let (forecaster, calls) = (Forecaster::new(&task), Calls::Clips(vec![shape; clips]));
    let peak = |index: usize| -> Result<u64> {
        let engine = machine.stages[index].engine;
        let blocks = (&ready.devices[index].1, FFN_TOKENS);
        Ok(forecaster.calls(engine, blocks, machine.place_of(index), &calls)?.peak)
    };
    let of = |(_, stages): (&str, Vec<usize>)| Ok(gib(stages.into_iter().map(peak).sum::<Result<u64>>()?));
    machine.devices().into_iter().map(of).collect()
}

/// `steps` solver steps of `clips` clips with guidance, without the solver, all computed and with those skipped that the rule
/// `cache` skips of a table of ratios that fall slowly, as those of published models do.
///
/// `share_of_ideal` is the time of the steps that are computed, as a share of all that the skipping clip took.
///
/// # Errors
/// If the model cannot be generated, or the rule is impossible.
pub fn skipping(bench: &DitBench, [clips, steps]: [usize; 2], cache: &CacheConfig) -> Result<Value> {
    let rule = cache.settle("--cache-preset")?;
    let falling = (0..steps).map(|step| if step == 0 { 1.0 } else { FALLS_TO }).collect::<Vec<f64>>();
    let table = Table { cond: falling.clone(), uncond: falling, high_steps: None, made: None };
    let skips = skipped(&rule, &table, 0, [Halves::Both; 2]);
    let ready = bench.ready(None)?;
    let [first, _] = ready.pipeline.ends();
    let input = bench.input(&ready.config, 1, first)?;
    let meter = Meter::of(ready.devices.iter().map(|(device, _)| device));
    let exact =
        meter.measure(bench.repeats, || in_flight(&ready.pipeline, &input, [clips, steps], &run_all))?;
    let blocks = |m: usize| {
        let (step, lane) = (m / (HALVES * clips), m % (HALVES * clips));
        let is_next = skips.contains(&(step + 1));
        match skips.contains(&step) {
            true => Blocks::Skip { lane, is_last: !is_next },
            false if is_next => Blocks::Keep { lane },
            false => Blocks::Run,
        }
    };
    let cached =
        meter.measure(bench.repeats, || in_flight(&ready.pipeline, &input, [clips, steps], &blocks))?;
    let computed = exact.seconds * (steps - skips.len()) as f64 / steps as f64;
    let mut report = bench.report("skipping clips", &ready, &cached);
    report.extend(fields(json!({
        "clips": clips, "steps": steps, "skipped": skips.len(),
        "exact_s": rounded(exact.seconds, 4), "cached_s": rounded(cached.seconds, 4),
        "share_of_ideal": rounded(computed / cached.seconds, 4),
    })));
    Ok(report.into())
}

/// A ratio of the residual's norm from step to step in the middle of a clip of a published model.
const FALLS_TO: f64 = 0.995;

/// The calls of a session: each step of a clip waits for the clip's own step before.
fn in_flight(
    network: &Pipeline,
    input: &NetworkInput,
    [clips, steps]: [usize; 2],
    blocks: &(dyn Fn(usize) -> Blocks + Sync),
) -> Result<()> {
    let of_round = HALVES * clips;
    let make = |m: usize, returns: &Returns| {
        if m >= of_round && m.is_multiple_of(HALVES) {
            returns.take()?;
        }
        Ok(input.clone())
    };
    let take = |m: usize, velocity: Tensor| {
        let is_last = m >= of_round * (steps - 1);
        Ok((m % HALVES == HALVES - 1 && !is_last).then_some(velocity))
    };
    let calls = pipeline::Calls { count: of_round * steps, input: make, output: take, blocks };
    network.call(calls).map(drop)
}
