//! What replicas exchange in a step: losses, gradients, and how long each took. A run without replicas exchanges nothing and
//! computes the same.

use std::time::Instant;

use kernels::Tensor;
use models::dit::{Gradients, Role};

use super::step::read_back;
use crate::error::{Error, Result};
use crate::learning::optim::Optimizer;
use crate::pipeline::MicroBatch;
use crate::replicas::{ReplicaError, Replicas};
use crate::train::batch::Part;
use crate::watch::metrics::ReplicasRow;

/// The exchange of one network's part of a step.
pub(super) struct Exchange<'a> {
    replicas: &'a mut Replicas,
    begun: Instant,
    /// Seconds that each rank took for its micro-batches.
    own: Vec<f64>,
    /// Seconds from when this rank had made its micro-batches until it had the sums.
    exchanged: f64,
}

/// The loss of one micro-batch, with its share of the step in it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct PartLoss {
    pub loss: f64,
    /// That of the prior beside it.
    pub prior: Option<f64>,
    /// Mean sigma, and the mean error without weights, as the penalty counts it.
    pub by_sigma: Option<(f64, f64)>,
}

/// Numbers of a [`PartLoss`] in a message.
const NUMBERS: usize = 3;

impl<'a> Exchange<'a> {
    pub fn new(replicas: &'a mut Replicas) -> Self {
        Self { replicas, begun: Instant::now(), own: Vec::new(), exchanged: 0.0 }
    }

    /// The losses of `parts`, which all replicas have made together, in their order; `own` and `losses` are those of this one.
    ///
    /// # Errors
    /// A replica that fails, and one that made other micro-batches than it should.
    pub fn losses(&mut self, own: &[MicroBatch], losses: &[Tensor], parts: &[Part]) -> Result<Vec<PartLoss>> {
        let losses = if losses.is_empty() { Vec::new() } else { read_back(losses)? };
        let part = |(batch, &loss): (&MicroBatch, &f64)| -> Result<PartLoss> {
            Ok(PartLoss { loss, prior: None, by_sigma: unweighted(batch, loss)? })
        };
        let own: Vec<PartLoss> = own.iter().zip(&losses).map(part).collect::<Result<_>>()?;
        // The losses were read back, so the devices have made them.
        let mut message = self.begun.elapsed().as_secs_f64().to_le_bytes().to_vec();
        self.begun = Instant::now();
        for PartLoss { loss, by_sigma, .. } in own {
            let (sigma, error) = by_sigma.unwrap_or((f64::NAN, f64::NAN));
            message.extend([loss, sigma, error].map(f64::to_le_bytes).as_flattened());
        }
        let mut all = Vec::new();
        for told in self.replicas.gather(&message)? {
            let numbers: Vec<f64> =
                told.as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect();
            let (seconds, losses) =
                numbers.split_first().map_or((0.0, &[][..]), |(first, rest)| (*first, rest));
            self.own.push(seconds);
            all.push(losses.as_chunks::<NUMBERS>().0.to_vec().into_iter());
        }
        let next = |part: &Part| {
            let of_rank = all.get_mut(part.rank)?;
            let [loss, sigma, error] = of_rank.next()?;
            let prior = if part.has_prior { Some(of_rank.next()?[0]) } else { None };
            Some(PartLoss { loss, prior, by_sigma: sigma.is_finite().then_some((sigma, error)) })
        };
        let why = || "a replica made fewer micro-batches than were dealt to it".to_owned();
        let losses: Option<Vec<PartLoss>> = parts.iter().map(next).collect();
        losses.ok_or_else(|| ReplicaError::OutOfStep { why: why() }.into())
    }

    /// The sums of the gradients of all replicas.
    ///
    /// # Errors
    /// A missing gradient, and a replica that fails.
    pub fn gradients(&mut self, own: Gradients, optimizer: &Optimizer) -> Result<Gradients> {
        if self.replicas.world() == 1 {
            return Ok(own);
        }
        // By name, so that the order is the same whatever the split.
        let names = || optimizer.states().keys();
        let of = |name: &String| {
            own.get(name).cloned().ok_or_else(|| Error::MissingGradient { name: name.clone() })
        };
        let tensors: Vec<Tensor> = names().map(of).collect::<Result<_>>()?;
        drop(own);
        let mut sums = Gradients::default();
        for (name, sum) in names().zip(self.replicas.sum(tensors)?) {
            sums.add(name.clone(), sum)?;
        }
        self.exchanged = self.begun.elapsed().as_secs_f64();
        Ok(sums)
    }

    /// Rank 0's number, in place of one that should be the same everywhere.
    ///
    /// # Errors
    /// A replica that fails.
    pub fn common(&mut self, own: f64) -> Result<f64> {
        if self.replicas.world() == 1 {
            return Ok(own);
        }
        let first = self.replicas.broadcast(own.to_le_bytes().to_vec())?;
        let bytes = first.first_chunk().copied();
        let why = || "rank 0 sent no number".to_owned();
        Ok(f64::from_le_bytes(bytes.ok_or_else(|| ReplicaError::OutOfStep { why: why() })?))
    }

    /// Adds what the exchange took to `row`, where there are several replicas.
    pub fn note(self, row: &mut Option<ReplicasRow>) {
        if self.replicas.world() > 1 {
            let row = row.get_or_insert_with(|| ReplicasRow {
                compute_seconds: vec![0.0; self.own.len()],
                exchange_seconds: 0.0,
            });
            row.compute_seconds.iter_mut().zip(&self.own).for_each(|(sum, own)| *sum += own);
            row.exchange_seconds += self.exchanged;
        }
    }
}

/// The mean sigma of a micro-batch and its mean error (as the penalty counts it), from a loss that holds the micro-batch's weights; nothing
/// where the weights leave nothing of it.
fn unweighted(batch: &MicroBatch, loss: f64) -> Result<Option<(f64, f64)>> {
    let weight = batch.weights.iter().copied().map(f64::from).sum::<f64>() / batch.weights.len() as f64;
    // Where there is a timestep for each token, those of a given frame are 0.
    let timestep = batch.input.cond.require(Role::TIMESTEP)?;
    let times: Vec<f32> = match timestep.dims() {
        [_, _] => timestep.max(1)?.to_vec1()?,
        _ => timestep.to_vec1()?,
    };
    let sigma = times.iter().copied().map(f64::from).sum::<f64>() / times.len() as f64 / 1000.0;
    Ok((weight > 0.0).then_some((sigma, loss / weight)))
}
