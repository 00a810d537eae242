//! The held-out loss: every held-out item at nine fixed sigmas with fixed noise, so that only the adapter changes it. Replicas
//! share the samples, and add their errors in one order.

use std::sync::mpsc::channel;

use kernels::{DType, Tensor};

use super::Run;
use crate::error::{Error, Result};
use crate::learning::NoiseRange;
use crate::learning::noise::EVAL_SIGMAS;
use crate::pipeline::{Calls, Returns, run_all};
use crate::replicas::{ReplicaError, Replicas};
use crate::train::batch::HeldOut;
use crate::watch::metrics::EvalRow;

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
        self.networks.show_exported()?;
        let done = self.evaluate_each();
        self.networks.show_trained()?;
        done
    }

    fn evaluate_each(&mut self) -> Result<()> {
        // Always in one order: the log of a run that was interrupted is that of one that was not.
        for index in 0..self.networks.len() {
            let range = self.networks.range(index);
            let by_sigma = self.losses_by_sigma(index, range)?;
            let eval_loss = by_sigma.iter().sum::<f64>() / by_sigma.len() as f64;
            let row = EvalRow { step: self.progress.step, expert: range.expert(), eval_loss, by_sigma };
            self.log.eval(&row)?;
            let of = range.expert().map(|expert| format!(", {expert} noise")).unwrap_or_default();
            self.ui.progress(&format!("step {:>6}  held-out loss {eval_loss:.4}{of}", row.step), &row);
        }
        Ok(())
    }

    /// The mean over the held-out items at each of the nine sigmas. The micro-batches go through the stages one behind the
    /// other, so that all work at once.
    fn losses_by_sigma(&mut self, index: usize, range: NoiseRange) -> Result<Vec<f64>> {
        let (step, items) = (self.progress.step, self.batches.held_out_items());
        let share = self.replicas.share();
        let count = (0..items * EVAL_SIGMAS.len()).filter(|index| share.has(*index)).count();
        let bar = self.ui.bar("held-out loss", count);
        let (pipeline, _) = self.networks.on_devices(index)?;
        let mut held_out = self.batches.share_of_held_out(range, share);
        // From the first stage's thread to the last one's.
        let (send, expected) = channel::<HeldOut>();
        let input = move |_, _: &Returns| {
            let sample =
                held_out.next().ok_or_else(|| Error::from(kernels::Error::msg("no sample is left")))??;
            let input = sample.batch.input.clone();
            send.send(sample).map_err(|_| Error::NeighbourStopped)?;
            Ok(input)
        };
        let mut errors = Vec::new();
        let (errors_so_far, bar_of_all) = (&mut errors, &bar);
        let output = move |_, velocity: Tensor| {
            let HeldOut { item, sigma, batch, .. } = expected.recv().map_err(|_| Error::NeighbourStopped)?;
            let target = batch.target.to_device(velocity.device())?;
            let error = (velocity.to_dtype(DType::F32)? - target)?.sqr()?.mean_all()?.to_scalar::<f32>()?;
            if !error.is_finite() {
                return Err(Error::NonFiniteHeldOut { step, item: item.to_owned(), sigma });
            }
            errors_so_far.push(f64::from(error));
            bar_of_all.inc(1);
            Ok(None)
        };
        if count > 0 {
            pipeline.call(Calls { count, input, output, blocks: run_all })?;
        }
        bar.finish();
        let errors = errors_of_all(self.replicas, &errors, items * EVAL_SIGMAS.len())?;
        let of_level = |level| errors.iter().skip(level).step_by(EVAL_SIGMAS.len()).sum::<f64>();
        Ok((0..EVAL_SIGMAS.len()).map(|level| of_level(level) / items as f64).collect())
    }
}

/// The errors of all `count` samples, of which `own` are this replica's.
fn errors_of_all(replicas: &mut Replicas, own: &[f64], count: usize) -> Result<Vec<f64>> {
    let message: Vec<[u8; 8]> = own.iter().map(|error| error.to_le_bytes()).collect();
    let told = replicas.gather(message.as_flattened())?;
    let world = replicas.world();
    let error = |index: usize| -> Option<f64> {
        let bytes = told.get(index % world)?.as_chunks().0.get(index / world)?;
        Some(f64::from_le_bytes(*bytes))
    };
    let why = || "a replica measured fewer held-out samples than were dealt to it".to_owned();
    let errors: Option<Vec<f64>> = (0..count).map(error).collect();
    errors.ok_or_else(|| ReplicaError::OutOfStep { why: why() }.into())
}
