//! Profiles: time by stage, and by class of operation.

use std::time::Instant;

use kernels::Device;
use kernels::device::synchronize;
use kernels::profile::{Recording, Times, record};
use models::dit::Plans;
use serde_json::{Value, json};

use super::{device_name, rounded};
use crate::error::Result;
use crate::pipeline::schedule::Op;
use crate::pipeline::{MicroBatch, NetworkInput, Pipeline, Stage, Watched};

/// Losses and gradients of one step, watched: seconds by stage and class. The optimiser's update is not in it.
pub(super) fn profiled(pipeline: &Pipeline, batches: &[MicroBatch], plans: &Plans) -> Result<Value> {
    let start = Instant::now();
    let (_, watched) = pipeline.train_watched(batches, plans)?;
    pipeline.stages().iter().try_for_each(|stage| synchronize(&stage.device))?;
    let seconds = start.elapsed().as_secs_f64();
    let stages =
        pipeline.stages().iter().zip(watched).map(|(stage, watched)| report(stage, watched, seconds));
    Ok(json!({ "s": rounded(seconds, 4), "stages": stages.collect::<Result<Vec<_>>>()? }))
}

/// A prediction, watched: seconds by stage and class.
pub(super) fn predicted(pipeline: &Pipeline, input: &NetworkInput) -> Result<Value> {
    let start = Instant::now();
    let (_, watched) = pipeline.predict_watched(std::slice::from_ref(input))?;
    pipeline.stages().iter().try_for_each(|stage| synchronize(&stage.device))?;
    let seconds = start.elapsed().as_secs_f64();
    let of_stage = |(stage, operations): (&Stage, Recording)| {
        let mut report = by_class(operations.times()?, seconds);
        report["device"] = device_name(&stage.device).into();
        Ok(report)
    };
    let stages = pipeline.stages().iter().zip(watched).map(of_stage);
    Ok(json!({ "s": rounded(seconds, 4), "stages": stages.collect::<Result<Vec<_>>>()? }))
}

/// Work on this thread and one device, watched: seconds by class.
pub(super) fn watched(device: &Device, work: impl FnOnce() -> Result<()>) -> Result<Value> {
    synchronize(device)?;
    let start = Instant::now();
    let (done, operations) = record(work);
    done?;
    synchronize(device)?;
    let seconds = start.elapsed().as_secs_f64();
    let mut report = by_class(operations.times()?, seconds);
    report["s"] = rounded(seconds, 4).into();
    Ok(report)
}

/// Of `busy` seconds.
fn by_class(times: Times, busy: f64) -> Value {
    let Times { gemm, attention, elementwise, copy } = times;
    let four = |value| rounded(value, 4);
    json!({
        "gemm_s": four(gemm), "attention_s": four(attention), "elementwise_s": four(elementwise),
        "copy_s": four(copy), "other_s": four(busy - times.total()),
    })
}

/// What one stage did of the `seconds` that the step took.
fn report(stage: &Stage, watched: Watched, seconds: f64) -> Result<Value> {
    let (mut forward, mut backward) = (0.0, 0.0);
    for span in &watched.spans {
        let busy = span.end.seconds_since(&span.start)?;
        match span.op {
            Op::Forward(_) => forward += busy,
            Op::Backward(_) => backward += busy,
        }
    }
    let busy = forward + backward;
    let mut report = by_class(watched.operations.times()?, busy);
    report["device"] = device_name(&stage.device).into();
    report["bubble"] = rounded(1.0 - busy / seconds, 3).into();
    for (name, value) in [("busy_s", busy), ("forward_s", forward), ("backward_s", backward)] {
        report[name] = rounded(value, 4).into();
    }
    Ok(report)
}
