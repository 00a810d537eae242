//! A stage in the middle of a training step: it goes through its schedule, one forward or backward at a time.

use std::collections::HashMap;

use kernels::clock::Mark;
use kernels::profile::Recording;
use models::dit::{Gradients, Plans};

use super::links::Links;
use super::schedule::Op;
use super::stage::{InFlight, Passed, Placed};
use super::{MicroBatch, Stage, StepOutcome};
use crate::error::{Error, Result};

/// What a stage did in a step, as its device's clock saw it.
#[derive(Debug)]
pub struct Watched {
    /// Each forward and backward, from when its input was there until its output was, in order.
    pub spans: Vec<Span>,
    /// Every operation of `kernels` in between.
    pub operations: Recording,
}

/// One forward or backward of a stage.
#[derive(Debug)]
pub struct Span {
    /// Which.
    pub op: Op,
    /// Passed when its input is there.
    pub start: Mark,
    /// Passed when its output is.
    pub end: Mark,
}

/// A schedule that goes forward twice, or back before it went forward.
fn out_of_order(op: Op) -> Error {
    kernels::Error::msg(format!("the schedule of a stage is out of order at {op:?}")).into()
}

/// Whether a step notes when its stages do what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Watch {
    Nothing,
    Closely,
}

/// A stage in the middle of a step.
pub(super) struct Training<'a> {
    batches: &'a [MicroBatch],
    plans: &'a Plans,
    watch: Watch,
    placed: HashMap<usize, Placed>,
    in_flight: HashMap<usize, InFlight>,
    /// What came of it so far.
    pub outcome: StepOutcome,
    /// What was done so far, where it is watched.
    pub spans: Vec<Span>,
}

impl<'a> Training<'a> {
    /// Puts what the stage uses of the micro-batches onto its device.
    pub fn new(stage: &Stage, batches: &'a [MicroBatch], plans: &'a Plans, watch: Watch) -> Result<Self> {
        let placed = batches.iter().enumerate().map(|(m, batch)| Ok((m, stage.place(batch)?)));
        let (placed, in_flight) = (placed.collect::<Result<_>>()?, HashMap::new());
        let outcome = StepOutcome { losses: Vec::new(), gradients: Gradients::default() };
        Ok(Self { batches, plans, watch, placed, in_flight, outcome, spans: Vec::new() })
    }

    /// Takes what `op` needs from a neighbour, does it, and hands on what came of it.
    pub fn go(&mut self, op: Op, stage: &Stage, links: &Links) -> Result<()> {
        match op {
            Op::Forward(m) => {
                let (batch, from_previous) = (&self.batches[m], links.take_forward()?);
                let start = self.mark(stage)?;
                let placed = self.placed.remove(&m).ok_or_else(|| out_of_order(op))?;
                let (passed, held) = stage.forward(batch, placed, from_previous, self.plans)?;
                self.note(op, start, stage)?;
                self.in_flight.insert(m, held);
                match passed {
                    Passed::On(boundary) => links.send_forward(boundary),
                    Passed::Loss(loss) | Passed::Velocity(loss) => {
                        self.outcome.losses.push(loss);
                        Ok(())
                    }
                }
            }
            Op::Backward(m) => {
                let (held, from_next) = (self.in_flight.remove(&m), links.take_backward()?);
                let start = self.mark(stage)?;
                let held = held.ok_or_else(|| out_of_order(op))?;
                let d_streams =
                    stage.backward(&self.batches[m], held, from_next, &mut self.outcome.gradients)?;
                self.note(op, start, stage)?;
                links.send_backward(d_streams)
            }
        }
    }

    fn mark(&self, stage: &Stage) -> Result<Option<Mark>> {
        match self.watch {
            Watch::Nothing => Ok(None),
            Watch::Closely => Ok(Some(Mark::now(&stage.device)?)),
        }
    }

    fn note(&mut self, op: Op, start: Option<Mark>, stage: &Stage) -> Result<()> {
        if let (Some(start), Some(end)) = (start, self.mark(stage)?) {
            self.spans.push(Span { op, start, end });
        }
        Ok(())
    }
}
