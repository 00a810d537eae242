//! One optimiser step, top to bottom.

use std::collections::BTreeMap;
use std::thread;
use std::time::Instant;

use kernels::Tensor;
use models::dit::Role;
use models::expert::Expert;

use super::Run;
use super::networks::TrainedNetworks;
use crate::error::{Error, Result};
use crate::learning::lr::learning_rate;
use crate::learning::optim::{Optimizer, Step, checked_norm, clip_factor};
use crate::pipeline::{MicroBatch, Pipeline, StepOutcome};
use crate::plan::Plan;
use crate::train::batch::StepData;
use crate::train::checkpoint::Progress;
use crate::watch::metrics::{ExpertRow, StepRow};

impl Run<'_> {
    /// Batches, losses and gradients, one look at both, update; of two experts, each that has a micro-batch in turn.
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
        // The next step's noise and files are made ready while the devices work on this one.
        let (networks, batches, progress) = (&mut self.networks, &self.batches, self.progress);
        let (learnt, ahead) = thread::scope(|scope| {
            let (next, count) = (data.cursor, plan.train.accumulate);
            let is_last = step + 1 == plan.train.steps;
            let ahead = (!is_last).then(|| scope.spawn(move || batches.step(step + 1, next, count)));
            let learnt = learn(networks, plan, &data, progress);
            (learnt, ahead.map(|ahead| ahead.join().unwrap_or_else(|p| std::panic::resume_unwind(p))))
        });
        let Learnt { loss, grad_norm, lr, experts, by_sigma } = learnt?;
        self.ahead = ahead;

        let mut updates = self.progress.updates;
        experts.iter().for_each(|(expert, row)| *updates.of(*expert) = row.updates);
        self.progress = Progress { step: step + 1, cursor: data.cursor, updates, ..self.progress };
        let (sigma, items, seconds) = (data.sigmas, data.items, started.elapsed().as_secs_f64());
        Ok(StepRow {
            step: step + 1,
            epoch: cursor.epoch,
            loss,
            grad_norm,
            lr,
            sigma,
            seconds,
            items,
            experts,
            by_sigma,
        })
    }
}

/// What a step came to, all networks together.
struct Learnt {
    loss: f64,
    grad_norm: f64,
    lr: f64,
    experts: BTreeMap<Expert, ExpertRow>,
    /// Sigma and mean squared error of each micro-batch.
    by_sigma: Vec<(f64, f64)>,
}

/// Trains each network on its micro-batches and updates it. One that has none is left as it is, moments and all.
fn learn(networks: &mut TrainedNetworks, plan: &Plan, data: &StepData, progress: Progress) -> Result<Learnt> {
    let (config, step) = (&plan.optimizer, progress.step);
    let lr = learning_rate(config.lr, config.schedule, config.warmup, plan.train.steps, step);
    let keeping = plan.memory.keeping();
    let mut learnt = Learnt { loss: 0.0, grad_norm: 0.0, lr, experts: BTreeMap::new(), by_sigma: Vec::new() };
    let is_pair = networks.len() > 1;
    let all: usize = data.micro_batches.iter().map(|batch| batch.weights.len()).sum();
    for index in networks.order() {
        let expert = networks.range(index).expert();
        let own = data.of(expert);
        if own.is_empty() {
            continue;
        }
        let updates = networks.updates(index, &progress) + 1;
        let (pipeline, optimizer) = networks.on_devices(index)?;
        let outcome = pipeline.train(&own, &pipeline.plans(&keeping)?)?;
        let settings = UpdateSettings { lr, clip_norm: config.clip_norm, step: updates };
        let updated = update(pipeline, optimizer, &outcome, &settings);
        let Updated { loss, losses, grad_norm } = updated.map_err(|error| match error {
            Error::NonFiniteLoss { .. } => Error::NonFiniteLoss { step: step + 1, items: data.items.clone() },
            other => other,
        })?;
        for (batch, loss) in own.iter().zip(losses) {
            learnt.by_sigma.extend(unweighted(batch, loss)?);
        }
        let samples: usize = own.iter().map(|batch| batch.weights.len()).sum();
        learnt.loss += loss * (samples as f64 / all as f64);
        learnt.grad_norm = learnt.grad_norm.hypot(grad_norm);
        if let Some(expert) = expert.filter(|_| is_pair) {
            learnt.experts.insert(expert, ExpertRow { loss, grad_norm, micro_batches: own.len(), updates });
        }
    }
    Ok(learnt)
}

/// The mean sigma of a micro-batch and its mean squared error, from a loss that holds the micro-batch's weights; nothing
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

/// How an update is made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UpdateSettings {
    /// Learning rate of this step.
    pub lr: f64,
    /// Largest norm of all gradients together; 0 for no limit.
    pub clip_norm: f64,
    /// Number of this network's update, from 1.
    pub step: u64,
}

/// What a step came to.
#[derive(Debug, Clone)]
pub(crate) struct Updated {
    /// The loss before the update.
    pub loss: f64,
    /// The part of it that each micro-batch has.
    pub losses: Vec<f64>,
    /// Norm of all gradients together, before they were clipped.
    pub grad_norm: f64,
}

/// The second half of a step: one look at losses and gradients, clipping, the optimiser, and the new adapters to their stages.
///
/// # Errors
/// A loss or a gradient that is not finite, or a missing gradient: the update is not made.
pub(crate) fn update(
    pipeline: &mut Pipeline,
    optimizer: &mut Optimizer,
    outcome: &StepOutcome,
    settings: &UpdateSettings,
) -> Result<Updated> {
    let UpdateSettings { lr, clip_norm, step } = *settings;
    let losses = read_back(&outcome.losses)?;
    let loss: f64 = losses.iter().sum();
    if !loss.is_finite() {
        return Err(Error::NonFiniteLoss { step, items: Vec::new() });
    }
    let grad_norm = checked_norm(&outcome.gradients, optimizer.states().keys())?;
    let factor = clip_factor(grad_norm, clip_norm);
    optimizer.update(&outcome.gradients, &Step { lr, factor, number: step })?;
    optimizer.publish(pipeline);
    Ok(Updated { loss, losses, grad_norm })
}

/// The losses of a step's micro-batches, each of which holds its share of the step already; all are read back at once.
fn read_back(losses: &[Tensor]) -> Result<Vec<f64>> {
    let losses: Vec<f32> = Tensor::stack(losses, 0)?.to_vec1()?;
    Ok(losses.into_iter().map(f64::from).collect())
}
