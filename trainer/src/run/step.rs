//! One optimiser step, top to bottom.

use std::thread;
use std::time::Instant;

use candle_core::Tensor;
use kernels::adamw::Update;

use super::Run;
use crate::checkpoint::Progress;
use crate::error::{Error, Result};
use crate::lr::learning_rate;
use crate::metrics::StepRow;
use crate::optim::{Optimizer, OptimizerConfig, checked_norm, clip_factor};
use crate::pipeline::{Pipeline, StepOutcome};

impl Run<'_> {
    /// Batches, losses and gradients, one look at both, update.
    ///
    /// # Errors
    /// A loss or a gradient that is not finite, or a missing gradient: the update is not made.
    pub(super) fn step(&mut self) -> Result<StepRow> {
        let started = Instant::now();
        let (plan, Progress { step, cursor, .. }) = (self.plan, self.progress);

        let data = match self.ahead.take() {
            Some(data) => data?,
            None => self.batches.step(step, cursor, plan.train.accumulate)?,
        };
        let keeping = plan.memory.keeping();
        // The next step's noise and files are made ready while the devices work on this one.
        let (outcome, ahead) = thread::scope(|scope| {
            let (batches, next, count) = (&self.batches, data.cursor, plan.train.accumulate);
            let is_last = step + 1 == plan.train.steps;
            let ahead = (!is_last).then(|| scope.spawn(move || batches.step(step + 1, next, count)));
            let outcome = self.pipeline.train(&data.micro_batches, &keeping);
            (outcome, ahead.map(|ahead| ahead.join().unwrap_or_else(|p| std::panic::resume_unwind(p))))
        });
        let outcome = outcome?;
        self.ahead = ahead;

        let optimizer = &plan.optimizer;
        let lr = learning_rate(optimizer.lr, optimizer.schedule, optimizer.warmup, plan.train.steps, step);
        let settings = UpdateSettings { lr, config: optimizer, step: step + 1 };
        let updated = update(&mut self.pipeline, &mut self.optimizer, &outcome, &settings);
        let Updated { loss, grad_norm } = updated.map_err(|error| match error {
            Error::NonFiniteLoss { step, .. } => Error::NonFiniteLoss { step, items: data.items.clone() },
            other => other,
        })?;

        self.progress = Progress { step: step + 1, cursor: data.cursor, ..self.progress };
        let (sigma, items, seconds) = (data.sigmas, data.items, started.elapsed().as_secs_f64());
        Ok(StepRow { step: step + 1, epoch: cursor.epoch, loss, grad_norm, lr, sigma, seconds, items })
    }
}

/// How an update is made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UpdateSettings<'a> {
    /// Learning rate of this step.
    pub lr: f64,
    /// The rest of AdamW, and the clipping.
    pub config: &'a OptimizerConfig,
    /// Number of the step, from 1.
    pub step: u64,
}

/// What a step came to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Updated {
    /// The loss before the update.
    pub loss: f64,
    /// Norm of all gradients together, before they were clipped.
    pub grad_norm: f64,
}

/// The second half of a step: one look at losses and gradients, clipping, AdamW, and the new adapters to their stages.
///
/// # Errors
/// A loss or a gradient that is not finite, or a missing gradient: the update is not made.
pub(crate) fn update(
    pipeline: &mut Pipeline,
    optimizer: &mut Optimizer,
    outcome: &StepOutcome,
    settings: &UpdateSettings,
) -> Result<Updated> {
    let UpdateSettings { lr, config, step } = *settings;
    let loss = summed(&outcome.losses)?;
    if !loss.is_finite() {
        return Err(Error::NonFiniteLoss { step, items: Vec::new() });
    }
    let grad_norm = checked_norm(&outcome.gradients, optimizer.states().keys())?;
    let [beta1, beta2] = config.betas;
    let update = Update { lr, beta1, beta2, eps: config.eps, weight_decay: config.weight_decay, step };
    optimizer.update(&outcome.gradients, clip_factor(grad_norm, config.clip_norm), &update)?;
    optimizer.publish(pipeline);
    Ok(Updated { loss, grad_norm })
}

/// The loss of a step. Each micro-batch's loss holds its share of the step already; they are read back at once.
fn summed(losses: &[Tensor]) -> Result<f64> {
    let losses: Vec<f32> = Tensor::stack(losses, 0)?.to_vec1()?;
    Ok(losses.into_iter().map(f64::from).sum())
}
