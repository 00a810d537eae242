//! Solvers of the flow dx/dsigma = v(x, sigma), from noise at sigma 1 to a latent at sigma 0.
//!
//! A [`Schedule`] is the grid of noise levels; a [`Solver`] integrates along it, one network call a step. Coefficients are
//! computed on the host in float64; tensors stay in float32 on their device, and nothing is copied to the host.

mod dpmpp;
mod euler;
mod lcm;
mod sigmas;
mod unipc;

use kernels::{DType, Tensor};
use models::published::PublishedSolver;
use serde::{Deserialize, Serialize};

pub use lcm::FreshNoise;
pub use sigmas::{Schedule, shifted};

/// The result type of this module.
pub type Result<T, E = SolverError> = std::result::Result<T, E>;

/// The solver.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum SolverKind {
    /// UniPC of order 2 with its corrector, as in Wan's own code. The default.
    #[default]
    UniPc,
    /// One Euler step per network call.
    Euler,
    /// DPM-Solver++ of order 2, multistep, midpoint.
    DpmPp2m,
    /// Back to a clean latent and to the next noise level with fresh noise, on Euler's grid: some models that were distilled
    /// to few steps.
    Lcm,
}

impl From<PublishedSolver> for SolverKind {
    fn from(solver: PublishedSolver) -> Self {
        match solver {
            PublishedSolver::UniPc => Self::UniPc,
            PublishedSolver::DpmPp2m => Self::DpmPp2m,
        }
    }
}

/// The grid of sigmas.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum Convention {
    /// The grid of the code that Wan was published with. The default.
    #[default]
    Official,
    /// The grid of diffusers' schedulers as its Wan pipelines configure them: for the same results as diffusers.
    Diffusers,
}

impl Convention {
    /// Its name in the keys of cache entries, which must never change.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Self::Official => "Official",
            Self::Diffusers => "Diffusers",
        }
    }
}

/// What can go wrong in a solver.
#[derive(Debug, thiserror::Error)]
pub enum SolverError {
    /// A grid without steps.
    #[error("the number of sampling steps is 0; give at least 1 (Wan uses 30 to 50)")]
    NoSteps,
    /// An impossible shift.
    #[error("the shift {0} is not a positive number (Wan uses 3 to 12, 1 for none)")]
    Shift(f64),
    /// Steps must be taken in order, each once: a multistep solver depends on the previous ones.
    #[error("sampling step {got} was requested, but step {expected} of {steps} is next; start a new solver")]
    OutOfOrder {
        /// The requested step.
        got: usize,
        /// The next step.
        expected: usize,
        /// Steps in all.
        steps: usize,
    },
    /// Missing fresh noise.
    #[error("step {step} of a solver that re-noises has no fresh noise")]
    NoNoise {
        /// The step.
        step: usize,
    },
    /// Sigmas and timesteps that do not form a grid.
    #[error(
        "{sigmas} sigmas and {timesteps} timesteps do not form a grid: give as many of each, sigmas descending from at most 1 to above 0"
    )]
    Grid {
        /// How many sigmas.
        sigmas: usize,
        /// How many timesteps.
        timesteps: usize,
    },
    /// The tensor library refused an operation.
    #[error(transparent)]
    Tensor(#[from] kernels::Error),
}

/// One sampling run along a [`Schedule`], from its first sigma to 0. It has the multistep history, which continues when
/// another network takes over midway.
#[derive(Debug, Clone)]
pub struct Solver {
    schedule: Schedule,
    next: usize,
    history: History,
}

#[derive(Debug, Clone)]
enum History {
    UniPc(unipc::UniPc),
    Euler,
    DpmPp2m(dpmpp::DpmPp2m),
    Lcm(FreshNoise),
}

impl Solver {
    /// A run at its start, with the solver of the schedule.
    pub fn new(schedule: Schedule) -> Self {
        let history = match schedule.kind() {
            SolverKind::UniPc => History::UniPc(unipc::UniPc::default()),
            SolverKind::Euler => History::Euler,
            SolverKind::DpmPp2m => History::DpmPp2m(dpmpp::DpmPp2m::default()),
            SolverKind::Lcm => History::Lcm(FreshNoise::Given(Vec::new())),
        };
        Self { schedule, next: 0, history }
    }

    /// The same, with `noise` for solvers that re-noise.
    #[must_use]
    pub fn with_noise(mut self, noise: FreshNoise) -> Self {
        if let History::Lcm(own) = &mut self.history {
            *own = noise;
        }
        self
    }

    /// The grid.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// The sample at sigma i+1 from the sample `x` at sigma i and the velocity `v` that the network predicts for `x`
    /// at timestep i. Any shape and float dtype; the result is float32.
    ///
    /// # Errors
    /// Steps out of order, or tensors of different shapes.
    pub fn step(&mut self, x: &Tensor, v: &Tensor, i: usize) -> Result<Tensor> {
        let steps = self.schedule.steps();
        if i != self.next || i >= steps {
            return Err(SolverError::OutOfOrder { got: i, expected: self.next, steps });
        }
        let (x, v) = (x.to_dtype(DType::F32)?, v.to_dtype(DType::F32)?);
        let sigmas = &self.schedule.sigmas;
        let after = match &mut self.history {
            History::UniPc(state) => state.step(sigmas, &x, &v, i)?,
            History::Euler => euler::step(sigmas, &x, &v, i)?,
            History::DpmPp2m(state) => state.step(sigmas, &x, &v, i)?,
            History::Lcm(noise) => lcm::step(sigmas, &x, &v, i, noise)?,
        };
        self.next += 1;
        Ok(after)
    }
}

/// Classifier-free guidance: uncond + guidance (cond - uncond), f32; `parts` are the velocities with the prompt and, unless the
/// guidance is 1, with the negative prompt.
///
/// # Errors
/// Tensors of different shapes.
pub fn guided(parts: &[Tensor], guidance: f64) -> Result<Tensor> {
    match parts {
        [cond, uncond] => {
            let (cond, uncond) = (cond.to_dtype(DType::F32)?, uncond.to_dtype(DType::F32)?);
            Ok((&uncond + ((cond - &uncond)? * guidance)?)?)
        }
        _ => Ok(parts[0].to_dtype(DType::F32)?),
    }
}

/// lambda = ln(1 - sigma) - ln(sigma), half the log signal-to-noise ratio: -inf at sigma 1, +inf at sigma 0.
fn lambda(sigma: f32) -> f64 {
    let sigma = f64::from(sigma);
    (1.0 - sigma).ln() - sigma.ln()
}

/// The network's prediction of the clean latent: x - sigma * v.
fn predicted(x: &Tensor, v: &Tensor, sigma: f32) -> Result<Tensor> {
    combine(&[(1.0, x), (-f64::from(sigma), v)])
}

/// The sum of tensors of one shape, each times its factor. Terms with factor 0 are left out.
fn combine(terms: &[(f64, &Tensor)]) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for (factor, tensor) in terms.iter().filter(|(factor, _)| *factor != 0.0) {
        let term = if *factor == 1.0 { (*tensor).clone() } else { tensor.affine(*factor, 0.0)? };
        sum = Some(match sum {
            Some(sum) => sum.add(&term)?,
            None => term,
        });
    }
    match sum {
        Some(sum) => Ok(sum),
        None => Ok(terms[0].1.zeros_like()?),
    }
}
