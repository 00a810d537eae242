//! The networks that a run trains: one, or both experts of a model, each with its adapter and its optimiser.
//!
//! Where both do not fit onto the devices, the one that has nothing to do rests in host memory. Which of them lies on the
//! devices changes no number.

use std::ops::Range;

use kernels::Device;
use kernels::transfer::HostStore;

use crate::adapters;
use crate::error::Result;
use crate::learning::NoiseRange;
use crate::learning::optim::{Optimizer, Saved};
use crate::machine::forecast::Networks;
use crate::pipeline::{ParkedWeights, Pipeline, WeightParking};
use crate::plan::{Plan, Planned};
use crate::train::checkpoint::{self, Progress};
use crate::watch::ui::Ui;

/// A network with its optimiser.
pub(super) struct TrainedNetwork {
    /// The noise levels that it makes.
    pub share: NoiseRange,
    /// The network.
    pub pipeline: Pipeline,
    /// The states of its adapter.
    pub optimizer: Optimizer,
}

impl TrainedNetwork {
    /// Whether a file of its adapter tells of the weights that it changes.
    fn wants_weights(&self) -> bool {
        let adapters = self.pipeline.stages().iter().flat_map(|stage| stage.adapters.iter());
        let mut trained = adapters.flat_map(|(_, own)| own).filter(|own| own.is_trainable());
        trained.any(|own| own.delta().wants_product())
    }
}

/// All of them.
pub(super) struct TrainedNetworks {
    all: Vec<TrainedNetwork>,
    /// The one that rests, and what it is without.
    resting: Option<(usize, ParkedWeights)>,
    parking: Option<WeightParking>,
}

impl TrainedNetworks {
    /// Reads the networks of the plan onto the devices, with the states of `saved` or new ones. What their blocks keep in host
    /// memory waits in `stores`, one for each stage: only one network trains at a time.
    ///
    /// # Errors
    /// Files that cannot be read, an adapter to begin from that does not fit, a foreign checkpoint.
    pub fn load(
        planned: &Planned,
        split: &[(Device, Range<usize>)],
        stores: &[HostStore],
        saved: Option<&Saved>,
        ui: &Ui,
    ) -> Result<Self> {
        let Planned { plan, targets, .. } = planned;
        let shares = plan.shares();
        let mut networks = Self { all: Vec::new(), resting: None, parking: None };
        for (index, share) in shares.iter().copied().enumerate() {
            // A run that goes on has its adapters in the checkpoint.
            let file = plan.adapter.begins_with(share.expert()).filter(|_| saved.is_none());
            let fresh = adapters::beginning(&plan.adapter, file, targets, plan.run.seed, ui)?;
            let mut pipeline = network(plan, share, split, &fresh, ui)?;
            pipeline.set_stores(stores);
            let optimizer = Optimizer::new(&pipeline, plan.optimizer.rule())?;
            let mut network = TrainedNetwork { share, optimizer, pipeline };
            if let Some(saved) = saved {
                let expert = share.expert().filter(|_| shares.len() > 1);
                network.optimizer.restore(checkpoint::part_of(saved, expert))?;
            }
            network.optimizer.publish(&mut network.pipeline);
            networks.all.push(network);
            if plan.memory.networks == Networks::InTurn && index == 0 {
                networks.lay_to_rest(index)?;
            }
        }
        Ok(networks)
    }

    /// The first, for what is the same of all.
    pub fn first(&self) -> &TrainedNetwork {
        &self.all[0] // a plan trains something
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// The noise levels of one of them.
    pub fn share(&self, index: usize) -> NoiseRange {
        self.all[index].share
    }

    /// All of them, the one that lies on the devices first: whoever goes through them in this order exchanges them once.
    pub fn order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.all.len()).collect();
        order.sort_by_key(|index| self.resting.as_ref().is_some_and(|(resting, _)| resting == index));
        order
    }

    /// One of them, on the devices.
    ///
    /// # Errors
    /// When a device or the host runs out of memory.
    pub fn awake(&mut self, index: usize) -> Result<&mut TrainedNetwork> {
        if let (Some(parking), Some((resting, matrices))) =
            (&self.parking, self.resting.take_if(|(resting, _)| *resting == index))
        {
            // Where one rests there are two.
            let (first, second) = self.all.split_at_mut(1);
            let pair = (&mut first[0].pipeline, &mut second[0].pipeline);
            let (coming, leaving) = if resting == 0 { pair } else { (pair.1, pair.0) };
            self.resting = Some((1 - resting, parking.exchange(leaving, coming, matrices)?));
        }
        Ok(&mut self.all[index])
    }

    /// Takes the matrices of the only network off the devices while `work` needs them, and puts them back.
    ///
    /// # Errors
    /// Those of `work`, and memory that runs out.
    pub fn out_of_the_way<T>(&mut self, index: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
        // Its host memory is for the moment.
        let pipeline = &mut self.all[index].pipeline;
        let parking = WeightParking::new(pipeline)?;
        let resting = parking.rest(pipeline)?;
        let done = work();
        parking.wake(pipeline, resting)?;
        done
    }

    /// One of them, to write its adapter: on the devices where that takes a look at the weights that it changes.
    ///
    /// # Errors
    /// When a device or the host runs out of memory.
    pub fn for_files(&mut self, index: usize) -> Result<&TrainedNetwork> {
        if self.all[index].wants_weights() {
            self.awake(index)?;
        }
        Ok(&self.all[index])
    }

    fn lay_to_rest(&mut self, index: usize) -> Result<()> {
        let pipeline = &mut self.all[index].pipeline;
        let parking = WeightParking::new(pipeline)?;
        self.resting = Some((index, parking.rest(pipeline)?));
        self.parking = Some(parking);
        Ok(())
    }

    /// What the optimisers of all keep, as a checkpoint has it.
    pub fn saved(&self) -> Saved {
        let is_pair = self.all.len() > 1;
        let of = |network: &TrainedNetwork| {
            (network.share.expert().filter(|_| is_pair), network.optimizer.saved())
        };
        checkpoint::joined(self.all.iter().map(of))
    }

    /// Updates made of one of them; a network that is alone is updated in every step.
    pub fn updates(&self, index: usize, progress: &Progress) -> u64 {
        match (self.all[index].share.expert(), self.all.len()) {
            (Some(expert), 2) => *progress.updates.clone().of(expert),
            _ => progress.step,
        }
    }
}

/// The network of `share` on the devices of `split`, with `adapters`.
///
/// # Errors
/// Files that cannot be read.
pub(super) fn network(
    plan: &Plan,
    share: NoiseRange,
    split: &[(Device, Range<usize>)],
    adapters: &models::adapter::Adapters,
    ui: &Ui,
) -> Result<Pipeline> {
    let (dit, weights) = match share.expert() {
        Some(expert) => plan.model.dits.of(expert).open()?,
        None => plan.model.open_dit()?,
    };
    let load = || Pipeline::load(&weights, &dit, split, adapters, plan.model.precision.dit());
    let mut pipeline = ui.phase("loading the DiT", load)?;
    pipeline.set_route(plan.devices.transfer.into())?;
    pipeline.set_ffn_tokens(plan.memory.ffn_tokens);
    Ok(pipeline)
}
