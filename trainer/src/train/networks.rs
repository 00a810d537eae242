//! The networks that a run trains: one, or both experts of a model, each with its adapter and its optimiser.

use kernels::transfer::HostStore;

use crate::adapters;
use crate::error::{Error, Result};
use crate::learning::NoiseRange;
use crate::learning::optim::{NormLimit, Optimizer, Saved};
use crate::pipeline::Pipeline;
use crate::plan::{Plan, Planned};
use crate::residents::{FromFiles, Residents};
use crate::train::checkpoint::{self, Progress};
use crate::watch::ui::Ui;

/// What is trained, and everything else that a run has loaded.
pub(super) struct TrainedNetworks {
    residents: Residents,
    trained: Vec<Trained>,
}

/// The optimiser of one network.
struct Trained {
    range: NoiseRange,
    optimizer: Optimizer,
}

impl TrainedNetworks {
    /// Reads the networks of the plan onto the devices of `residents`, with the states of `saved` or new ones. What their
    /// blocks keep in host memory waits in `stores`, one for each stage: only one network trains at a time.
    ///
    /// # Errors
    /// Files that cannot be read, an adapter to begin from that does not fit, a foreign checkpoint.
    pub fn load(
        mut residents: Residents,
        planned: &Planned,
        stores: &[HostStore],
        saved: Option<&Saved>,
        ui: &Ui,
    ) -> Result<Self> {
        let Planned { plan, targets, .. } = planned;
        let ranges = plan.trained_ranges();
        residents.set_stores(stores);
        let mut trained = Vec::new();
        for range in ranges.iter().copied() {
            // A run that continues has its adapters in the checkpoint.
            let file = plan.adapter.begins_with(range.expert()).filter(|_| saved.is_none());
            let fresh = adapters::beginning(&plan.adapter, file, targets, plan.run.seed, ui)?;
            let pipeline = residents.add_trained(range, &fresh, for_clips(plan, range))?;
            let config = &plan.optimizer;
            let scale = plan.adapter.scale();
            let mut optimizer = Optimizer::new(pipeline, config.rule())?
                .averaged(plan.train.ema)?
                .at_rates(|name| config.factor(name, range.expert()))
                .limited(config.norm_limit.map(|most| NormLimit { most, scale }))
                .scaled(|module| plan.adapter.of(module).scale());
            if let Some(saved) = saved {
                let expert = range.expert().filter(|_| ranges.len() > 1);
                optimizer.restore(checkpoint::part_of(saved, expert))?;
            }
            optimizer.publish(pipeline);
            trained.push(Trained { range, optimizer });
        }
        // Clips go through the other expert too.
        for range in residents.clip_ranges() {
            let is_trained = ranges.iter().any(|other| range.expert() == other.expert());
            if let Some(expert) = range.expert().filter(|_| !is_trained && !plan.sample.clips.is_empty()) {
                let files = plan.model.dits.of(expert).clone();
                let for_clips = for_clips(plan, range);
                residents.add(FromFiles { range, files, adapters: Vec::new(), for_clips });
            }
        }
        Ok(Self { residents, trained })
    }

    /// Everything that is loaded.
    pub fn residents(&self) -> &Residents {
        &self.residents
    }

    /// The same, to load and use more.
    pub fn residents_mut(&mut self) -> &mut Residents {
        &mut self.residents
    }

    /// How many networks are trained.
    pub fn len(&self) -> usize {
        self.trained.len()
    }

    /// The noise levels of one of them.
    pub fn range(&self, index: usize) -> NoiseRange {
        self.trained[index].range
    }

    /// All of them, those on the devices first: whoever goes through them in this order exchanges them once.
    pub fn order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.trained.len()).collect();
        order.sort_by_key(|index| !self.residents.is_on_devices(self.range(*index)));
        order
    }

    /// One of them, on the devices, with its optimiser.
    ///
    /// # Errors
    /// When a device or the host runs out of memory.
    pub fn on_devices(&mut self, index: usize) -> Result<(&mut Pipeline, &mut Optimizer)> {
        let Trained { range, optimizer } = &mut self.trained[index];
        Ok((self.residents.network(*range)?, optimizer))
    }

    /// Gives the networks the adapters that are exported, for clips and held-out losses, where others are trained.
    ///
    /// # Errors
    /// When a device or the host runs out of memory.
    pub fn show_exported(&mut self) -> Result<()> {
        self.publish(|optimizer, pipeline| optimizer.publish_exported(pipeline))
    }

    /// Gives the networks the adapters that are trained, after [`Self::show_exported`].
    ///
    /// # Errors
    /// When a device or the host runs out of memory.
    pub fn show_trained(&mut self) -> Result<()> {
        self.publish(|optimizer, pipeline| optimizer.publish(pipeline))
    }

    /// Publishes where the exported tensors are others than those that are trained.
    fn publish(&mut self, publish: impl Fn(&Optimizer, &mut Pipeline)) -> Result<()> {
        for Trained { range, optimizer } in &self.trained {
            if optimizer.in_clips().is_another() {
                publish(optimizer, self.residents.network(*range)?);
            }
        }
        Ok(())
    }

    /// One of them, to write its adapter: on the devices where that needs the weights that it changes.
    ///
    /// # Errors
    /// When a device or the host runs out of memory.
    pub fn for_files(&mut self, index: usize) -> Result<(&Pipeline, &Optimizer)> {
        let Trained { range, optimizer } = &self.trained[index];
        if self.residents.loaded(*range).is_some_and(wants_weights) {
            self.residents.network(*range)?;
        }
        let pipeline = self.residents.loaded(*range);
        let missing = || Error::from(kernels::Error::msg("a network that is trained is not loaded"));
        Ok((pipeline.ok_or_else(missing)?, optimizer))
    }

    /// What the optimisers of all keep, as a checkpoint has it.
    pub fn saved(&self) -> Saved {
        let is_pair = self.trained.len() > 1;
        let of =
            |Trained { range, optimizer }: &Trained| (range.expert().filter(|_| is_pair), optimizer.saved());
        checkpoint::joined(self.trained.iter().map(of))
    }

    /// Puts the optimisers of all where `saved` stands, and the adapters with them.
    ///
    /// # Errors
    /// A state of other adapters, and memory that runs out.
    pub fn restore(&mut self, saved: &Saved) -> Result<()> {
        let is_pair = self.trained.len() > 1;
        for Trained { range, optimizer } in &mut self.trained {
            optimizer.restore(checkpoint::part_of(saved, range.expert().filter(|_| is_pair)))?;
            optimizer.publish(self.residents.network(*range)?);
        }
        Ok(())
    }

    /// Updates made of one of them; a network that is alone is updated in every step.
    pub fn updates(&self, index: usize, progress: &Progress) -> u64 {
        match (self.range(index).expert(), self.trained.len()) {
            (Some(expert), 2) => *progress.updates.clone().of(expert),
            _ => progress.step,
        }
    }
}

/// The adapters that the network of `range` has for clips alone.
fn for_clips(plan: &Plan, range: NoiseRange) -> Vec<(std::path::PathBuf, f64)> {
    let own = plan.sample.adapters_of(range.expert());
    own.map(|adapter| (adapter.path.clone(), adapter.strength)).collect()
}

/// Whether a file of the adapter that `pipeline` trains contains values computed from the weights that it changes.
fn wants_weights(pipeline: &Pipeline) -> bool {
    let adapters = pipeline.stages().iter().flat_map(|stage| stage.adapters.iter());
    let mut trained = adapters.flat_map(|(_, own)| own).filter(|own| own.is_trainable());
    trained.any(|own| own.delta().wants_product())
}
