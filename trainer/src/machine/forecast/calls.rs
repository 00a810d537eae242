//! What is at both ends of calls of the network without a backward: where inputs come from, and what becomes of velocities.

use kernels::{DType, Device, Tensor};
use models::dit::{Conditioning, NetworkInput, Raw};
use models::published::KindFacts;

use crate::error::Result;
use crate::pipeline::{Blocks, MicroBatch};
use crate::solver::{Convention, FreshNoise, Schedule, Solver, SolverKind, guided};

/// Solver steps of a clip before the calls that are played: by then its history is as long as it gets.
const STEPS_BEFORE: usize = 3;
/// Solver steps of a clip that is played.
const STEPS: usize = 40;
/// A shift and a guidance scale: neither changes what is allocated.
const SHIFT: f64 = 5.0;
const GUIDANCE: f64 = 5.0;

/// What calls of the network without a backward are for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Calls {
    /// The held-out loss: each velocity is compared with its target.
    HeldOut,
    /// Clips on their way from noise to latents, all at once, the largest first.
    Clips(Vec<ClipShape>),
}

/// What a clip in flight takes memory by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClipShape {
    /// (frames, height, width) of its latents.
    pub latents: (usize, usize, usize),
    /// Calls of the network for a solver step: 2 with guidance, 1 without, or where another group of devices makes the other.
    pub halves: usize,
    /// Its solver.
    pub solver: SolverKind,
    /// Whether a picture goes in place of its first frame, where the model takes one there.
    pub has_picture: bool,
    /// What is kept of its blocks from step to step.
    pub residuals: Residuals,
}

/// What is kept of a clip's blocks from step to step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Residuals {
    /// Nothing.
    #[default]
    None,
    /// What they added, since steps may be skipped.
    Kept,
    /// What all stages together added, to be held against the next step.
    Measured,
}

impl Calls {
    /// What becomes of the blocks in the calls of the clip whose calls are played, of which this is one of `lane`.
    pub(super) fn blocks(&self, lane: usize) -> Blocks {
        let first = match self {
            Self::HeldOut => None,
            Self::Clips(clips) => clips.first(),
        };
        match first.map_or(Residuals::None, |clip| clip.residuals) {
            Residuals::None => Blocks::Run,
            Residuals::Kept => Blocks::Keep { lane },
            Residuals::Measured => Blocks::Measure { lane },
        }
    }

    /// Calls of a solver step of the clip whose calls are played.
    pub(super) fn halves_of_first(&self) -> usize {
        match self {
            Self::HeldOut => 1,
            Self::Clips(clips) => clips.first().map_or(1, |clip| clip.halves),
        }
    }

    /// The most calls that can be under way at once: the next step of a clip waits for its step before.
    pub(super) fn lanes(&self) -> usize {
        match self {
            Self::HeldOut => usize::MAX,
            Self::Clips(clips) => clips.iter().map(|clip| clip.halves).sum::<usize>().max(1),
        }
    }
}

/// What the first stage makes inputs from.
pub(super) struct Source<'a> {
    batch: &'a MicroBatch,
    clips: Vec<Prompted>,
}

/// A clip on the first stage's device.
struct Prompted {
    latents: Tensor,
    /// Mask and latents behind the noisy channels, for models that take them there.
    beside: Option<Tensor>,
    /// Of both halves of the guidance, whether they are used or not.
    conds: [Conditioning<Raw>; 2],
    halves: usize,
    _noise: Tensor,
}

/// What the last stage does with velocities.
pub(super) enum Sink<'a> {
    Compared(&'a MicroBatch),
    Solved { clips: Vec<ClipState>, halves: Vec<Tensor>, of_first: usize },
}

/// A clip on the last stage's device.
pub(super) struct ClipState {
    solver: Solver,
    latents: Tensor,
    first: Option<Tensor>,
    made: usize,
}

impl<'a> Source<'a> {
    /// For `calls` with the conditioning of `batch`, on `device`; where `sink` is on the same one, latents that both read are
    /// there once.
    pub fn new(calls: &Calls, batch: &'a MicroBatch, device: &Device, sink: Option<&Sink>) -> Result<Self> {
        let Calls::Clips(clips) = calls else { return Ok(Self { batch, clips: Vec::new() }) };
        let (of_input, of_output) = (batch.input.x_bcthw.dim(1)?, batch.target.dim(1)?);
        let is_beside = of_input > of_output;
        let prompted = |(index, clip): (usize, &ClipShape)| {
            let cond = || batch.input.cond.to_device(device);
            // Other clips were stepped since their last input was made, so their newest latents are not these.
            let shared = sink.and_then(Sink::newest).filter(|_| index == 0);
            Ok(Prompted {
                latents: shared.map_or_else(|| latents(clip, of_output, device), Ok)?,
                beside: is_beside.then(|| latents(clip, of_input - of_output, device)).transpose()?,
                conds: [cond()?, cond()?],
                halves: clip.halves,
                _noise: latents(clip, of_output, device)?,
            })
        };
        Ok(Self { batch, clips: clips.iter().enumerate().map(prompted).collect::<Result<_>>()? })
    }

    /// The input of call `m`: of the held-out sample, or of the largest clip, whose newest latents are those of `sink` where
    /// that is on the same device.
    pub fn input(&mut self, m: usize, sink: Option<&Sink>) -> Result<NetworkInput> {
        let Some(clip) = self.clips.first_mut() else { return Ok(self.batch.input.clone()) };
        if m.is_multiple_of(clip.halves)
            && let Some(newest) = sink.and_then(Sink::newest)
        {
            clip.latents = newest;
        }
        let x_bcthw = match &clip.beside {
            Some(beside) => Tensor::cat(&[&clip.latents, beside], 1)?,
            None => clip.latents.clone(),
        };
        let cond = clip.conds[m % clip.halves].clone(); // of 2 at most
        Ok(NetworkInput { x_bcthw, cond })
    }
}

impl<'a> Sink<'a> {
    /// For `calls` over samples such as `batch`, on `device`.
    pub fn new(calls: &Calls, (batch, facts): (&'a MicroBatch, &KindFacts), device: &Device) -> Result<Self> {
        let Calls::Clips(clips) = calls else { return Ok(Self::Compared(batch)) };
        let channels = batch.target.dim(1)?;
        let state = |clip: &ClipShape| {
            let schedule = Schedule::new(clip.solver, Convention::Official, STEPS, SHIFT)?;
            let is_in_place = clip.has_picture && facts.in_place;
            let picture = ClipShape { latents: (1, clip.latents.1, clip.latents.2), ..*clip };
            let mut state = ClipState {
                solver: Solver::new(schedule).with_noise(FreshNoise::Seeded(0)),
                latents: latents(clip, channels, device)?,
                first: is_in_place.then(|| latents(&picture, channels, device)).transpose()?,
                made: 0,
            };
            for _ in 0..STEPS_BEFORE {
                state.step(&latents(clip, channels, device)?)?;
            }
            Ok(state)
        };
        let of_first = clips.first().map_or(1, |clip| clip.halves);
        let clips = clips.iter().map(state).collect::<Result<_>>()?;
        Ok(Self::Solved { clips, halves: Vec::new(), of_first })
    }

    /// The latents of the largest clip as they stand.
    fn newest(&self) -> Option<Tensor> {
        match self {
            Self::Compared(_) => None,
            Self::Solved { clips, .. } => clips.first().map(|clip| clip.latents.clone()),
        }
    }

    /// Takes the velocity of a call.
    pub fn take(&mut self, velocity: Tensor) -> Result<()> {
        match self {
            Self::Compared(batch) => {
                let target = batch.target.to_device(velocity.device())?;
                (velocity.to_dtype(DType::F32)? - target)?.sqr()?.mean_all()?;
            }
            Self::Solved { clips, halves, of_first } => {
                halves.push(velocity);
                if let (Some(clip), true) = (clips.first_mut(), halves.len() == *of_first) {
                    clip.step(&guided(&std::mem::take(halves), GUIDANCE)?)?;
                }
            }
        }
        Ok(())
    }
}

impl ClipState {
    /// A step of the solver.
    fn step(&mut self, velocity: &Tensor) -> Result<()> {
        let after = self.solver.step(&self.latents, velocity, self.made)?;
        let frames = after.dim(2)?;
        self.latents = match &self.first {
            Some(first) if frames > 1 => Tensor::cat(&[first, &after.narrow(2, 1, frames - 1)?], 2)?,
            _ => after,
        };
        self.made += 1;
        Ok(())
    }
}

/// Latents of the shape of `clip`, [1, channels, t, h, w] f32.
fn latents(clip: &ClipShape, channels: usize, device: &Device) -> Result<Tensor> {
    let (frames, height, width) = clip.latents;
    Ok(Tensor::zeros((1, channels, frames, height, width), DType::F32, device)?)
}
