//! The pipeline: stages on devices, one thread each, driven by a schedule.
//!
//! One stage is the same code with no boundary. Activations cross each boundary once forward and once backward;
//! conditioning goes along with the forward and stays until the backward. Nothing here waits for a device: stages hand
//! over what is still on its way, and devices wait for each other.

pub mod alone;
mod base_targets;
mod calls;
mod groups;
mod links;
mod micro_batch;
mod parking;
mod residuals;
pub mod schedule;
mod sequence;
mod stage;
mod training;

use std::ops::Range;
use std::sync::Arc;
use std::thread::{self, ScopedJoinHandle};

use kernels::transfer::{HostStore, Link, Route};
use kernels::{Device, Tensor, profile};
use models::adapter::Adapters;
use models::dit::{Architecture, Base, BlockPlan, DitConfig, Gradients, LayerId, LayerWatch, Plans};
use models::weights::Weights;

pub(crate) use base_targets::{Made, calls_of};
pub use calls::{Called, Calls, Returns, run_all};
pub use groups::held_by;
pub use micro_batch::{Guide, MicroBatch, Objective};
pub use models::dit::NetworkInput;
pub use parking::{ParkedStage, ParkedWeights, WeightParking};
pub(crate) use residuals::with_entry;
pub use residuals::{Blocks, Change};
pub use stage::Stage;
pub use training::{Span, Watched};

use crate::error::{Error, Result};
use links::{Links, Ways};
use sequence::AllToAll;
use training::{Training, Watch};

/// The stages of a model, first to last.
#[derive(Debug)]
pub struct Pipeline {
    stages: Vec<Stage>,
    ways: Vec<Ways>,
    /// From the last stage's device to the first one's.
    home: Link,
    route: Route,
    /// Where each stage is the whole network and they share the tokens of calls: the links between all of them.
    shared: Option<AllToAll>,
}

/// The outcome of a step: the loss of each micro-batch, and the sum of all gradients.
#[derive(Debug)]
pub struct StepOutcome {
    /// Scalars f32 on the last stage's device, in the order of the micro-batches.
    pub losses: Vec<Tensor>,
    /// Gradients of every trainable tensor, on the device of its stage.
    pub gradients: Gradients,
}

impl Pipeline {
    /// Reads the model onto the devices of `split`, one consecutive range of blocks each, held as `base` says.
    ///
    /// # Errors
    /// Weights that cannot be read; and a split that does not cover the blocks once, in order.
    pub fn load(
        weights: &Weights,
        architecture: impl Into<Arc<dyn Architecture>>,
        split: &[(Device, Range<usize>)],
        adapters: &Adapters,
        base: Base,
    ) -> Result<Self> {
        let architecture = architecture.into();
        let layers = architecture.config().layers;
        let mut next = 0;
        for (_, range) in split {
            if range.start != next || range.is_empty() {
                return Err(Error::Split { layers });
            }
            next = range.end;
        }
        if next != layers {
            return Err(Error::Split { layers });
        }
        let load = |(device, range): &(Device, Range<usize>)| {
            Stage::load(weights, architecture.clone(), range.clone(), adapters, base, device)
        };
        // Side by side: each device has a link of its own to take its weights over.
        let stages = thread::scope(|scope| {
            let threads: Vec<_> = split.iter().map(|part| scope.spawn(move || load(part))).collect();
            let join = |t: ScopedJoinHandle<_>| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p));
            threads.into_iter().map(join).collect::<Result<_>>()
        })?;
        Self::of_stages(stages, Route::default())
    }

    /// Lets tensors go between devices by `route`. Without this they go as [`Route::default`] says.
    ///
    /// # Errors
    /// When two devices cannot be linked that way.
    pub fn set_route(&mut self, route: Route) -> Result<()> {
        let devices: Vec<&Device> = self.stages.iter().map(|stage| &stage.device).collect();
        (self.ways, self.home) = linked(&devices, route)?;
        self.route = route;
        Ok(())
    }

    /// Lets at most `tokens` tokens of a sample through a feed-forward layer at once.
    pub fn set_ffn_tokens(&mut self, tokens: usize) {
        self.stages.iter_mut().for_each(|stage| stage.ffn_tokens = tokens);
    }

    /// Shows `watch` what goes through the frozen linear layers of every stage in backwards.
    pub fn watch_layers(&mut self, watch: &Arc<dyn LayerWatch>) {
        self.stages.iter_mut().for_each(|stage| stage.watch = Some(watch.clone()));
    }

    /// Lets the blocks of each stage park what they keep in one of `stores`, which may be pinned ahead and shared with other
    /// networks on the same devices.
    pub fn set_stores(&mut self, stores: &[HostStore]) {
        self.stages.iter_mut().zip(stores).for_each(|(stage, store)| stage.store = store.clone());
    }

    /// The stages, first to last.
    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// The stages, to put new adapters in.
    pub fn stages_mut(&mut self) -> &mut [Stage] {
        &mut self.stages
    }

    /// How tensors go from one device to another.
    pub fn route(&self) -> Route {
        self.route
    }

    /// The first and the last stage's device; the first one twice where devices share tokens.
    pub fn ends(&self) -> [&Device; 2] {
        let last = if self.shared.is_some() { 0 } else { self.stages.len() - 1 };
        [0, last].map(|index| &self.stages[index].device) // `load` refuses an empty split
    }

    /// Sizes of the model.
    pub fn config(&self) -> &DitConfig {
        &self.stages[0].dit.config // `load` refuses an empty split
    }

    /// The layers of the model, in the order in which they run.
    pub fn layers(&self) -> Vec<LayerId> {
        self.stages[0].dit.architecture().all_layers() // `load` refuses an empty split
    }

    /// The plans of all layers, from one for each main block: the layers that follow a block share its plan.
    ///
    /// # Errors
    /// More or fewer plans than main blocks.
    pub fn plans(&self, blocks: &[BlockPlan]) -> Result<Plans> {
        let architecture = self.stages[0].dit.architecture(); // `load` refuses an empty split
        if blocks.len() != self.config().layers {
            return Err(models::Error::Mismatch(format!(
                "there are {} plans of what is kept for {} blocks",
                blocks.len(),
                self.config().layers
            ))
            .into());
        }
        let of_block = |(n, plan): (usize, &BlockPlan)| {
            let plan = *plan;
            architecture.layers(n).into_iter().map(move |id| (id, plan))
        };
        Ok(blocks.iter().enumerate().flat_map(of_block).collect())
    }

    /// Losses and gradients of a step over `batches`; `plans` says what becomes of each layer between forward and
    /// backward.
    pub fn train(&self, batches: &[MicroBatch], plans: &Plans) -> Result<StepOutcome> {
        let outcomes = self.on_threads(self.training(batches, plans, Watch::Nothing))?;
        self.settle()?;
        Ok(gathered(outcomes.into_iter().map(|(outcome, _)| outcome)))
    }

    /// [`Pipeline::train`], with what each stage did and when. The marks cost a little time of their own.
    pub fn train_watched(
        &self,
        batches: &[MicroBatch],
        plans: &Plans,
    ) -> Result<(StepOutcome, Vec<Watched>)> {
        let work = self.training(batches, plans, Watch::Closely);
        let outcomes = self.on_threads(|stage, links| {
            let (result, operations) = profile::record(|| work(stage, links));
            result.map(|(outcome, spans)| (outcome, Watched { spans, operations }))
        })?;
        self.settle()?;
        let (outcomes, watched): (Vec<_>, Vec<_>) = outcomes.into_iter().unzip();
        Ok((gathered(outcomes.into_iter()), watched))
    }

    /// What a stage does in a step: its part of the outcome, and its spans where they are watched.
    fn training<'a>(
        &'a self,
        batches: &'a [MicroBatch],
        plans: &'a Plans,
        watch: Watch,
    ) -> impl Fn(&Stage, &Links) -> Result<(StepOutcome, Vec<Span>)> + Sync + 'a {
        let schedule = schedule::one_f_one_b(self.stages.len(), batches.len());
        move |stage, links| {
            let mut state = Training::new(stage, batches, plans, watch)?;
            for &op in &schedule[links.index] {
                state.go(op, stage, links)?;
            }
            Ok((state.outcome, state.spans))
        }
    }

    /// Frees the sources of all transfers: everything that was sent has been received. Without this a prediction would
    /// leave its last tensors in the memory of the devices that sent them, and weights that it expected to need next.
    fn settle(&self) -> Result<()> {
        self.stages.iter().for_each(|stage| stage.dit.release());
        Ok(self.links().try_for_each(Link::settle)?)
    }

    /// Sent tensors that still take memory on the devices that sent them; none between steps and predictions.
    pub fn live_transfers(&self) -> usize {
        self.links().map(Link::live).sum()
    }

    fn links(&self) -> impl Iterator<Item = &Link> {
        let shared = self.shared.iter().flatten().flatten().flatten().map(AsRef::as_ref);
        self.ways.iter().flat_map(Ways::links).chain([&self.home]).chain(shared)
    }

    /// Runs `work` for every stage on a thread of its own, linked to its neighbours; the results in stage order.
    ///
    /// When one stage fails its links close, so the others end too; the error of the one that failed is returned.
    fn on_threads<T: Send>(&self, work: impl Fn(&Stage, &Links) -> Result<T> + Sync) -> Result<Vec<T>> {
        if self.shared.is_some() {
            return Err(kernels::Error::msg("devices that share tokens make calls alone, no steps").into());
        }
        let results: Vec<Result<T>> = thread::scope(|scope| {
            let spawn = |(stage, links)| {
                let work = &work;
                scope.spawn(move || work(stage, &links))
            };
            let threads: Vec<_> = self.stages.iter().zip(Links::chain(&self.ways)).map(spawn).collect();
            threads.into_iter().map(|t| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p))).collect()
        });
        own_error(results)
    }
}

/// What all threads made, or the error of the one that failed by itself.
fn own_error<T>(results: Vec<Result<T>>) -> Result<Vec<T>> {
    let (done, failed): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    let mut errors: Vec<Error> = failed.into_iter().filter_map(Result::err).collect();
    let is_own = |e: &Error| !matches!(e, Error::NeighbourStopped | Error::Model(models::Error::PeerStopped));
    let cause = errors.iter().position(is_own).unwrap_or(0);
    match errors.is_empty() {
        true => Ok(done.into_iter().filter_map(Result::ok).collect()),
        false => Err(errors.swap_remove(cause)),
    }
}

/// The ways between stages on `devices`, and the one from the last device to the first.
fn linked(devices: &[&Device], route: Route) -> Result<(Vec<Ways>, Link)> {
    match devices {
        [] => Err(Error::Split { layers: 0 }),
        [first, .., last] => Ok((Ways::between(devices, route)?, Link::new(last, first, route)?)),
        [only] => Ok((Vec::new(), Link::new(only, only, route)?)),
    }
}

/// The outcomes of all stages as one.
fn gathered(outcomes: impl Iterator<Item = StepOutcome>) -> StepOutcome {
    let mut total = StepOutcome { losses: Vec::new(), gradients: Gradients::default() };
    for StepOutcome { losses, gradients } in outcomes {
        total.losses.extend(losses);
        total.gradients.extend(gradients);
    }
    total
}
