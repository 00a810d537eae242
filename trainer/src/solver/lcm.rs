//! Re-noising, for models that were distilled to few steps: (1 - s_after) x0 + s_after * fresh noise.
//!
//! Source: comfyanonymous/ComfyUI comfy/k_diffusion/sampling.py `sample_lcm`, comfy/model_sampling.py (noise scaling of CONST).

use kernels::random::Key;
use kernels::{Device, Tensor};

use super::{Result, SolverError, combine, predicted};

/// The noise that each step but the last adds.
#[derive(Debug, Clone)]
pub enum FreshNoise {
    /// A function of this seed and the step.
    Seeded(u64),
    /// These, one for each step but the last.
    Given(Vec<Tensor>),
}

impl FreshNoise {
    fn of(&self, i: usize, like: &Tensor) -> Result<Tensor> {
        match self {
            Self::Given(noise) => noise.get(i).cloned().ok_or(SolverError::NoNoise { step: i }),
            Self::Seeded(seed) => {
                let numbers = Key::new(*seed, "renoise", &[i as u64]).normals(like.elem_count());
                let noise = Tensor::from_vec(numbers, like.shape().clone(), &Device::Cpu)?;
                Ok(noise.to_device(like.device())?)
            }
        }
    }
}

/// One step: to the clean latent that the network sees, and back to the next noise level with other noise.
pub fn step(sigmas: &[f32], x: &Tensor, v: &Tensor, i: usize, noise: &FreshNoise) -> Result<Tensor> {
    let (clean, after) = (predicted(x, v, sigmas[i])?, f64::from(sigmas[i + 1]));
    if after == 0.0 {
        return Ok(clean);
    }
    combine(&[(1.0 - after, &clean), (after, &noise.of(i, x)?)])
}
