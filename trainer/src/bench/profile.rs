//! Where the time of a training step goes: by stage, and by class of operation.

use std::time::Instant;

use kernels::device::synchronize;
use kernels::profile::Times;
use models::dit::BlockPlan;
use serde_json::{Value, json};

use super::{device_name, rounded};
use crate::error::Result;
use crate::pipeline::schedule::Op;
use crate::pipeline::{MicroBatch, Pipeline, Stage, Watched};

/// Losses and gradients of one step, watched: seconds by stage and class. The optimiser's update is not in it.
pub(super) fn profiled(pipeline: &Pipeline, batches: &[MicroBatch], keeping: &[BlockPlan]) -> Result<Value> {
    let start = Instant::now();
    let (_, watched) = pipeline.train_watched(batches, keeping)?;
    pipeline.stages().iter().try_for_each(|stage| synchronize(&stage.device))?;
    let seconds = start.elapsed().as_secs_f64();
    let stages = pipeline.stages().iter().zip(watched).map(|(stage, watched)| told(stage, watched, seconds));
    Ok(json!({ "s": rounded(seconds, 4), "stages": stages.collect::<Result<Vec<_>>>()? }))
}

/// What one stage did of the `seconds` that the step took.
fn told(stage: &Stage, watched: Watched, seconds: f64) -> Result<Value> {
    let (mut forward, mut backward) = (0.0, 0.0);
    for span in &watched.spans {
        let busy = span.end.seconds_since(&span.start)?;
        match span.op {
            Op::Forward(_) => forward += busy,
            Op::Backward(_) => backward += busy,
        }
    }
    let (busy, times) = (forward + backward, watched.operations.times()?);
    let Times { gemm, attention, elementwise, copy } = times;
    let four = |value| rounded(value, 4);
    Ok(json!({
        "device": device_name(&stage.device), "busy_s": four(busy), "bubble": rounded(1.0 - busy / seconds, 3),
        "forward_s": four(forward), "backward_s": four(backward), "gemm_s": four(gemm),
        "attention_s": four(attention), "elementwise_s": four(elementwise), "copy_s": four(copy),
        "other_s": four(busy - times.total()),
    }))
}
