//! A stage that goes through a step, or through calls without a backward, alone: its neighbours hand it tensors of the
//! shapes that theirs would have.
//!
//! The stage, its schedule and its links are those of a real pipeline. On shadows that says what the work allocates on one
//! device without the others.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender};

use kernels::transfer::{Link, Route, Sent};
use kernels::{DType, Device, Tensor};
use models::dit::{Boundary, NetworkInput, Plans, Streams};

use super::links::{Ends, Links, waiting};
use super::residuals::{Blocks, Residuals};
use super::schedule::Op;
use super::stage::Passed;
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
    let [back, onward] = around.links(&stage.device)?;
    let (links, ends) = Links::alone(back.as_ref(), onward.as_ref());
    let mut around = Around::new(around, ends, &stage.device)?;
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

/// Calls of the network without a backward, played on one stage.
pub struct Calls<I, O, B> {
    /// How many.
    pub count: usize,
    /// The most that are under way at once: a call may wait for the outcome of the one so many calls before it.
    pub lanes: usize,
    /// Makes the input of call `m`: on the device of the first stage, or to be put there. On other stages only its shapes
    /// are read.
    pub input: I,
    /// Takes the velocity of call `m`, on the last stage.
    pub output: O,
    /// What becomes of the blocks in call `m`.
    pub blocks: B,
}

/// Plays `calls` on `stage`, which is stage `index` of `count`: as [`super::Pipeline::call`] makes them, with every stage
/// behind it as late as it can be.
///
/// # Errors
/// Those of the model's own code, of `input` and of `output`.
pub fn call<I, O, B>(
    stage: &Stage,
    around: Neighbours,
    [index, count]: [usize; 2],
    mut calls: Calls<I, O, B>,
) -> Result<()>
where
    I: FnMut(usize) -> Result<NetworkInput>,
    O: FnMut(usize, Tensor) -> Result<()>,
    B: Fn(usize) -> Blocks,
{
    let [back, onward] = around.links(&stage.device)?;
    let (links, ends) = Links::alone(back.as_ref(), onward.as_ref());
    let mut around = Around::new(around, ends, &stage.device)?;
    let late = waiting(count).min(calls.lanes.saturating_sub(1));
    // Between two stages boundaries wait, and one more is at work in the later of the two.
    let under_way = ((waiting(count) + 1) * (count - 1 - index) + 1).min(calls.lanes);
    let (mut inputs, mut residuals) = (VecDeque::new(), Residuals::default());
    for m in 0..calls.count {
        // The last stage lets go of the input of a call that is done.
        if inputs.len() == under_way {
            inputs.pop_front();
        }
        around.before_call(late)?;
        let input = (calls.input)(m)?;
        let input = if stage.dit.embedder.is_some() { input.to_device(&stage.device)? } else { input };
        inputs.push_back(input.clone());
        let call = (m, (calls.blocks)(m));
        match stage.forward_only(&input, links.take_forward()?, call, &mut residuals)? {
            Passed::On(boundary) => {
                links.send_forward(boundary)?;
                around.onward.extend(taken(&around.ends.of_forward).map(|sent| (m, sent)));
            }
            Passed::Velocity(velocity) | Passed::Loss(velocity) => (calls.output)(m, velocity)?,
        }
    }
    Ok(())
}

impl Neighbours<'_> {
    /// The links of the stage on `own`, back and onward.
    fn links(&self, own: &Device) -> Result<[Option<Link>; 2]> {
        let link = |neighbour: Option<(&Device, Route)>| {
            neighbour.map(|(to, route)| Link::new(own, to, route)).transpose()
        };
        Ok([link(self.previous)?, link(self.next)?])
    }
}

impl<'a> Around<'a> {
    /// The neighbours of the stage on `own`, at the `ends` of its links.
    fn new(neighbours: Neighbours<'a>, ends: Ends, own: &Device) -> Result<Self> {
        let Neighbours { previous, next, boundary } = neighbours;
        Ok(Self {
            ends,
            boundary,
            from_previous: previous.map(|(from, route)| Link::new(from, own, route)).transpose()?,
            from_next: match next {
                Some((from, route)) => Some((Link::new(from, own, route)?, from)),
                None => None,
            },
            onward: VecDeque::new(),
            back: VecDeque::new(),
        })
    }
}

impl Around<'_> {
    /// Lets all but the newest `late` boundaries arrive at the next stage, and hands over what a forward takes in.
    fn before_call(&mut self, late: usize) -> Result<()> {
        while self.onward.len() > late {
            self.onward.pop_front().map(|(_, sent)| sent.try_map(arrived)).transpose()?;
        }
        self.hand_over_forward()
    }

    fn hand_over_forward(&self) -> Result<()> {
        if let Some(link) = &self.from_previous {
            hand_over(&self.ends.to_forward, self.boundary.clone().try_map(|x| link.send(x))?);
        }
        Ok(())
    }

    /// Lets arrive what must have arrived when the stage begins `op`, and hands over what that takes in.
    fn before(&mut self, op: Op) -> Result<()> {
        match op {
            Op::Forward(_) => {
                let onward = self.onward.drain(..).map(|(m, sent)| Ok((m, sent.try_map(arrived)?)));
                self.onward = onward.collect::<Result<_>>()?;
                self.hand_over_forward()?;
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
