//! The part of a session that one group of devices does: calls of its network, and the solver steps of the clips that are at
//! home there.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use kernels::Tensor;

use super::Prompted;
use super::exchange::Ends;
use super::session::{Call, ClipState, Half, StepDone, guidance};
use crate::error::{Error, Result};
use crate::learning::NoiseRange;
use crate::pipeline::{Calls, Change, Pipeline, Returns};
use crate::solver::guided;

/// The calls of one group.
pub(super) struct Part<'a> {
    /// The network.
    pub network: &'a Pipeline,
    /// The noise levels that it is for.
    pub range: NoiseRange,
    /// Its calls, in order.
    pub calls: Vec<Call>,
    /// The clips that it has calls of, on the first stage's device.
    pub clips: BTreeMap<usize, Prompted>,
    /// Their latents there.
    pub latents: BTreeMap<usize, Tensor>,
    /// The clips whose steps are taken here.
    pub states: BTreeMap<usize, &'a mut ClipState>,
    /// What it exchanges with other groups.
    pub ends: Ends,
}

/// Who is told of steps, and whether they broke off.
pub(super) struct Audience<P> {
    progress: Mutex<P>,
    is_stopped: AtomicBool,
}

impl<P: FnMut(StepDone) -> ControlFlow<()> + Send> Audience<P> {
    pub fn new(progress: P) -> Self {
        Self { progress: Mutex::new(progress), is_stopped: AtomicBool::new(false) }
    }

    /// Whether the user broke off.
    pub fn is_stopped(&self) -> bool {
        self.is_stopped.load(Ordering::Relaxed)
    }

    fn tell(&self, done: StepDone) -> Result<()> {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        match self.is_stopped() || progress(done).is_break() {
            true => {
                self.is_stopped.store(true, Ordering::Relaxed);
                Err(Error::Interrupted)
            }
            false => Ok(()),
        }
    }
}

/// What was measured of a clip.
pub(super) type Measured = (usize, (usize, Half, Change));

impl Part<'_> {
    /// Makes the calls and takes the steps. What was measured, by clip.
    ///
    /// # Errors
    /// When the network fails, and a clip that is no longer finite.
    pub fn run<P>(self, audience: &Audience<P>) -> Result<Vec<Measured>>
    where
        P: FnMut(StepDone) -> ControlFlow<()> + Send,
    {
        let Self { network, range, calls, clips, mut latents, mut states, ends } = self;
        let Ends { home, away, arriving } = ends;
        let (calls, clips, own) = (&calls, &clips, &mut states);
        // Channels close with the closure that has their end, so that no group waits for one that failed.
        let input = move |m: usize, returns: &Returns| {
            let Call { clip, timestep, half, waits, .. } = calls[m];
            if waits {
                let newest = match arriving.get(&clip) {
                    Some(sent) => sent.recv().map_err(|_| Error::NeighbourStopped)?.receive()?,
                    None => returns.take()?,
                };
                latents.insert(clip, newest);
            }
            let prompted = &clips[&clip]; // a clip with calls here
            prompted.input(&latents[&clip], timestep, prompted.half(half))
        };
        let mut halves = Vec::new();
        let output = move |m: usize, velocity: Tensor| {
            let Call { clip, ends_step, goes_on, .. } = calls[m];
            if let Some(away) = away.get(&clip) {
                away.send_velocity(velocity)?;
                return Ok(None);
            }
            halves.push(velocity);
            let (Some(state), true) = (own.get_mut(&clip), ends_step) else { return Ok(None) };
            let elsewhere = home.get(&clip);
            halves.extend(elsewhere.map(|home| home.take_velocity()).transpose()?);
            let request = &clips[&clip].request; // a clip with calls here
            let velocity = guided(&std::mem::take(&mut halves), guidance(request, range))?;
            let before = state.latents.clone();
            state.step(&velocity)?;
            state.check_step_before()?;
            audience.tell(state.done(&before, &velocity))?;
            drop(before);
            if !goes_on {
                return Ok(None);
            }
            elsewhere.map(|home| home.send_latents(state.latents.clone())).transpose()?;
            Ok(Some(state.latents.clone()))
        };
        let blocks = |m: usize| calls[m].blocks;
        let called = network.call(Calls { count: calls.len(), input, output, blocks })?;
        states.values_mut().try_for_each(|state| state.check_last_step())?;
        let measured = |change: Change| {
            let Call { clip, step, half, .. } = calls[change.call];
            (clip, (step, half, change))
        };
        Ok(called.changes.into_iter().map(measured).collect())
    }
}
