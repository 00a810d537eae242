//! Calls of the network without a backward: one behind the other through the stages, and never drained in between.
//!
//! A call may depend on the outcome of earlier ones (a solver's next step does): what the last stage makes of an outcome goes
//! back to the first one, and only the calls that need it wait. So all stages stay busy as soon as enough calls do not
//! depend on each other.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kernels::Tensor;
use kernels::transfer::Sent;
use models::dit::NetworkInput;

use super::links::Links;
use super::residuals::{Blocks, Change, Residuals};
use super::stage::{Passed, Stage};
use super::{Pipeline, profile};
use crate::error::{Error, Result};

/// Calls of the network, in order.
pub struct Calls<I, O, B = fn(usize) -> Blocks> {
    /// How many.
    pub count: usize,
    /// Makes the input of call `m`, on the first stage's thread. It takes from [`Returns`] what `output` gave back, in that
    /// order. Copies from the host wait for the device, so large tensors should be there already.
    pub input: I,
    /// Takes the velocity of call `m`, [b, c, t, h, w] f32 on the last stage's device and thread. What it gives back goes to
    /// the first stage.
    pub output: O,
    /// What becomes of the blocks in call `m`.
    pub blocks: B,
}

/// Every block of every call runs.
pub fn run_all(_: usize) -> Blocks {
    Blocks::Run
}

/// What came of calls.
#[derive(Debug)]
pub struct Called {
    /// What `output` gave back and no `input` took, on the first stage's device.
    pub rest: Vec<Tensor>,
    /// What was measured, in the order of the calls.
    pub changes: Vec<Change>,
}

/// What the last stage gave back, on the first stage's device.
pub struct Returns {
    pub(super) receiver: Receiver<Sent>,
}

impl Returns {
    /// The next one; waits for the last stage to make it, but not for its device.
    ///
    /// # Errors
    /// When the last stage stopped.
    pub fn take(&self) -> Result<Tensor> {
        let sent = self.receiver.recv().map_err(|_| Error::NeighbourStopped)?;
        Ok(sent.receive()?)
    }
}

/// What a stage has when it made its part of all calls.
pub(super) struct StageEnd {
    pub returns: Option<Returns>,
    pub changes: Vec<Change>,
}

/// What is used on one thread alone, and dropped with it: a channel whose end lives on would never close.
struct Own<T>(Mutex<Option<T>>);

impl<T> Own<T> {
    fn new(value: T) -> Self {
        Self(Mutex::new(Some(value)))
    }

    fn take_if(&self, is_mine: bool) -> Option<T> {
        if is_mine { self.0.lock().unwrap_or_else(PoisonError::into_inner).take() } else { None }
    }
}

/// The inputs of the calls that are in flight: later stages read their shapes.
#[derive(Default)]
struct InFlight(Mutex<HashMap<usize, NetworkInput>>);

impl InFlight {
    fn all(&self) -> MutexGuard<'_, HashMap<usize, NetworkInput>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The input of call `m`, which the first stage made before it handed anything on.
    fn get(&self, m: usize) -> Result<NetworkInput> {
        let input = self.all().get(&m).cloned();
        input.ok_or_else(|| kernels::Error::msg(format!("call {m} has no input")).into())
    }
}

impl Pipeline {
    /// Makes `calls`.
    ///
    /// # Errors
    /// The first of `input`, `output` and the stages.
    pub fn call<I, O, B>(&self, calls: Calls<I, O, B>) -> Result<Called>
    where
        I: FnMut(usize, &Returns) -> Result<NetworkInput> + Send,
        O: FnMut(usize, Tensor) -> Result<Option<Tensor>> + Send,
        B: Fn(usize) -> Blocks + Sync,
    {
        if let Some(all) = &self.shared {
            return self.call_in_row(all, calls);
        }
        let ends = self.on_threads(self.calling(calls))?;
        self.called(ends)
    }

    /// The velocities [b, c, t, h, w] f32 that the network predicts for each input, on the first stage's device.
    ///
    /// # Errors
    /// An input that does not fit the model, and a device that fails.
    pub fn predict(&self, inputs: &[NetworkInput]) -> Result<Vec<Tensor>> {
        let inputs = self.placed(inputs)?;
        let calls = Calls { count: inputs.len(), input: give(&inputs), output: keep, blocks: run_all };
        Ok(self.call(calls)?.rest)
    }

    /// [`Pipeline::predict`], with what each stage did. The marks cost a little time of their own.
    ///
    /// # Errors
    /// As there.
    pub fn predict_watched(&self, inputs: &[NetworkInput]) -> Result<(Vec<Tensor>, Vec<profile::Recording>)> {
        let inputs = self.placed(inputs)?;
        let calls = Calls { count: inputs.len(), input: give(&inputs), output: keep, blocks: run_all };
        let work = self.calling(calls);
        let outcomes = self.on_threads(|stage, links| {
            let (result, operations) = profile::record(|| work(stage, links));
            result.map(|end| (end, operations))
        })?;
        let (ends, watched): (Vec<_>, Vec<_>) = outcomes.into_iter().unzip();
        Ok((self.called(ends)?.rest, watched))
    }

    /// `inputs` on the first stage's device.
    fn placed(&self, inputs: &[NetworkInput]) -> Result<Vec<NetworkInput>> {
        let [first, _] = self.ends();
        inputs.iter().map(|input| Ok(input.to_device(first)?)).collect()
    }

    /// What a stage does; the first one gives the end of the channel on which more may come back than it took.
    fn calling<'a, I, O, B>(
        &'a self,
        calls: Calls<I, O, B>,
    ) -> impl Fn(&Stage, &Links) -> Result<StageEnd> + Sync + 'a
    where
        I: FnMut(usize, &Returns) -> Result<NetworkInput> + Send + 'a,
        O: FnMut(usize, Tensor) -> Result<Option<Tensor>> + Send + 'a,
        B: Fn(usize) -> Blocks + Sync + 'a,
    {
        let Calls { count, input, output, blocks } = calls;
        let (sender, receiver): (Sender<Sent>, _) = channel();
        let (first, last) = (Own::new((input, Returns { receiver })), Own::new((output, sender)));
        let in_flight = InFlight::default();
        move |stage, links| {
            let mut first = first.take_if(stage.dit.embedder.is_some());
            let mut last = last.take_if(stage.dit.head.is_some());
            let mut residuals = Residuals::default();
            for m in 0..count {
                if let Some((input, returns)) = &mut first {
                    let input = input(m, returns)?.to_device(&stage.device)?;
                    in_flight.all().insert(m, input);
                }
                let from_previous = links.take_forward()?;
                let (input, call) = (in_flight.get(m)?, (m, blocks(m)));
                let passed = stage.forward_only(&input, from_previous, call, &mut residuals)?;
                drop(input);
                match (passed, &mut last) {
                    (Passed::On(boundary), _) => links.send_forward(boundary)?,
                    (Passed::Velocity(velocity) | Passed::Loss(velocity), Some((output, sender))) => {
                        in_flight.all().remove(&m);
                        if let Some(back) = output(m, velocity)? {
                            self.home.settle()?;
                            // Where nobody takes it any more, the first stage has stopped, and says why.
                            let _ = sender.send(self.home.send(back)?);
                        }
                    }
                    (Passed::Velocity(_) | Passed::Loss(_), None) => {
                        return Err(kernels::Error::msg("a velocity before the last stage").into());
                    }
                }
            }
            Ok(StageEnd { returns: first.map(|(_, returns)| returns), changes: residuals.changes })
        }
    }

    /// What came of the stages: what came back and was not taken is received.
    pub(super) fn called(&self, ends: Vec<StageEnd>) -> Result<Called> {
        let (mut rest, mut changes) = (Vec::new(), Vec::new());
        for StageEnd { returns, changes: own } in ends {
            let sent = returns.into_iter().flat_map(|returns| returns.receiver.into_iter());
            rest.extend(sent.map(Sent::receive).collect::<kernels::Result<Vec<_>>>()?);
            changes.extend(own);
        }
        self.settle()?;
        Ok(Called { rest, changes })
    }
}

/// The input of call `m`, which depends on no other.
fn give(inputs: &[NetworkInput]) -> impl FnMut(usize, &Returns) -> Result<NetworkInput> + Send + '_ {
    |m, _| Ok(inputs[m].clone())
}

/// Sends the velocity of a call home.
fn keep(_: usize, velocity: Tensor) -> Result<Option<Tensor>> {
    Ok(Some(velocity))
}
