//! The noise levels of a sampling run, and the timesteps that the network gets.
//!
//! Base grids run from (almost) 1 down towards 0 and are shifted: s' = shift * s / (1 + (shift - 1) * s).
//! Sources: Wan-Video/Wan2.1 wan/utils/fm_solvers_unipc.py and fm_solvers.py; diffusers
//! scheduling_unipc_multistep.py, scheduling_dpmsolver_multistep.py, scheduling_flow_match_euler_discrete.py.

use super::{Convention, Result, SolverError, SolverKind};

/// The largest sigma of the official UniPC grid: 0.999 as a float32.
const OFFICIAL_FIRST: f64 = 0.999_f32 as f64;

/// Steps of the training process; a timestep is this times sigma.
const TRAIN_STEPS: f64 = 1000.0;

/// The sigmas and timesteps of one sampling run.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    kind: SolverKind,
    /// Noise levels, from the first step's to the final 0: steps + 1 values.
    pub sigmas: Vec<f32>,
    /// The network's timestep at each step, in 0..1000: whole numbers (truncated, not rounded) for UniPC and DPM++,
    /// as their reference has them, exact ones for Euler.
    pub timesteps: Vec<f32>,
}

impl Schedule {
    /// The grid of `steps` steps with `shift` (1 leaves the base grid; Wan 2.1 uses 5, or 3 at 480p).
    ///
    /// # Errors
    /// No steps, or a shift that is not a positive number.
    pub fn new(kind: SolverKind, convention: Convention, steps: usize, shift: f64) -> Result<Self> {
        if steps == 0 {
            return Err(SolverError::NoSteps);
        }
        if !shift.is_finite() || shift <= 0.0 {
            return Err(SolverError::Shift(shift));
        }
        if matches!(kind, SolverKind::Euler | SolverKind::Lcm) {
            return Ok(Self { kind, ..euler(convention, steps, shift) });
        }
        let mut sigmas: Vec<f64> =
            base(kind, convention, steps).into_iter().map(|s| shifted(s, shift)).collect();
        if (kind, convention) == (SolverKind::UniPc, Convention::Diffusers) && (sigmas[0] - 1.0).abs() < 1e-6
        {
            // UniPC's lambda is infinite at sigma 1.
            sigmas[0] -= 1e-6;
        }
        let timesteps = sigmas.iter().map(|s| (TRAIN_STEPS * s).trunc() as f32).collect();
        let sigmas = sigmas.into_iter().map(|s| s as f32).chain([0.0]).collect();
        Ok(Self { kind, sigmas, timesteps })
    }

    /// A grid of given `sigmas`, without the final 0, and `timesteps`, for models that were distilled on it.
    ///
    /// # Errors
    /// Sigmas that do not fall from 1 at most to above 0, or another number of timesteps.
    pub fn given(kind: SolverKind, sigmas: &[f32], timesteps: &[f32]) -> Result<Self> {
        let falls = sigmas.windows(2).all(|pair| pair[0] > pair[1]);
        let is_inside = sigmas.iter().all(|sigma| *sigma > 0.0 && *sigma <= 1.0);
        if sigmas.is_empty() || sigmas.len() != timesteps.len() || !falls || !is_inside {
            return Err(SolverError::Grid { sigmas: sigmas.len(), timesteps: timesteps.len() });
        }
        let sigmas = sigmas.iter().copied().chain([0.0]).collect();
        Ok(Self { kind, sigmas, timesteps: timesteps.to_vec() })
    }

    /// The solver that this grid is for.
    pub fn kind(&self) -> SolverKind {
        self.kind
    }

    /// How many times the network is asked.
    pub fn steps(&self) -> usize {
        self.timesteps.len()
    }
}

/// s' = shift * s / (1 + (shift - 1) * s).
pub fn shifted(sigma: f64, shift: f64) -> f64 {
    shift * sigma / (1.0 + (shift - 1.0) * sigma)
}

/// The grid before the shift, without the final 0, in float64.
fn base(kind: SolverKind, convention: Convention, steps: usize) -> Vec<f64> {
    let (first, last) = match (kind, convention) {
        (SolverKind::UniPc, Convention::Diffusers) => (1.0, 0.001),
        (SolverKind::UniPc, Convention::Official) | (SolverKind::DpmPp2m, Convention::Diffusers) => {
            (OFFICIAL_FIRST, 0.0)
        }
        (SolverKind::DpmPp2m, Convention::Official) | (SolverKind::Euler | SolverKind::Lcm, _) => (1.0, 0.0),
    };
    spaced(first, last, steps + 1).take(steps).collect()
}

/// `count` evenly spaced values from `first` to `last`.
fn spaced(first: f64, last: f64, count: usize) -> impl Iterator<Item = f64> {
    let step = if count > 1 { (last - first) / (count - 1) as f64 } else { 0.0 };
    (0..count).map(move |i| first + i as f64 * step)
}

/// Euler's grid, whose timesteps are exact. The references shift the official one in float32 and diffusers' own in
/// float64; done alike, the timesteps agree to the bit.
fn euler(convention: Convention, steps: usize, shift: f64) -> Schedule {
    let narrow = shift as f32;
    let shifted_f32 = |s: f32| narrow * s / (1.0 + (narrow - 1.0) * s);
    let mut sigmas: Vec<f32> = match convention {
        Convention::Official => {
            base(SolverKind::Euler, convention, steps).into_iter().map(|s| shifted_f32(s as f32)).collect()
        }
        // Evenly spaced down to the smallest sigma of the shifted training grid, so that the shift counts twice.
        Convention::Diffusers => {
            let last = f64::from(shifted_f32(0.001)) * TRAIN_STEPS;
            spaced(TRAIN_STEPS, last, steps).map(|t| shifted(t / TRAIN_STEPS, shift) as f32).collect()
        }
    };
    let timesteps = sigmas.iter().map(|s| s * TRAIN_STEPS as f32).collect();
    sigmas.push(0.0);
    Schedule { kind: SolverKind::Euler, sigmas, timesteps }
}
