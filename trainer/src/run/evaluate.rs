//! The held-out loss: every held-out item at nine fixed sigmas with fixed noise, so that only the adapter changes it.

use candle_core::DType;

use super::Run;
use crate::error::Result;
use crate::metrics::EvalRow;
use crate::noise::EVAL_SIGMAS;
use crate::pipeline::{MicroBatch, Pipeline};

impl Run<'_> {
    /// Measures and logs the held-out loss of every network, where anything is held out.
    pub(super) fn evaluate(&mut self) -> Result<()> {
        if !self.batches.has_held_out() {
            return Ok(());
        }
        // Always in one order: the log of a run that was interrupted is that of one that was not.
        for index in 0..self.learners.len() {
            let share = self.learners.share(index);
            let batches = self.batches.held_out(share)?;
            let bar = self.ui.bar("held-out loss", batches.len());
            let mut sums = [0.0; EVAL_SIGMAS.len()];
            let learner = self.learners.awake(index)?;
            for (i, (_, batch)) in batches.iter().enumerate() {
                sums[i % EVAL_SIGMAS.len()] += error_of(&learner.pipeline, batch)?;
                bar.inc(1);
            }
            bar.finish();
            let items = (batches.len() / EVAL_SIGMAS.len()) as f64;
            let by_sigma: Vec<f64> = sums.iter().map(|sum| sum / items).collect();
            let eval_loss = by_sigma.iter().sum::<f64>() / by_sigma.len() as f64;
            let row = EvalRow { step: self.progress.step, expert: share.expert(), eval_loss, by_sigma };
            self.log.eval(&row)?;
            let of = share.expert().map(|expert| format!(", {expert} noise")).unwrap_or_default();
            self.ui.progress(&format!("step {:>6}  held-out loss {eval_loss:.4}{of}", row.step), &row);
        }
        Ok(())
    }
}

/// The mean squared error of the velocity that the network predicts.
fn error_of(pipeline: &Pipeline, batch: &MicroBatch) -> Result<f64> {
    let velocity = pipeline.predict(std::slice::from_ref(&batch.input))?.remove(0);
    let target = batch.target.to_device(velocity.device())?;
    let error = (velocity.to_dtype(DType::F32)? - target)?.sqr()?.mean_all()?.to_scalar::<f32>()?;
    Ok(f64::from(error))
}
