//! The pipeline: stages on devices, one thread each, driven by a schedule.
//!
//! One stage is the same code with no boundary. Activations cross each boundary once forward and once backward;
//! conditioning goes along with the forward and stays until the backward.

mod micro_batch;
pub mod schedule;
mod stage;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use candle_core::{Device, Tensor};
use models::adapter::Adapters;
use models::dit::{Base, BlockPlan, DitConfig, Gradients};
use models::weights::Weights;

pub use micro_batch::{MicroBatch, NetworkInput};
pub use stage::Stage;

use crate::error::{Error, Result};
use schedule::Op;
use stage::{Boundary, InFlight, Passed};

/// The stages of a model, first to last.
#[derive(Debug)]
pub struct Pipeline {
    stages: Vec<Stage>,
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
        config: &DitConfig,
        split: &[(Device, Range<usize>)],
        adapters: &Adapters,
        base: Base,
    ) -> Result<Self> {
        let mut next = 0;
        for (_, range) in split {
            if range.start != next || range.is_empty() {
                return Err(Error::Split { layers: config.layers });
            }
            next = range.end;
        }
        if next != config.layers {
            return Err(Error::Split { layers: config.layers });
        }
        let load = |(device, range): &(Device, Range<usize>)| {
            Stage::load(weights, config, range.clone(), adapters, base, device)
        };
        Ok(Self { stages: split.iter().map(load).collect::<Result<_>>()? })
    }

    /// The stages, first to last.
    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// The stages, to put new adapters in.
    pub fn stages_mut(&mut self) -> &mut [Stage] {
        &mut self.stages
    }

    /// Sizes of the model.
    pub fn config(&self) -> &DitConfig {
        &self.stages[0].dit.config // `load` refuses an empty split
    }

    /// Losses and gradients of a step over `batches`; `keeping` says what becomes of each of the model's blocks between
    /// forward and backward.
    pub fn train(&self, batches: &[MicroBatch], keeping: &[BlockPlan]) -> Result<StepOutcome> {
        let schedule = schedule::one_f_one_b(self.stages.len(), batches.len());
        let outcomes = self.on_threads(|stage, links| {
            let mut state =
                Training { batches, keeping, losses: Vec::new(), gradients: Gradients::default() };
            run_stage(stage, links, &schedule[links.index], &mut state)?;
            Ok((state.losses, state.gradients))
        })?;
        let mut total = StepOutcome { losses: Vec::new(), gradients: Gradients::default() };
        for (losses, gradients) in outcomes {
            total.losses.extend(losses);
            total.gradients.extend(gradients);
        }
        Ok(total)
    }

    /// The velocities [b, c, t, h, w] f32 that the network predicts for each input, on the last stage's device.
    pub fn predict(&self, inputs: &[NetworkInput]) -> Result<Vec<Tensor>> {
        let schedule = schedule::forward_only(self.stages.len(), inputs.len());
        let outcomes = self.on_threads(|stage, links| {
            let mut velocities = Vec::new();
            for op in &schedule[links.index] {
                let Op::Forward(m) = *op else { continue };
                let entry = stage.entry(&inputs[m], links.take_forward()?)?;
                match stage.forward_only(&inputs[m], entry)? {
                    Passed::On(boundary) => links.send_forward(boundary)?,
                    Passed::Velocity(velocity) | Passed::Loss(velocity) => velocities.push(velocity),
                }
            }
            Ok(velocities)
        })?;
        Ok(outcomes.into_iter().flatten().collect())
    }

    /// Runs `work` for every stage on a thread of its own, linked to its neighbours; the results in stage order.
    ///
    /// When one stage fails its links close, so the others end too; the error of the one that failed is told.
    fn on_threads<T: Send>(&self, work: impl Fn(&Stage, &Links) -> Result<T> + Sync) -> Result<Vec<T>> {
        let results: Vec<Result<T>> = thread::scope(|scope| {
            let spawn = |(stage, links)| {
                let work = &work;
                scope.spawn(move || work(stage, &links))
            };
            let threads: Vec<_> =
                self.stages.iter().zip(Links::chain(self.stages.len())).map(spawn).collect();
            threads.into_iter().map(|t| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p))).collect()
        });
        let (done, failed): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
        let mut errors: Vec<Error> = failed.into_iter().filter_map(Result::err).collect();
        let cause = errors.iter().position(|e| !matches!(e, Error::NeighbourStopped)).unwrap_or(0);
        match errors.is_empty() {
            true => Ok(done.into_iter().filter_map(Result::ok).collect()),
            false => Err(errors.swap_remove(cause)),
        }
    }
}

/// What a stage gathers while it trains.
struct Training<'a> {
    batches: &'a [MicroBatch],
    keeping: &'a [BlockPlan],
    losses: Vec<Tensor>,
    gradients: Gradients,
}

/// Goes through the schedule of one stage.
fn run_stage(stage: &Stage, links: &Links, ops: &[Op], state: &mut Training) -> Result<()> {
    let mut in_flight: HashMap<usize, InFlight> = HashMap::new();
    for op in ops {
        match *op {
            Op::Forward(m) => {
                let batch = &state.batches[m];
                let entry = stage.entry(&batch.input, links.take_forward()?)?;
                let (passed, held) = stage.forward(batch, entry, state.keeping)?;
                in_flight.insert(m, held);
                match passed {
                    Passed::On(boundary) => links.send_forward(boundary)?,
                    Passed::Loss(loss) | Passed::Velocity(loss) => state.losses.push(loss),
                }
            }
            Op::Backward(m) => {
                let held = in_flight.remove(&m).ok_or(Error::NeighbourStopped)?;
                let dy = links.take_backward()?;
                let dx = stage.backward(&state.batches[m], held, dy, &mut state.gradients)?;
                links.send_backward(dx)?;
            }
        }
    }
    Ok(())
}

/// The channels of one stage to its neighbours. The ends of the chain have none on their outer side.
struct Links {
    index: usize,
    from_previous: Option<Receiver<Boundary>>,
    to_next: Option<Sender<Boundary>>,
    from_next: Option<Receiver<Tensor>>,
    to_previous: Option<Sender<Tensor>>,
}

impl Links {
    /// The links of `count` stages in a row.
    fn chain(count: usize) -> Vec<Self> {
        let lone =
            |index| Self { index, from_previous: None, to_next: None, from_next: None, to_previous: None };
        let mut links: Vec<Self> = (0..count).map(lone).collect();
        for i in 1..count {
            let (to_next, from_previous) = channel();
            let (to_previous, from_next) = channel();
            (links[i - 1].to_next, links[i].from_previous) = (Some(to_next), Some(from_previous));
            (links[i - 1].from_next, links[i].to_previous) = (Some(from_next), Some(to_previous));
        }
        links
    }

    fn take_forward(&self) -> Result<Option<Boundary>> {
        take(&self.from_previous)
    }

    fn take_backward(&self) -> Result<Option<Tensor>> {
        take(&self.from_next)
    }

    fn send_forward(&self, boundary: Boundary) -> Result<()> {
        send(&self.to_next, boundary)
    }

    fn send_backward(&self, dx: Tensor) -> Result<()> {
        send(&self.to_previous, dx)
    }
}

fn take<T>(link: &Option<Receiver<T>>) -> Result<Option<T>> {
    link.as_ref().map(|link| link.recv().map_err(|_| Error::NeighbourStopped)).transpose()
}

fn send<T>(link: &Option<Sender<T>>, value: T) -> Result<()> {
    match link {
        Some(link) => link.send(value).map_err(|_| Error::NeighbourStopped),
        None => Ok(()),
    }
}
