//! The held-out loss: every held-out item at nine fixed sigmas with fixed noise, so that only the adapter changes it.

use kernels::{DType, Tensor};

use super::Run;
use crate::batch::HeldOut;
use crate::error::{Error, Result};
use crate::metrics::EvalRow;
use crate::noise::EVAL_SIGMAS;
use crate::pipeline::{NetworkInput, Pipeline};
use crate::sample::Share;

impl Run<'_> {
    /// Measures and logs the held-out loss of every network, where anything is held out.
    ///
    /// # Errors
    /// A loss that is not finite.
    pub(super) fn evaluate(&mut self) -> Result<()> {
        let items = self.batches.held_out_items();
        if items == 0 {
            return Ok(());
        }
        // Always in one order: the log of a run that was interrupted is that of one that was not.
        for index in 0..self.learners.len() {
            let share = self.learners.share(index);
            let by_sigma = self.losses_by_sigma(index, share)?;
            let eval_loss = by_sigma.iter().sum::<f64>() / by_sigma.len() as f64;
            let row = EvalRow { step: self.progress.step, expert: share.expert(), eval_loss, by_sigma };
            self.log.eval(&row)?;
            let of = share.expert().map(|expert| format!(", {expert} noise")).unwrap_or_default();
            self.ui.progress(&format!("step {:>6}  held-out loss {eval_loss:.4}{of}", row.step), &row);
        }
        Ok(())
    }

    /// The mean over the held-out items at each of the nine sigmas. Several micro-batches go through the stages together, so
    /// that all work at once; few, since what lies between two stages takes memory for each.
    fn losses_by_sigma(&mut self, index: usize, share: Share) -> Result<Vec<f64>> {
        let (step, items) = (self.progress.step, self.batches.held_out_items());
        let bar = self.ui.bar("held-out loss", items * EVAL_SIGMAS.len());
        let pipeline = &self.learners.awake(index)?.pipeline;
        let together = match pipeline.stages().len() {
            1 => 1,
            stages => 2 * stages,
        };
        let mut sums = [0.0; EVAL_SIGMAS.len()];
        let mut held_out = self.batches.held_out(share);
        loop {
            let some = held_out.by_ref().take(together).collect::<Result<Vec<HeldOut>>>()?;
            if some.is_empty() {
                break;
            }
            for (HeldOut { item, level, sigma, .. }, error) in some.iter().zip(errors(pipeline, &some)?) {
                if !error.is_finite() {
                    return Err(Error::NonFiniteHeldOut { step, item: (*item).to_owned(), sigma: *sigma });
                }
                sums[*level] += error;
            }
            bar.inc(some.len());
        }
        bar.finish();
        Ok(sums.iter().map(|sum| sum / items as f64).collect())
    }
}

/// The mean squared error of the velocity that the network predicts for each of `samples`.
fn errors(pipeline: &Pipeline, samples: &[HeldOut]) -> Result<Vec<f64>> {
    let inputs: Vec<NetworkInput> = samples.iter().map(|sample| sample.batch.input.clone()).collect();
    let error = |(velocity, sample): (Tensor, &HeldOut)| -> Result<Tensor> {
        let target = sample.batch.target.to_device(velocity.device())?;
        Ok((velocity.to_dtype(DType::F32)? - target)?.sqr()?.mean_all()?)
    };
    let errors =
        pipeline.predict(&inputs)?.into_iter().zip(samples).map(error).collect::<Result<Vec<_>>>()?;
    let errors: Vec<f32> = Tensor::stack(&errors, 0)?.to_vec1()?;
    Ok(errors.into_iter().map(f64::from).collect())
}
