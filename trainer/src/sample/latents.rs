//! From starting noise to latents: the solver loop with guidance, several clips side by side.

use std::ops::ControlFlow;

use candle_core::{DType, Device, Tensor};
use kernels::random::Key;

use crate::base::LATENT_STRIDE;
use crate::encode::Encoded;
use crate::error::Result;
use crate::pipeline::{NetworkInput, Pipeline};
use crate::prompt::ClipRequest;
use crate::solver::{Schedule, Solver};

/// A request with its text states and its starting noise.
#[derive(Debug, Clone)]
pub struct Prompted {
    /// What is asked for.
    pub request: ClipRequest,
    /// Text states of the prompt, [1, s, text_dim].
    pub text_bsd: Tensor,
    /// Text states of the negative prompt; not looked at when the guidance is 1.
    pub negative_bsd: Tensor,
    /// Latents at sigma 1, [1, c, t, h, w] f32.
    pub noise_bcthw: Tensor,
}

impl Prompted {
    /// A request that starts from `noise_bcthw`, with its text states out of the cache.
    ///
    /// # Errors
    /// When the prompt or the negative prompt was not encoded.
    pub fn new(request: &ClipRequest, noise_bcthw: Tensor, encoded: &Encoded) -> Result<Self> {
        Ok(Self {
            request: request.clone(),
            text_bsd: encoded.text(&request.prompt)?.unsqueeze(0)?,
            negative_bsd: encoded.text(&request.negative)?.unsqueeze(0)?,
            noise_bcthw,
        })
    }
}

/// The noise that a request starts from, [1, channels, t, h, w] f32: a function of its seed and size.
pub fn starting_noise(request: &ClipRequest, channels: usize, device: &Device) -> Result<Tensor> {
    let side = |pixels: u32| pixels as usize / LATENT_STRIDE;
    let frames = models::vae::latent_frames(request.frames as usize);
    let shape = (1, channels, frames, side(request.height), side(request.width));
    let count = channels * frames * side(request.height) * side(request.width);
    let noise = Key::new(request.seed, "sample", &[]).normals(count);
    Ok(Tensor::from_vec(noise, shape, &Device::Cpu)?.to_device(device)?)
}

/// The latents of each clip, [1, c, t, h, w] f32. All clips go through the network together, and so do the two halves
/// of the guidance: they are the micro-batches that keep every stage busy. `progress` is called after each step and may
/// break off; the result is `None` then.
pub fn generate(
    pipeline: &Pipeline,
    clips: &[Prompted],
    mut progress: impl FnMut() -> ControlFlow<()>,
) -> Result<Option<Vec<Tensor>>> {
    let mut solvers = Vec::new();
    for Prompted { request, .. } in clips {
        let schedule = Schedule::new(request.solver, request.convention, request.steps, request.shift)?;
        solvers.push(Solver::new(schedule));
    }
    let mut latents: Vec<Tensor> = clips.iter().map(|clip| clip.noise_bcthw.clone()).collect();
    let longest = clips.iter().map(|clip| clip.request.steps).max().unwrap_or(0);
    for i in 0..longest {
        let active: Vec<usize> = (0..clips.len()).filter(|&c| i < clips[c].request.steps).collect();
        let mut inputs = Vec::new();
        for &c in &active {
            let timestep = Tensor::new(&[solvers[c].schedule().timesteps[i]], &Device::Cpu)?;
            let input = |text: &Tensor| NetworkInput {
                x_bcthw: latents[c].clone(),
                timestep: timestep.clone(),
                text_bsd: text.clone(),
                picture_bsd: None,
            };
            inputs.push(input(&clips[c].text_bsd));
            if clips[c].request.guidance != 1.0 {
                inputs.push(input(&clips[c].negative_bsd));
            }
        }
        let mut velocities = pipeline.predict(&inputs)?.into_iter();
        for &c in &active {
            let halves = if clips[c].request.guidance != 1.0 { 2 } else { 1 };
            let parts: Vec<Tensor> = velocities.by_ref().take(halves).collect();
            let velocity = guided(&parts, clips[c].request.guidance)?;
            latents[c] = solvers[c].step(&latents[c], &velocity, i)?;
        }
        if progress().is_break() {
            return Ok(None);
        }
    }
    Ok(Some(latents))
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
