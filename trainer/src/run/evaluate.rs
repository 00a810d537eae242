//! The held-out loss: every held-out item at nine fixed sigmas with fixed noise, so that only the adapter changes it.

use candle_core::DType;

use super::Run;
use crate::error::Result;
use crate::metrics::EvalRow;
use crate::noise::EVAL_SIGMAS;

impl Run<'_> {
    /// Measures and logs the held-out loss, where anything is held out.
    pub(super) fn evaluate(&mut self) -> Result<()> {
        if !self.batches.has_held_out() {
            return Ok(());
        }
        let batches = self.batches.held_out()?;
        let bar = self.ui.bar("held-out loss", batches.len());
        let mut sums = [0.0; EVAL_SIGMAS.len()];
        for (i, (_, batch)) in batches.iter().enumerate() {
            let velocity = self.pipeline.predict(std::slice::from_ref(&batch.input))?.remove(0);
            let target = batch.target.to_device(velocity.device())?;
            let error = (velocity.to_dtype(DType::F32)? - target)?.sqr()?.mean_all()?.to_scalar::<f32>()?;
            sums[i % EVAL_SIGMAS.len()] += f64::from(error);
            bar.inc(1);
        }
        bar.finish();
        let items = (batches.len() / EVAL_SIGMAS.len()) as f64;
        let by_sigma: Vec<f64> = sums.iter().map(|sum| sum / items).collect();
        let eval_loss = by_sigma.iter().sum::<f64>() / by_sigma.len() as f64;
        let row = EvalRow { step: self.progress.step, eval_loss, by_sigma };
        self.log.eval(&row)?;
        self.ui.progress(&format!("step {:>6}  held-out loss {eval_loss:.4}", row.step), &row);
        Ok(())
    }
}
