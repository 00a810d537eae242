//! From starting noise to latents: the solver loop with guidance, several clips in flight at once.

use std::ops::ControlFlow;

use kernels::{DType, Tensor};
use models::expert::Expert;

use super::Prompted;
use crate::error::{Error, Result};
use crate::learning::NoiseRange;
use crate::pipeline::{Blocks, Calls, Change, Pipeline, Returns};
use crate::solver::{FreshNoise, Schedule, Solver, guided};

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
    /// Steps that the expert for high noise makes; their sigmas decide where this says nothing.
    high: Option<usize>,
    /// Whether each step is skipped: what the blocks added in an earlier step is added again.
    skipped: Vec<bool>,
    /// Whether the residual of each step is held against that of the step before.
    is_measured: bool,
    /// What was measured: (step, half) and how the residual changed.
    changes: Vec<(usize, Half, Change)>,
}

/// One call of the network.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Call {
    clip: usize,
    step: usize,
    timestep: f32,
    half: Half,
    blocks: Blocks,
    /// Whether an earlier call of the session has to be done first.
    waits: bool,
    /// Whether the solver takes its step with this velocity, and that of the half before.
    ends_step: bool,
    /// Whether another step of the clip follows.
    goes_on: bool,
}

/// A step that a clip made.
#[derive(Debug, Clone, Copy)]
pub struct StepDone<'a> {
    /// Which clip.
    pub clip: usize,
    /// Which of its steps.
    pub step: usize,
    /// Its latents behind it, [1, c, t, h, w] f32.
    pub latents: &'a Tensor,
    /// How many steps it takes in all.
    pub steps: usize,
    /// Its latents before the step.
    before: &'a Tensor,
    velocity: &'a Tensor,
    sigma: f64,
    first: Option<&'a Tensor>,
}

impl StepDone<'_> {
    /// The clean latents that the network saw in this step, [1, c, t, h, w] f32: x - sigma v.
    ///
    /// # Errors
    /// When the tensor library fails.
    pub fn predicted(&self) -> Result<Tensor> {
        with_first((self.before - (self.velocity.to_dtype(DType::F32)? * self.sigma)?)?, self.first)
    }
}

/// A half of the guidance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// With the prompt.
    Positive,
    /// With the negative prompt.
    Negative,
}

impl<'a> Session<'a> {
    /// At the start of all clips.
    ///
    /// # Errors
    /// A schedule that cannot be.
    pub fn new(clips: &'a [Prompted]) -> Result<Self> {
        let schedules = clips.iter().map(|clip| clip.request.schedule()).collect::<Result<Vec<_>>>()?;
        Self::on(clips, schedules)
    }

    /// At the start of all clips, each on a grid of its own.
    ///
    /// # Errors
    /// When the tensor library fails.
    pub fn on(clips: &'a [Prompted], schedules: Vec<Schedule>) -> Result<Self> {
        let state = |(clip, schedule): (&Prompted, Schedule)| {
            let first = clip.shown.first_bcthw.clone();
            let latents = with_first(clip.noise_bcthw.clone(), first.as_ref())?;
            let (skipped, is_measured) = (vec![false; schedule.steps()], false);
            let solver = Solver::new(schedule).with_noise(FreshNoise::Seeded(clip.request.seed));
            let high = clip.request.high_steps;
            Ok(ClipState { solver, latents, made: 0, first, high, skipped, is_measured, changes: Vec::new() })
        };
        Ok(Self { clips, state: clips.iter().zip(schedules).map(state).collect::<Result<_>>()? })
    }

    /// Lets `clip` add `noise` where its solver re-noises, in place of noise by its seed.
    #[must_use]
    pub fn with_noise(mut self, clip: usize, noise: FreshNoise) -> Self {
        let solver = self.state[clip].solver.clone();
        self.state[clip].solver = solver.with_noise(noise);
        self
    }

    /// Lets each clip skip `steps` of its own: there the blocks do not run, and what they added in the last step that was not
    /// skipped is added again. A network's first step of a clip must not be skipped.
    #[must_use]
    pub fn skipping(mut self, steps: &[Vec<usize>]) -> Self {
        for (clip, steps) in self.state.iter_mut().zip(steps) {
            (0..clip.skipped.len()).for_each(|step| clip.skipped[step] = steps.contains(&step));
        }
        self
    }

    /// Measures how the residual of `clip` changes from step to step.
    #[must_use]
    pub fn measuring(mut self, clip: usize) -> Self {
        self.state[clip].is_measured = true;
        self
    }

    /// What was measured of `clip`, by step and half of the guidance. A network's first step has nothing to be held against.
    pub fn changes(&self, clip: usize) -> &[(usize, Half, Change)] {
        &self.state[clip].changes
    }

    /// Solver steps of all clips together that the network of `range` makes.
    pub fn steps_of(&self, range: NoiseRange) -> usize {
        let of = |clip: &ClipState| (0..clip.skipped.len()).filter(|step| clip.is_in(*step, range)).count();
        self.state.iter().map(of).sum()
    }

    /// Makes the steps that are `pipeline`'s. `progress` is called after each step of a clip with its latents, on another
    /// thread, and may break off.
    ///
    /// # Errors
    /// When the network fails, and a clip that is no longer finite.
    pub fn run(
        &mut self,
        pipeline: &Pipeline,
        range: NoiseRange,
        mut progress: impl FnMut(StepDone) -> ControlFlow<()> + Send,
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
            let before = self.state[clip].latents.clone();
            self.state[clip].step(&velocity)?;
            self.check(clip)?;
            if progress(self.state[clip].done(clip, &before, &velocity)).is_break() {
                is_stopped = true;
                return Err(Error::Interrupted);
            }
            Ok(calls[m].goes_on.then(|| self.state[clip].latents.clone()))
        };
        let blocks = |m: usize| calls[m].blocks;
        match pipeline.call(Calls { count: calls.len(), input, output, blocks }) {
            Err(Error::Interrupted) if is_stopped => Ok(ControlFlow::Break(())),
            Err(error) => Err(error),
            Ok(called) => {
                for change in called.changes {
                    let Call { clip, step, half, .. } = calls[change.call];
                    self.state[clip].changes.push((step, half, change));
                }
                Ok(ControlFlow::Continue(()))
            }
        }
    }

    /// The calls that make the steps in `range`: the next step of each clip in turn.
    fn calls(&self, range: NoiseRange) -> Vec<Call> {
        let rest = |clip: &ClipState| {
            let timesteps = &clip.solver.schedule().timesteps;
            let rest = (clip.made..timesteps.len()).take_while(|step| clip.is_in(*step, range));
            rest.map(|step| timesteps[step]).collect::<Vec<_>>()
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
                let step = self.state[clip].made + round;
                calls.extend(halves.iter().enumerate().map(|(i, &half)| Call {
                    clip,
                    step,
                    timestep,
                    half,
                    blocks: self.state[clip].blocks(step, round + 1 < rest.len(), 2 * clip + half as usize),
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
    /// Whether `step` is one of the network of `range`.
    fn is_in(&self, step: usize, range: NoiseRange) -> bool {
        match (self.high, range.expert()) {
            (Some(high), Some(expert)) => (step < high) == (expert == Expert::High),
            _ => range.holds(self.solver.schedule().timesteps[step]),
        }
    }

    /// What becomes of the blocks in `step`, of the network's steps of this clip the last one or not.
    fn blocks(&self, step: usize, goes_on: bool, lane: usize) -> Blocks {
        let is_next_skipped = goes_on && self.skipped[step + 1];
        match (self.is_measured, self.skipped[step]) {
            (true, _) => Blocks::Measure { lane },
            (false, true) => Blocks::Skip { lane, is_last: !is_next_skipped },
            (false, false) if is_next_skipped => Blocks::Keep { lane },
            (false, false) => Blocks::Run,
        }
    }

    /// The step of `clip` that was made last, from the latents `before` by `velocity`.
    fn done<'a>(&'a self, clip: usize, before: &'a Tensor, velocity: &'a Tensor) -> StepDone<'a> {
        let Self { latents, made, solver, first, .. } = self;
        let (step, steps) = (made - 1, solver.schedule().steps()); // a step was made
        let sigma = solver.schedule().sigmas[step];
        StepDone { clip, step, latents, steps, before, velocity, sigma: sigma.into(), first: first.as_ref() }
    }

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
