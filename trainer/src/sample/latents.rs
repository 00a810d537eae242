//! From starting noise to latents: the solver loop with guidance, several clips side by side.

use std::ops::ControlFlow;

use kernels::random::Key;
use kernels::{DType, Device, Tensor};
use models::dit::config::PATCH;
use models::dit::{Conditioning, DitConfig, Raw, Role};
use models::expert::{Expert, Networks};

use super::Share;
use crate::encode::{Encoded, Shown};
use crate::error::{Error, Result};
use crate::pipeline::{NetworkInput, Pipeline};
use crate::prompt::ClipRequest;
use crate::solver::{Schedule, Solver};

/// A request with its text states, its picture and its starting noise.
#[derive(Debug, Clone)]
pub struct Prompted {
    /// What is asked for.
    pub request: ClipRequest,
    /// What the network is conditioned on for the prompt alone: text states [1, s, text_dim].
    pub positive: Conditioning<Raw>,
    /// The same for the negative prompt; not read when the guidance is 1.
    pub negative: Conditioning<Raw>,
    /// Latents at sigma 1, [1, c, t, h, w] f32.
    pub noise_bcthw: Tensor,
    /// What the network is shown of the picture, on the device of the noise.
    pub shown: Shown,
}

impl Prompted {
    /// A request to the model `dit` that starts from `noise_bcthw`, with its text states and its picture out of the cache.
    ///
    /// # Errors
    /// When the prompt, the negative prompt or the picture was not encoded.
    pub fn new(
        request: &ClipRequest,
        noise_bcthw: Tensor,
        encoded: &Encoded,
        dit: &DitConfig,
    ) -> Result<Self> {
        let states = |prompt: &str| -> Result<Conditioning<Raw>> {
            Ok(Conditioning::new().with(Role::TEXT, encoded.text(prompt)?.unsqueeze(0)?))
        };
        Ok(Self {
            request: request.clone(),
            positive: states(&request.prompt)?,
            negative: states(&request.negative)?,
            shown: encoded.shown(request, dit.pictures())?.to_device(noise_bcthw.device())?,
            noise_bcthw,
        })
    }

    /// `latents` with the picture in place of the first frame, where it goes there.
    fn with_first(&self, latents: Tensor) -> Result<Tensor> {
        let Some(first) = &self.shown.first_bcthw else { return Ok(latents) };
        let frames = latents.dim(2)?;
        Ok(match frames {
            1 => first.clone(),
            _ => Tensor::cat(&[first, &latents.narrow(2, 1, frames - 1)?], 2)?,
        })
    }

    /// The network's input at `latents` and `timestep` for `half`, the positive or the negative conditioning.
    fn input(&self, latents: &Tensor, timestep: f32, half: &Conditioning<Raw>) -> Result<NetworkInput> {
        let x_bcthw = match &self.shown.beside_bcthw {
            Some(beside) => Tensor::cat(&[latents, beside], 1)?,
            None => latents.clone(),
        };
        let (_, _, frames, height, width) = latents.dims5()?;
        let timestep = match &self.shown.first_bcthw {
            None => Tensor::new(&[timestep], &Device::Cpu)?,
            // The picture's tokens are clean.
            Some(_) => {
                let of_frame = (height / PATCH) * (width / PATCH);
                let times: Vec<f32> = (0..frames * of_frame)
                    .map(|token| if token < of_frame { 0.0 } else { timestep })
                    .collect();
                Tensor::from_vec(times, (1, frames * of_frame), &Device::Cpu)?
            }
        };
        let cond = self.shown.cond.clone().merged(half.clone());
        Ok(NetworkInput { x_bcthw, cond: cond.with(Role::TIMESTEP, timestep) })
    }
}

/// The noise that a request to the model `dit` starts from, [1, channels, t, h, w] f32: a function of its seed and size.
pub fn starting_noise(request: &ClipRequest, dit: &DitConfig, device: &Device) -> Result<Tensor> {
    let (frames, height, width) =
        dit.defaults(Networks::Whole).latents(request.frames, request.height, request.width);
    let channels = dit.out_channels;
    let noise = Key::new(request.seed, "sample", &[]).normals(channels * frames * height * width);
    let shape = (1, channels, frames, height, width);
    Ok(Tensor::from_vec(noise, shape, &Device::Cpu)?.to_device(device)?)
}

/// Clips on their way from noise to latents. All clips go through a network together, and so do the two halves of the
/// guidance: they are the micro-batches that keep every stage busy.
///
/// Where two experts share the noise levels, all clips go through the one for high noise as far as it makes them, then
/// through the other: each is needed once. The solvers' histories go on unbroken.
pub struct Sampling<'a> {
    clips: &'a [Prompted],
    solvers: Vec<Solver>,
    latents: Vec<Tensor>,
    /// Steps that each clip has made.
    made: Vec<usize>,
}

impl<'a> Sampling<'a> {
    /// At the start of all clips.
    ///
    /// # Errors
    /// A schedule that cannot be.
    pub fn new(clips: &'a [Prompted]) -> Result<Self> {
        let mut solvers = Vec::new();
        for Prompted { request, .. } in clips {
            let schedule = Schedule::new(request.solver, request.convention, request.steps, request.shift)?;
            solvers.push(Solver::new(schedule));
        }
        let latents = clips.iter().map(|clip| clip.with_first(clip.noise_bcthw.clone()));
        Ok(Self { clips, solvers, latents: latents.collect::<Result<_>>()?, made: vec![0; clips.len()] })
    }

    /// Timestep of the clip's next step; `None` behind its last.
    fn next(&self, clip: usize) -> Option<f32> {
        self.solvers[clip].schedule().timesteps.get(self.made[clip]).copied()
    }

    /// How often [`Sampling::advance`] asks the network until no clip's next step is in `share`.
    pub fn rounds(&self, share: Share) -> usize {
        let of_clip = |clip: usize| {
            let rest = &self.solvers[clip].schedule().timesteps[self.made[clip]..];
            rest.iter().take_while(|timestep| share.holds(**timestep)).count()
        };
        (0..self.clips.len()).map(of_clip).max().unwrap_or(0)
    }

    /// How often the network of `share` will be asked in all.
    pub fn steps_of(&self, share: Share) -> usize {
        let of = |solver: &Solver| solver.schedule().timesteps.iter().filter(|t| share.holds(**t)).count();
        self.solvers.iter().map(of).max().unwrap_or(0)
    }

    /// Makes the steps that are `pipeline`'s share. `progress` is called after each round and may break off.
    ///
    /// # Errors
    /// When the network fails, and a clip that is no longer finite.
    pub fn advance(
        &mut self,
        pipeline: &Pipeline,
        share: Share,
        mut progress: impl FnMut() -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>> {
        loop {
            let is_mine = |&clip: &usize| self.next(clip).is_some_and(|timestep| share.holds(timestep));
            let active: Vec<usize> = (0..self.clips.len()).filter(is_mine).collect();
            if active.is_empty() {
                return Ok(ControlFlow::Continue(()));
            }
            self.step(pipeline, share, &active)?;
            if progress().is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
    }

    /// One step of the clips `active`.
    fn step(&mut self, pipeline: &Pipeline, share: Share, active: &[usize]) -> Result<()> {
        let mut inputs = Vec::new();
        for &c in active {
            let (clip, latents) = (&self.clips[c], &self.latents[c]);
            let timestep = self.solvers[c].schedule().timesteps[self.made[c]];
            inputs.push(clip.input(latents, timestep, &clip.positive)?);
            if guidance(clip, share) != 1.0 {
                inputs.push(clip.input(latents, timestep, &clip.negative)?);
            }
        }
        let mut velocities = pipeline.predict(&inputs)?.into_iter();
        for &c in active {
            let clip = &self.clips[c];
            let guidance = guidance(clip, share);
            let halves = if guidance != 1.0 { 2 } else { 1 };
            let parts: Vec<Tensor> = velocities.by_ref().take(halves).collect();
            let velocity = guided(&parts, guidance)?;
            let after = self.solvers[c].step(&self.latents[c], &velocity, self.made[c])?;
            self.latents[c] = clip.with_first(after)?;
            self.made[c] += 1;
        }
        self.check(active)
    }

    /// Looks whether the clips `active` are still numbers, all of them at once: the devices are waited for once a step.
    fn check(&self, active: &[usize]) -> Result<()> {
        // A sum is not finite where a number is not.
        let sums = active.iter().map(|&c| self.latents[c].sum_all()).collect::<kernels::Result<Vec<_>>>()?;
        let sums: Vec<f32> = Tensor::stack(&sums, 0)?.to_vec1()?;
        match active.iter().zip(sums).find(|(_, sum)| !sum.is_finite()) {
            None => Ok(()),
            Some((&clip, _)) => {
                let (step, schedule) = (self.made[clip], self.solvers[clip].schedule());
                Err(Error::NonFiniteClip {
                    clip,
                    prompt: self.clips[clip].request.prompt.clone(),
                    step,
                    steps: schedule.timesteps.len(),
                    sigma: schedule.sigmas[step - 1], // a step was made
                })
            }
        }
    }

    /// Steps that each clip has made.
    pub fn made(&self) -> &[usize] {
        &self.made
    }

    /// The latents of each clip as they stand, [1, c, t, h, w] f32.
    pub fn latents(&self) -> &[Tensor] {
        &self.latents
    }
}

/// The guidance scale of the steps that are in `share`.
fn guidance(clip: &Prompted, share: Share) -> f64 {
    match share {
        Share::Of { expert: Expert::High, .. } => clip.request.guidance_high,
        _ => clip.request.guidance,
    }
}

/// The latents of each clip, [1, c, t, h, w] f32, by one network. `progress` is called after each step and may break off;
/// the result is `None` then.
///
/// # Errors
/// When the network fails.
pub fn generate(
    pipeline: &Pipeline,
    clips: &[Prompted],
    progress: impl FnMut() -> ControlFlow<()>,
) -> Result<Option<Vec<Tensor>>> {
    let mut sampling = Sampling::new(clips)?;
    Ok(match sampling.advance(pipeline, Share::All, progress)? {
        ControlFlow::Continue(()) => Some(sampling.latents),
        ControlFlow::Break(()) => None,
    })
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
