//! A stage that goes through a step alone: its neighbours hand it tensors of the shapes that theirs would have.
//!
//! The stage, its schedule and its links are those of a real step. On shadows that says what the step allocates on one
//! device without the others.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender};

use kernels::transfer::{Link, Route, Sent};
use kernels::{DType, Device, Tensor};
use models::dit::{Boundary, Plans, Streams};

use super::links::{Ends, Links};
use super::schedule::Op;
use super::training::{Training, Watch};
use super::{MicroBatch, Stage, StepOutcome};
use crate::error::Result;

/// What surrounds a stage that is played alone.
#[derive(Debug, Clone, Copy)]
pub struct Neighbours<'a> {
    /// The device of the stage before, and how tensors go there and back; nothing on the first stage.
    pub previous: Option<(&'a Device, Route)>,
    /// The same of the stage behind; nothing on the last stage.
    pub next: Option<(&'a Device, Route)>,
    /// What crosses a boundary of this model: handed over by the stage before, whose device it is on.
    pub boundary: &'a Boundary,
}

/// The neighbours at work: what they hand over, and what they were sent and have not used up.
struct Around<'a> {
    ends: Ends,
    boundary: &'a Boundary,
    from_previous: Option<Link>,
    from_next: Option<(Link, &'a Device)>,
    onward: VecDeque<(usize, Boundary<Sent>)>,
    back: VecDeque<Streams<Sent>>,
}

/// Plays `ops`, which are some of a step over `batches`, on `stage`.
///
/// # Errors
/// Those of the model's own code.
pub fn play(
    stage: &Stage,
    around: Neighbours,
    batches: &[MicroBatch],
    plans: &Plans,
    ops: &[Op],
) -> Result<StepOutcome> {
    let Neighbours { previous, next, boundary } = around;
    let own = &stage.device;
    let onward = next.map(|(to, route)| Link::new(own, to, route)).transpose()?;
    let back = previous.map(|(to, route)| Link::new(own, to, route)).transpose()?;
    let (links, ends) = Links::alone(back.as_ref(), onward.as_ref());
    let mut around = Around {
        ends,
        boundary,
        from_previous: previous.map(|(from, route)| Link::new(from, own, route)).transpose()?,
        from_next: match next {
            Some((from, route)) => Some((Link::new(from, own, route)?, from)),
            None => None,
        },
        onward: VecDeque::new(),
        back: VecDeque::new(),
    };
    let label = |label| stage.device.ledger().map(|ledger| ledger.set_label(label));
    label("micro-batches");
    let mut state = Training::new(stage, batches, plans, Watch::Nothing)?;
    label("activations");
    for &op in ops {
        around.before(op)?;
        state.go(op, stage, &links)?;
        around.behind(op);
    }
    Ok(state.outcome)
}

impl Around<'_> {
    /// Lets arrive what must have arrived when the stage begins `op`, and hands over what that takes in.
    fn before(&mut self, op: Op) -> Result<()> {
        match op {
            Op::Forward(_) => {
                let onward = self.onward.drain(..).map(|(m, sent)| Ok((m, sent.try_map(arrived)?)));
                self.onward = onward.collect::<Result<_>>()?;
                if let Some(link) = &self.from_previous {
                    hand_over(&self.ends.to_forward, self.boundary.clone().try_map(|x| link.send(x))?);
                }
            }
            Op::Backward(m) => {
                while self.onward.front().is_some_and(|(sent, _)| *sent <= m) {
                    self.onward.pop_front().map(|(_, sent)| sent.try_map(arrived)).transpose()?;
                }
                let back = self.back.drain(..).map(|sent| sent.try_map(arrived));
                self.back = back.collect::<Result<_>>()?;
                if let Some((link, device)) = &self.from_next {
                    // Gradients of the stream are f32, whatever the stream itself is.
                    let gradient = |x: Tensor| link.send(Tensor::zeros(x.shape(), DType::F32, device)?);
                    hand_over(&self.ends.to_backward, self.boundary.streams.clone().try_map(gradient)?);
                }
            }
        }
        Ok(())
    }

    /// Takes in what the stage sent. Of a way through host memory the buffer of the last tensor is still there when the next
    /// is sent.
    fn behind(&mut self, op: Op) {
        match op {
            Op::Forward(m) => {
                self.onward.extend(taken(&self.ends.of_forward).map(|sent| (m, sent)));
                while self.onward.len() > 1 {
                    self.onward.pop_front();
                }
            }
            Op::Backward(_) => {
                self.back.extend(taken(&self.ends.of_backward));
                while self.back.len() > 1 {
                    self.back.pop_front();
                }
            }
        }
    }
}

fn arrived(sent: Sent) -> Result<Sent> {
    sent.arrive();
    Ok(sent)
}

fn hand_over<T>(to: &Option<Sender<T>>, sent: T) {
    if let Some(to) = to {
        // The stage's end of the channel lives as long as this one.
        let _ = to.send(sent);
    }
}

fn taken<T>(from: &Option<Receiver<T>>) -> Option<T> {
    from.as_ref().and_then(|from| from.try_recv().ok())
}
