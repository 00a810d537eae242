//! Clips in flight: how busy the stages are while several clips are sampled.

use kernels::Tensor;
use serde_json::{Value, json};

use super::dit::{DitBench, fields};
use super::meter::Meter;
use super::rounded;
use crate::error::Result;
use crate::pipeline::{Calls, NetworkInput, Pipeline, Returns, run_all};

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
    let input = bench.input(&ready.config, first)?;
    let meter = Meter::of(ready.devices.iter().map(|(device, _)| device));
    let predict = |count: usize| {
        let inputs = vec![input.clone(); count];
        ready.pipeline.predict(&inputs).map(drop)
    };
    let one = meter.measure(bench.repeats, || predict(1))?.seconds;
    let flowing = meter.measure(bench.repeats, || in_flight(&ready.pipeline, &input, clips))?;
    let drained = meter.measure(bench.repeats, || (0..STEPS).try_for_each(|_| predict(HALVES * clips)))?;
    let calls = (HALVES * clips * STEPS) as f64;
    let busy = |seconds: f64| rounded(calls * one / (ready.devices.len() as f64 * seconds), 3);
    let of_step = |seconds: f64| rounded(seconds / (clips * STEPS) as f64, 4);
    let mut told = bench.told("clips", &ready, &flowing);
    told.extend(fields(json!({
        "clips": clips, "s_per_forward": rounded(one, 4),
        "s_per_step": of_step(flowing.seconds), "busy": busy(flowing.seconds),
        "drained_s_per_step": of_step(drained.seconds), "drained_busy": busy(drained.seconds),
    })));
    Ok(told.into())
}

/// The calls of a session: each step of a clip waits for the clip's own step before.
fn in_flight(pipeline: &Pipeline, input: &NetworkInput, clips: usize) -> Result<()> {
    let of_round = HALVES * clips;
    let make = |m: usize, returns: &Returns| {
        if m >= of_round && m.is_multiple_of(HALVES) {
            returns.take()?;
        }
        Ok(input.clone())
    };
    let take = |m: usize, velocity: Tensor| {
        let is_last = m >= of_round * (STEPS - 1);
        Ok((m % HALVES == HALVES - 1 && !is_last).then_some(velocity))
    };
    let calls = Calls { count: of_round * STEPS, input: make, output: take, blocks: run_all };
    pipeline.call(calls).map(drop)
}
