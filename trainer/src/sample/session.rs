//! From starting noise to latents: the solver loop with guidance, several clips in flight at once.

use std::ops::ControlFlow;

use kernels::{DType, Tensor};
use models::expert::Expert;

use super::Prompted;
use crate::error::{Error, Result};
use crate::learning::NoiseRange;
use crate::pipeline::{Calls, Pipeline, Returns};
use crate::solver::{Schedule, Solver};

/// Clips on their way from noise to latents. Each clip is a lane for each half of the guidance; the lanes are what keeps
/// every stage busy. A clip waits for its own last step alone, never for another clip.
///
/// Where two experts share the noise levels, all clips go through the one for high noise as far as it makes them, then
/// through the other: each is needed once. The solvers' histories go on unbroken.
pub struct Session<'a> {
    clips: &'a [Prompted],
    state: Vec<ClipState>,
}

/// Where a clip stands.
struct ClipState {
    solver: Solver,
    latents: Tensor,
    /// Steps that were made.
    made: usize,
    /// The picture in place of the first frame, where it goes there.
    first: Option<Tensor>,
}

/// One call of the network.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Call {
    clip: usize,
    timestep: f32,
    half: Half,
    /// Whether an earlier call of the session has to be done first.
    waits: bool,
    /// Whether the solver goes on with its outcome, and that of the half before.
    ends_step: bool,
    /// Whether another step of the clip follows.
    goes_on: bool,
}

/// A half of the guidance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Half {
    Positive,
    Negative,
}

impl<'a> Session<'a> {
    /// At the start of all clips.
    ///
    /// # Errors
    /// A schedule that cannot be.
    pub fn new(clips: &'a [Prompted]) -> Result<Self> {
        let state = |clip: &Prompted| {
            let request = &clip.request;
            let schedule = Schedule::new(request.solver, request.convention, request.steps, request.shift)?;
            let first = clip.shown.first_bcthw.clone();
            let latents = with_first(clip.noise_bcthw.clone(), first.as_ref())?;
            Ok(ClipState { solver: Solver::new(schedule), latents, made: 0, first })
        };
        Ok(Self { clips, state: clips.iter().map(state).collect::<Result<_>>()? })
    }

    /// Solver steps of all clips together that the network of `range` makes.
    pub fn steps_of(&self, range: NoiseRange) -> usize {
        let timesteps = self.state.iter().flat_map(|clip| &clip.solver.schedule().timesteps);
        timesteps.filter(|timestep| range.holds(**timestep)).count()
    }

    /// Makes the steps that are `pipeline`'s. `progress` is called after each step of a clip, on another thread, and
    /// may break off.
    ///
    /// # Errors
    /// When the network fails, and a clip that is no longer finite.
    pub fn run(
        &mut self,
        pipeline: &Pipeline,
        range: NoiseRange,
        mut progress: impl FnMut() -> ControlFlow<()> + Send,
    ) -> Result<ControlFlow<()>> {
        let calls = self.calls(range);
        let [first, last] = pipeline.ends();
        let clips = self.clips.iter().map(|clip| clip.to_device(first)).collect::<Result<Vec<_>>>()?;
        let latents = self.state.iter().map(|clip| clip.latents.to_device(first));
        let mut latents = latents.collect::<kernels::Result<Vec<_>>>()?;
        for state in &mut self.state {
            state.latents = state.latents.to_device(last)?;
            state.first = state.first.as_ref().map(|first| first.to_device(last)).transpose()?;
        }
        let mut is_stopped = false;
        let input = |m: usize, returns: &Returns| {
            let Call { clip, timestep, half, waits, .. } = calls[m];
            if waits {
                latents[clip] = returns.take()?;
            }
            clips[clip].input(&latents[clip], timestep, clips[clip].half(half))
        };
        let mut halves = Vec::new();
        let output = |m: usize, velocity: Tensor| {
            halves.push(velocity);
            if !calls[m].ends_step {
                return Ok(None);
            }
            let clip = calls[m].clip;
            let velocity = guided(&std::mem::take(&mut halves), guidance(&self.clips[clip], range))?;
            self.state[clip].step(&velocity)?;
            self.check(clip)?;
            if progress().is_break() {
                is_stopped = true;
                return Err(Error::Interrupted);
            }
            Ok(calls[m].goes_on.then(|| self.state[clip].latents.clone()))
        };
        match pipeline.call(Calls { count: calls.len(), input, output }) {
            Err(Error::Interrupted) if is_stopped => Ok(ControlFlow::Break(())),
            Err(error) => Err(error),
            Ok(_) => Ok(ControlFlow::Continue(())),
        }
    }

    /// The calls that make the steps in `range`: the next step of each clip in turn.
    fn calls(&self, range: NoiseRange) -> Vec<Call> {
        let rest = |clip: &ClipState| {
            let rest = &clip.solver.schedule().timesteps[clip.made..];
            rest.iter().copied().take_while(|timestep| range.holds(*timestep)).collect::<Vec<_>>()
        };
        let rest: Vec<Vec<f32>> = self.state.iter().map(rest).collect();
        let rounds = rest.iter().map(Vec::len).max().unwrap_or(0);
        let mut calls = Vec::new();
        for round in 0..rounds {
            for (clip, rest) in rest.iter().enumerate() {
                let Some(&timestep) = rest.get(round) else { continue };
                let halves: &[Half] = match guidance(&self.clips[clip], range) == 1.0 {
                    true => &[Half::Positive],
                    false => &[Half::Positive, Half::Negative],
                };
                calls.extend(halves.iter().enumerate().map(|(i, &half)| Call {
                    clip,
                    timestep,
                    half,
                    waits: i == 0 && round > 0,
                    ends_step: i + 1 == halves.len(),
                    goes_on: round + 1 < rest.len(),
                }));
            }
        }
        calls
    }

    /// Looks whether the clip is still finite after its last step.
    fn check(&self, clip: usize) -> Result<()> {
        let ClipState { latents, made, solver, .. } = &self.state[clip];
        // A sum is not finite where a number is not.
        if latents.sum_all()?.to_scalar::<f32>()?.is_finite() {
            return Ok(());
        }
        let schedule = solver.schedule();
        Err(Error::NonFiniteClip {
            clip,
            prompt: self.clips[clip].request.prompt.clone(),
            step: *made,
            steps: schedule.timesteps.len(),
            sigma: schedule.sigmas[made - 1], // a step was made
        })
    }

    /// Steps that each clip has made.
    pub fn made(&self) -> Vec<usize> {
        self.state.iter().map(|clip| clip.made).collect()
    }

    /// The latents of each clip as they stand, [1, c, t, h, w] f32.
    pub fn latents(&self) -> Vec<Tensor> {
        self.state.iter().map(|clip| clip.latents.clone()).collect()
    }
}

impl ClipState {
    /// The solver's next step by the velocity that the network predicts.
    fn step(&mut self, velocity: &Tensor) -> Result<()> {
        let after = self.solver.step(&self.latents, velocity, self.made)?;
        self.latents = with_first(after, self.first.as_ref())?;
        self.made += 1;
        Ok(())
    }
}

impl Prompted {
    /// What the network is conditioned on for a half of the guidance.
    fn half(&self, half: Half) -> &models::dit::Conditioning<models::dit::Raw> {
        match half {
            Half::Positive => &self.positive,
            Half::Negative => &self.negative,
        }
    }
}

/// `latents` with the picture `first` in place of the first frame, where there is one.
fn with_first(latents: Tensor, first: Option<&Tensor>) -> Result<Tensor> {
    let Some(first) = first else { return Ok(latents) };
    let frames = latents.dim(2)?;
    Ok(match frames {
        1 => first.clone(),
        _ => Tensor::cat(&[first, &latents.narrow(2, 1, frames - 1)?], 2)?,
    })
}

/// The guidance scale of the steps that are in `range`.
fn guidance(clip: &Prompted, range: NoiseRange) -> f64 {
    match range {
        NoiseRange::Of { expert: Expert::High, .. } => clip.request.guidance_high,
        _ => clip.request.guidance,
    }
}

/// uncond + guidance (cond - uncond), f32; `parts` is cond alone, or cond and uncond.
fn guided(parts: &[Tensor], guidance: f64) -> Result<Tensor> {
    match parts {
        [cond, uncond] => {
            let (cond, uncond) = (cond.to_dtype(DType::F32)?, uncond.to_dtype(DType::F32)?);
            Ok((&uncond + ((cond - &uncond)? * guidance)?)?)
        }
        _ => Ok(parts[0].to_dtype(DType::F32)?),
    }
}
