//! Targets that the base itself predicts: calls of the network without the adapters that are trained.

use kernels::{DType, Tensor};

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
        let of_base: Vec<usize> =
            (0..batches.len()).filter(|index| batches[*index].objective.of_base.is_some()).collect();
        if of_base.is_empty() {
            return Ok(batches);
        }
        let mut targets = Vec::new();
        self.without_trained(|pipeline| {
            let input = |m: usize, _: &_| Ok(batches[of_base[m]].input.clone());
            let output = |m: usize, velocity| {
                targets.push(target(&batches[of_base[m]], velocity)?);
                Ok(None)
            };
            pipeline.call(Calls { count: of_base.len(), input, output, blocks: run_all })
        })?;
        for (index, target) in of_base.into_iter().zip(targets) {
            batches[index].target = target;
        }
        Ok(batches)
    }

    /// Does `work` while no stage has the adapters that are trained.
    fn without_trained<T>(&mut self, work: impl FnOnce(&Self) -> Result<T>) -> Result<T> {
        let all: Vec<_> = self.stages.iter_mut().map(|stage| stage.take_trained()).collect();
        let done = work(self);
        self.stages.iter_mut().zip(all).for_each(|(stage, adapters)| stage.adapters = adapters);
        done
    }
}

/// The target of `batch` with the base's prediction `velocity` [b, c, t, h, w] in it, f32 on its device.
pub(crate) fn target(batch: &MicroBatch, velocity: Tensor) -> Result<Tensor> {
    let Some(share) = &batch.objective.of_base else { return Ok(batch.target.clone()) };
    let share = share.to_device(velocity.device())?;
    // Not the difference times the share: a share of 1 gives the prediction to the bit.
    let of_clip = batch.target.to_device(velocity.device())?.broadcast_mul(&((&share * -1.0)? + 1.0)?)?;
    Ok((velocity.to_dtype(DType::F32)?.broadcast_mul(&share)? + of_clip)?)
}
