//! One optimiser step, top to bottom.

use std::thread;
use std::time::Instant;

use candle_core::Tensor;
use kernels::adamw::Update;

use super::Run;
use crate::checkpoint::Progress;
use crate::error::{Error, Result};
use crate::lr::learning_rate;
use crate::memory::choose;
use crate::metrics::StepRow;
use crate::optim::{checked_norm, clip_factor};

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
        let keeping = choose(&plan.memory, self.pipeline.config().layers);
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

        let loss = summed(&outcome.losses)?;
        if !loss.is_finite() {
            return Err(Error::NonFiniteLoss { step: step + 1, items: data.items });
        }
        let grad_norm = checked_norm(&outcome.gradients, self.optimizer.states().keys())?;

        let optimizer = &plan.optimizer;
        let lr = learning_rate(optimizer.lr, optimizer.schedule, optimizer.warmup, plan.train.steps, step);
        let [beta1, beta2] = optimizer.betas;
        let (eps, weight_decay) = (optimizer.eps, optimizer.weight_decay);
        let update = Update { lr, beta1, beta2, eps, weight_decay, step: step + 1 };
        self.optimizer.update(&outcome.gradients, clip_factor(grad_norm, optimizer.clip_norm), &update)?;
        self.optimizer.publish(&mut self.pipeline);

        self.progress = Progress { step: step + 1, cursor: data.cursor, ..self.progress };
        let (sigma, items, seconds) = (data.sigmas, data.items, started.elapsed().as_secs_f64());
        Ok(StepRow { step: step + 1, epoch: cursor.epoch, loss, grad_norm, lr, sigma, seconds, items })
    }
}

/// The loss of a step. Each micro-batch's loss holds its share of the step already; they are read back at once.
fn summed(losses: &[Tensor]) -> Result<f64> {
    let losses: Vec<f32> = Tensor::stack(losses, 0)?.to_vec1()?;
    Ok(losses.into_iter().map(f64::from).sum())
}
