//! From starting noise to latents: the solver loop with guidance, several clips in flight at once.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::thread;

use kernels::transfer::{Link, Reading};
use kernels::{DType, Tensor};
use models::expert::Expert;

use super::steps::{Audience, Measured, Part};
use super::{Prompted, exchange};
use crate::encode::prompt::ClipRequest;
use crate::error::{Error, Result};
use crate::learning::NoiseRange;
use crate::pipeline::{Blocks, Change, Pipeline};
use crate::solver::{FreshNoise, Schedule, Solver};

/// Clips on their way from noise to latents. Each clip is a lane for each half of the guidance; the lanes are what keeps
/// every stage busy, of one pipeline or of several with the same network. A clip waits for its own last step alone, never for
/// another clip.
///
/// Where two experts share the noise levels, all clips go through the one for high noise as far as it makes them, then
/// through the other: each is needed once. The solvers' histories go on unbroken.
pub struct Session<'a> {
    clips: &'a [Prompted],
    state: Vec<ClipState>,
}

/// Where a clip stands.
pub(super) struct ClipState {
    clip: usize,
    prompt: String,
    solver: Solver,
    /// [1, c, t, h, w] f32.
    pub latents: Tensor,
    /// Steps that were made.
    pub made: usize,
    /// The sum of the latents behind the last step, which is not finite where a number is not.
    sum: Option<Reading>,
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

/// The groups of devices that compute the halves of a clip.
#[derive(Debug, Clone, Copy)]
struct Dealt {
    /// Of the half with the prompt; the solver's steps are taken there too.
    home: usize,
    /// Of the half with the negative prompt.
    away: usize,
}

/// One call of the network.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Call {
    pub clip: usize,
    pub step: usize,
    pub timestep: f32,
    pub half: Half,
    pub blocks: Blocks,
    /// Whether the clip's step before has to be taken first.
    pub waits: bool,
    /// Whether it is the last call of its group for this step of the clip.
    pub ends_step: bool,
    /// Whether another step of the clip follows.
    pub goes_on: bool,
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
        let state = |(index, (clip, schedule)): (usize, (&Prompted, Schedule))| {
            let first = clip.shown.first_bcthw.clone();
            let latents = with_first(clip.noise_bcthw.clone(), first.as_ref())?;
            let (skipped, is_measured) = (vec![false; schedule.steps()], false);
            let solver = Solver::new(schedule).with_noise(FreshNoise::Seeded(clip.request.seed));
            let high = clip.request.high_steps;
            let prompt = clip.request.prompt.clone();
            let (made, sum, changes) = (0, None, Vec::new());
            Ok(ClipState {
                clip: index,
                prompt,
                solver,
                latents,
                made,
                sum,
                first,
                high,
                skipped,
                is_measured,
                changes,
            })
        };
        let schedules = clips.iter().zip(schedules).enumerate();
        Ok(Self { clips, state: schedules.map(state).collect::<Result<_>>()? })
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

    /// Makes the steps of `range` with `groups`, each of which has the network of that range: one pipeline, or the same network
    /// on several groups of devices. The halves of the guidance are dealt to them in turn, so that two groups compute both
    /// halves of a clip at once. `progress` is called after each step of a clip with its latents, on another thread, and may
    /// break off.
    ///
    /// # Errors
    /// When the network fails, and a clip that is no longer finite; that is seen a step late.
    pub fn run(
        &mut self,
        groups: &[Pipeline],
        range: NoiseRange,
        progress: impl FnMut(StepDone) -> ControlFlow<()> + Send,
    ) -> Result<ControlFlow<()>> {
        let audience = Audience::new(progress);
        let (parts, links) = self.parts(groups, range)?;
        let results: Vec<Result<Vec<Measured>>> = thread::scope(|scope| {
            let audience = &audience;
            let threads: Vec<_> =
                parts.into_iter().map(|part| scope.spawn(move || part.run(audience))).collect();
            threads.into_iter().map(|t| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p))).collect()
        });
        links.iter().try_for_each(|link| link.settle())?;
        let mut stopped = Ok(());
        for result in results {
            match result {
                Ok(measured) => {
                    measured.into_iter().for_each(|(clip, change)| self.state[clip].changes.push(change));
                }
                Err(Error::Interrupted) if audience.is_stopped() => {}
                // The group that stopped says why.
                Err(error @ Error::NeighbourStopped) => stopped = Err(error),
                Err(error) => return Err(error),
            }
        }
        match audience.is_stopped() {
            true => Ok(ControlFlow::Break(())),
            false => stopped.map(|()| ControlFlow::Continue(())),
        }
    }

    /// What each of `groups` does of the steps in `range`, and the links between them.
    fn parts<'s>(
        &'s mut self,
        groups: &'s [Pipeline],
        range: NoiseRange,
    ) -> Result<(Vec<Part<'s>>, Vec<Arc<Link>>)> {
        let dealt = self.dealt(groups.len());
        let calls = self.calls(range, &dealt, groups.len());
        let is_guided = |clip: &usize| guidance(&self.clips[*clip].request, range) != 1.0;
        let shared = (0..dealt.len()).filter(|clip| dealt[*clip].home != dealt[*clip].away).filter(is_guided);
        let shared: Vec<_> = shared.map(|clip| (clip, dealt[clip].home, dealt[clip].away)).collect();
        let (ends, links) = exchange::between(groups, &shared)?;
        let mut parts = Vec::new();
        for ((network, calls), ends) in groups.iter().zip(calls).zip(ends) {
            let [first, _] = network.ends();
            let (mut clips, mut latents) = (BTreeMap::new(), BTreeMap::new());
            for Call { clip, .. } in &calls {
                if !clips.contains_key(clip) {
                    clips.insert(*clip, self.clips[*clip].to_device(first)?);
                    latents.insert(*clip, self.state[*clip].latents.to_device(first)?);
                }
            }
            parts.push(Part { network, range, calls, clips, latents, states: BTreeMap::new(), ends });
        }
        for (clip, state) in self.state.iter_mut().enumerate() {
            let part = &mut parts[dealt[clip].home]; // one of the groups
            let [_, last] = part.network.ends();
            state.latents = state.latents.to_device(last)?;
            state.first = state.first.as_ref().map(|first| first.to_device(last)).transpose()?;
            part.states.insert(clip, state);
        }
        Ok((parts, links))
    }

    /// The groups that the halves of each clip are dealt to, in turn: the same for all noise ranges, so that the solver's history
    /// stays where it is.
    fn dealt(&self, groups: usize) -> Vec<Dealt> {
        let mut next = 0;
        let dealt = |clip: &Prompted| {
            let is_guided = clip.request.guidance != 1.0 || clip.request.guidance_high != 1.0;
            let home = next % groups.max(1);
            next += if is_guided { 2 } else { 1 };
            Dealt { home, away: if is_guided { (home + 1) % groups.max(1) } else { home } }
        };
        self.clips.iter().map(dealt).collect()
    }

    /// The calls that make the steps in `range`, of each of `groups` groups: the next step of each clip in turn.
    fn calls(&self, range: NoiseRange, dealt: &[Dealt], groups: usize) -> Vec<Vec<Call>> {
        let rest = |clip: &ClipState| {
            let timesteps = &clip.solver.schedule().timesteps;
            let rest = (clip.made..timesteps.len()).take_while(|step| clip.is_in(*step, range));
            rest.map(|step| timesteps[step]).collect::<Vec<_>>()
        };
        let rest: Vec<Vec<f32>> = self.state.iter().map(rest).collect();
        let rounds = rest.iter().map(Vec::len).max().unwrap_or(0);
        let mut calls: Vec<Vec<Call>> = (0..groups).map(|_| Vec::new()).collect();
        for round in 0..rounds {
            for (clip, rest) in rest.iter().enumerate() {
                let Some(&timestep) = rest.get(round) else { continue };
                let (Dealt { home, away }, state) = (dealt[clip], &self.state[clip]);
                let halves: &[(Half, usize)] = match guidance(&self.clips[clip].request, range) == 1.0 {
                    true => &[(Half::Positive, home)],
                    false => &[(Half::Positive, home), (Half::Negative, away)],
                };
                let (step, goes_on) = (state.made + round, round + 1 < rest.len());
                for (i, &(half, group)) in halves.iter().enumerate() {
                    calls[group].push(Call {
                        clip,
                        step,
                        timestep,
                        half,
                        blocks: state.blocks(step, goes_on, 2 * clip + half as usize),
                        waits: round > 0 && halves[..i].iter().all(|(_, before)| *before != group),
                        ends_step: halves[i + 1..].iter().all(|(_, behind)| *behind != group),
                        goes_on,
                    });
                }
            }
        }
        calls
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

    /// The step that was made last, from the latents `before` by `velocity`.
    pub fn done<'a>(&'a self, before: &'a Tensor, velocity: &'a Tensor) -> StepDone<'a> {
        let Self { latents, made, solver, first, .. } = self;
        let (step, steps) = (made - 1, solver.schedule().steps()); // a step was made
        let sigma = solver.schedule().sigmas[step];
        let (clip, first) = (self.clip, first.as_ref());
        StepDone { clip, step, latents, steps, before, velocity, sigma: sigma.into(), first }
    }

    /// The solver's next step by the velocity that the network predicts.
    pub fn step(&mut self, velocity: &Tensor) -> Result<()> {
        let after = self.solver.step(&self.latents, velocity, self.made)?;
        self.latents = with_first(after, self.first.as_ref())?;
        self.made += 1;
        Ok(())
    }

    /// Looks whether the clip was finite after the step before the last one: the device has gone on since, so nothing waits.
    pub fn check_step_before(&mut self) -> Result<()> {
        let sum = self.sum.replace(Reading::of(self.latents.sum_all()?)?);
        self.check(sum, self.made - 1) // a step was made
    }

    /// Looks whether the clip is finite after its last step.
    pub fn check_last_step(&mut self) -> Result<()> {
        let sum = self.sum.take();
        self.check(sum, self.made)
    }

    fn check(&self, sum: Option<Reading>, made: usize) -> Result<()> {
        if sum.map_or(Ok(0.0), Reading::value)?.is_finite() {
            return Ok(());
        }
        let (schedule, prompt) = (self.solver.schedule(), self.prompt.clone());
        let (steps, sigma) = (schedule.timesteps.len(), schedule.sigmas[made - 1]); // of a step that was made
        Err(Error::NonFiniteClip { clip: self.clip, prompt, step: made, steps, sigma })
    }
}

impl Prompted {
    /// What the network is conditioned on for a half of the guidance.
    pub(super) fn half(&self, half: Half) -> &models::dit::Conditioning<models::dit::Raw> {
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

/// The guidance scale of the steps of `clip` that are in `range`.
pub(super) fn guidance(clip: &ClipRequest, range: NoiseRange) -> f64 {
    match range {
        NoiseRange::Of { expert: Expert::High, .. } => clip.guidance_high,
        _ => clip.guidance,
    }
}
