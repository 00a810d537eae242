//! Targets that the base itself predicts: calls of the network in which the adapters that are trained have no effect. They are computed
//! all the same, so that an adapter that does nothing yet predicts these targets to the bit on every device.

use kernels::{DType, Tensor};
use models::dit::{NetworkInput, Role};

use super::{Calls, MicroBatch, Pipeline, run_all};
use crate::error::Result;

impl Pipeline {
    /// `batches` with the base's prediction in the targets that are to hold it; those targets are then on the last stage's device.
    /// Adapters that are only applied belong to the base.
    ///
    /// # Errors
    /// An input that does not fit the model, and a device that fails.
    pub fn with_base_targets(&mut self, batches: &[MicroBatch]) -> Result<Vec<MicroBatch>> {
        let mut batches = batches.to_vec();
        let calls = calls_of(&batches);
        if calls.is_empty() {
            return Ok(batches);
        }
        let mut made = Made::default();
        self.without_trained(|pipeline| {
            let input = |m: usize, _: &_| Ok(calls[m].input(&batches));
            let output = |m: usize, velocity| {
                made.take(&batches, calls[m], velocity)?;
                Ok(None)
            };
            pipeline.call(Calls { count: calls.len(), input, output, blocks: run_all })
        })?;
        let last = calls.iter().filter(|call| call.is_last);
        for (call, target) in last.zip(made.targets) {
            batches[call.batch].target = target;
        }
        Ok(batches)
    }

    /// Does `work` while the adapters that are trained have no effect.
    fn without_trained<T>(&mut self, work: impl FnOnce(&Self) -> Result<T>) -> Result<T> {
        let all: Vec<_> = self.stages.iter_mut().map(|stage| stage.take_trained()).collect();
        let done = work(self);
        self.stages.iter_mut().zip(all).for_each(|(stage, adapters)| stage.adapters = adapters);
        done
    }
}

/// A call of the base for the target of a micro-batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BaseCall {
    /// Which micro-batch.
    batch: usize,
    /// Which of its guides the call is for; nothing for its own text.
    guide: Option<usize>,
    /// Whether it is the last one of the micro-batch.
    is_last: bool,
}

/// The calls for the targets of `batches`, those of a micro-batch one behind the other.
pub(crate) fn calls_of(batches: &[MicroBatch]) -> Vec<BaseCall> {
    let of_base = (0..batches.len()).filter(|index| batches[*index].objective.of_base.is_some());
    let of = |batch: usize| {
        let guides = batches[batch].objective.guides.len();
        let call =
            move |number: usize| BaseCall { batch, guide: number.checked_sub(1), is_last: number == guides };
        (0..=guides).map(call)
    };
    of_base.flat_map(of).collect()
}

impl BaseCall {
    /// What the network sees in the call.
    pub fn input(self, batches: &[MicroBatch]) -> NetworkInput {
        let MicroBatch { input, objective, .. } = &batches[self.batch];
        let input = input.clone();
        match self.guide {
            None => input,
            Some(guide) => {
                let cond = input.cond.with(Role::TEXT, objective.guides[guide].text.clone());
                NetworkInput { cond, ..input }
            }
        }
    }
}

/// What calls made.
#[derive(Debug, Default)]
pub(crate) struct Made {
    /// What the base predicted for the micro-batch whose calls are under way, as far as it did.
    sum: Option<Tensor>,
    /// Targets of micro-batches, in the order of their last calls.
    pub targets: Vec<Tensor>,
}

impl Made {
    /// Takes the prediction `velocity` [b, c, t, h, w] of `call`.
    ///
    /// # Errors
    /// A device that fails.
    pub fn take(&mut self, batches: &[MicroBatch], call: BaseCall, velocity: Tensor) -> Result<()> {
        let batch = &batches[call.batch];
        let mut sum = velocity.to_dtype(DType::F32)?;
        drop(velocity);
        if let Some(guide) = call.guide {
            sum = sum.broadcast_mul(&batch.objective.guides[guide].factor.to_device(sum.device())?)?;
        }
        if let Some(before) = self.sum.take() {
            sum = (before + sum)?;
        }
        match call.is_last {
            true => self.targets.push(target(batch, sum)?),
            false => self.sum = Some(sum),
        }
        Ok(())
    }
}

/// The target of `batch` with what the base `predicted` [b, c, t, h, w] f32 in it, on its device.
fn target(batch: &MicroBatch, predicted: Tensor) -> Result<Tensor> {
    let Some(share) = &batch.objective.of_base else { return Ok(batch.target.clone()) };
    let share = share.to_device(predicted.device())?;
    // Not the difference times the share: a share of 1 gives the prediction to the bit.
    let of_clip = batch.target.to_device(predicted.device())?.broadcast_mul(&((&share * -1.0)? + 1.0)?)?;
    Ok((predicted.broadcast_mul(&share)? + of_clip)?)
}
