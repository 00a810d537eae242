//! One optimiser step, top to bottom. With several replicas each makes its share of the micro-batches, all see all losses and
//! the same sums of gradients, and so all make the same decision and the same update.

use std::collections::BTreeMap;
use std::thread;
use std::time::Instant;

use kernels::Tensor;
use models::dit::Gradients;
use models::expert::Expert;

use super::Run;
use super::exchange::Exchange;
use super::networks::TrainedNetworks;
use crate::error::{Error, Result};
use crate::learning::optim::{Optimizer, Step, checked_norm, clip_factor};
use crate::pipeline::{Pipeline, StepOutcome};
use crate::plan::Plan;
use crate::replicas::Replicas;
use crate::train::batch::StepData;
use crate::train::checkpoint::Progress;
use crate::watch::metrics::{ExpertRow, ReplicasRow, StepRow};

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
            None => self.batches.share_of_step(step, cursor, plan.train.accumulate, self.replicas.share())?,
        };
        // The next step's noise and files are made ready while the devices work on this one.
        let (networks, batches, progress) = (&mut self.networks, &self.batches, self.progress);
        let factor = self.told.factor(step, plan.optimizer.lr);
        let share = self.replicas.share();
        let replicas = &mut *self.replicas;
        let (learnt, ahead) = thread::scope(|scope| {
            let (next, count) = (data.cursor, plan.train.accumulate);
            let is_last = step + 1 == plan.train.steps;
            let make = move || batches.share_of_step(step + 1, next, count, share);
            let ahead = (!is_last).then(|| scope.spawn(make));
            let learnt =
                replicas.in_step(|replicas| learn(networks, (plan, factor), &data, progress, replicas));
            (learnt, ahead.map(|ahead| ahead.join().unwrap_or_else(|p| std::panic::resume_unwind(p))))
        });
        let Learnt { loss, prior, grad_norm, lr, experts, by_sigma, replicas } = learnt?;
        self.ahead = ahead;

        let mut updates = self.progress.updates;
        experts.iter().for_each(|(expert, row)| *updates.of(*expert) = row.updates);
        self.progress = Progress { step: step + 1, cursor: data.cursor, updates, ..self.progress };
        let (sigma, items, seconds) = (data.sigmas, data.items, started.elapsed().as_secs_f64());
        let tokens = data.tokens;
        Ok(StepRow {
            step: step + 1,
            epoch: cursor.epoch,
            loss,
            prior,
            grad_norm,
            lr,
            tokens,
            sigma,
            seconds,
            items,
            experts,
            replicas,
            by_sigma,
        })
    }
}

/// What a step came to, all networks together.
#[derive(Default)]
struct Learnt {
    loss: f64,
    /// The loss of the priors, where there were some.
    prior: Option<f64>,
    grad_norm: f64,
    lr: f64,
    experts: BTreeMap<Expert, ExpertRow>,
    /// Sigma and mean error of each micro-batch.
    by_sigma: Vec<(f64, f64)>,
    /// What each replica spent its time on, where there are several.
    replicas: Option<ReplicasRow>,
}

/// Trains each network on its micro-batches and updates it, with the plan's learning rate times `factor`. One that has none is left
/// as it is, moments and all.
fn learn(
    networks: &mut TrainedNetworks,
    (plan, factor): (&Plan, f64),
    data: &StepData,
    progress: Progress,
    replicas: &mut Replicas,
) -> Result<Learnt> {
    let (config, step) = (&plan.optimizer, progress.step);
    let lr = factor * config.rates(plan.train.steps).at(step);
    let keeping = plan.memory.keeping();
    let mut learnt = Learnt { lr, ..Learnt::default() };
    let is_pair = networks.len() > 1;
    let all: usize = data.parts.iter().map(|part| part.counts).sum();
    for index in common_order(networks, replicas)? {
        let expert = networks.range(index).expert();
        let parts = data.parts_of(expert);
        if parts.is_empty() {
            continue;
        }
        let updates = networks.updates(index, &progress) + 1;
        let (pipeline, optimizer) = networks.on_devices(index)?;
        let mut exchange = Exchange::new(replicas);
        let own = data.of(expert);
        let outcome = match own.is_empty() {
            true => nothing(optimizer)?,
            false => {
                let taught = pipeline.with_base_targets(&own)?;
                pipeline.train(&taught, &pipeline.plans(&keeping)?)?
            }
        };
        let losses = exchange.losses(&own, &outcome.losses, &parts)?;
        let not_finite = |error| match error {
            Error::NonFiniteLoss { .. } => Error::NonFiniteLoss { step: step + 1, items: data.items.clone() },
            other => other,
        };
        let loss = sum_of_losses(losses.iter().map(|part| part.loss), step).map_err(not_finite)?;
        let priors = losses.iter().filter_map(|part| part.prior);
        let prior = sum_of_losses(priors.clone(), step).map_err(not_finite)?;
        let gradients = exchange.gradients(outcome.gradients, optimizer)?;
        let settings = UpdateSettings { lr, clip_norm: config.clip_norm, step: updates };
        let grad_norm = apply(pipeline, optimizer, &gradients, &settings, |own| exchange.common(own))?;
        learnt.by_sigma.extend(losses.iter().filter_map(|part| part.by_sigma));
        let counts: usize = parts.iter().map(|part| part.counts).sum();
        let share = counts as f64 / all as f64;
        learnt.loss += loss * share;
        if priors.count() > 0 {
            learnt.prior = Some(learnt.prior.unwrap_or(0.0) + prior * share);
        }
        learnt.grad_norm = learnt.grad_norm.hypot(grad_norm);
        if let Some(expert) = expert.filter(|_| is_pair) {
            let micro_batches = parts.len();
            learnt.experts.insert(expert, ExpertRow { loss, grad_norm, micro_batches, updates });
        }
        exchange.note(&mut learnt.replicas);
    }
    Ok(learnt)
}

/// The order in which the networks are trained, which is rank 0's: other ranks may have others on their devices.
fn common_order(networks: &TrainedNetworks, replicas: &mut Replicas) -> Result<Vec<usize>> {
    let own = networks.order();
    if own.len() < 2 || replicas.world() == 1 {
        return Ok(own);
    }
    let first = replicas.broadcast(own.iter().map(|index| *index as u8).collect())?;
    Ok(first.into_iter().map(usize::from).collect())
}

/// What a replica adds to a step of which no micro-batch is its own.
fn nothing(optimizer: &Optimizer) -> Result<StepOutcome> {
    let mut gradients = Gradients::default();
    for (name, state) in optimizer.states() {
        gradients.add(name.clone(), state.parameter.zeros_like()?)?;
    }
    Ok(StepOutcome { losses: Vec::new(), gradients })
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

/// The second half of a step: one look at losses and gradients, clipping, the optimiser, and the new adapters to their stages.
///
/// # Errors
/// A loss or a gradient that is not finite, or a missing gradient: the update is not made.
pub(crate) fn update(
    pipeline: &mut Pipeline,
    optimizer: &mut Optimizer,
    outcome: &StepOutcome,
    settings: &UpdateSettings,
) -> Result<()> {
    sum_of_losses(read_back(&outcome.losses)?.into_iter(), settings.step)?;
    apply(pipeline, optimizer, &outcome.gradients, settings, Ok).map(drop)
}

/// The loss of a step, of which each of `losses` holds its part.
///
/// # Errors
/// One that is not finite.
fn sum_of_losses(losses: impl Iterator<Item = f64>, step: u64) -> Result<f64> {
    let loss: f64 = losses.sum();
    match loss.is_finite() {
        true => Ok(loss),
        false => Err(Error::NonFiniteLoss { step, items: Vec::new() }),
    }
}

/// Clips `gradients`, updates the adapters by them and gives them to their stages. Their norm before that, which `common` may
/// replace: the same gradients may have other norms on other cards, by rounding.
fn apply(
    pipeline: &mut Pipeline,
    optimizer: &mut Optimizer,
    gradients: &Gradients,
    settings: &UpdateSettings,
    common: impl FnOnce(f64) -> Result<f64>,
) -> Result<f64> {
    let UpdateSettings { lr, clip_norm, step } = *settings;
    let grad_norm = common(checked_norm(gradients, optimizer.states().keys())?)?;
    let factor = clip_factor(grad_norm, clip_norm);
    optimizer.update(gradients, &Step { lr, factor, number: step })?;
    optimizer.publish(pipeline);
    Ok(grad_norm)
}

/// The losses of a step's micro-batches, each of which holds its share of the step already; all are read back at once.
pub(super) fn read_back(losses: &[Tensor]) -> Result<Vec<f64>> {
    let losses: Vec<f32> = Tensor::stack(losses, 0)?.to_vec1()?;
    Ok(losses.into_iter().map(f64::from).collect())
}
