//! What the error of a sample counts for, by its sigma.

use serde::{Deserialize, Serialize};

use crate::solver::shifted;

/// The weight of a sample's error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weighting {
    /// 1 at every noise level.
    None,
    /// DiffSynth-Studio's bell, diffsynth/schedulers/flow_match.py `set_training_weight`.
    Bsmntw,
    /// The bell without a grid: `exp(-2 (sigma - 1/2)^2)` less its smallest value, with mean 1 over uniform sigmas.
    Bell,
    /// The bell, at its peak from sigma 1/2 down: `flowmatch_weighted2` of ai-toolkit.
    HalfBell,
    /// `1 / sigma^2`, in spite of its name.
    SigmaSqrt,
    /// `2 / (pi (1 - 2 sigma + 2 sigma^2))`, of the SD3 paper.
    Cosmap,
    /// `sigma`, as OneTrainer has it.
    Sigma,
    /// min-SNR of the error of the clean latents, for a network that predicts velocities: `min((1 - sigma)^2, gamma sigma^2)`.
    MinSnrVelocity,
    /// min-SNR of diffusion models that predict v: `min(snr, gamma) / (snr + 1)` with `snr = ((1 - sigma) / sigma)^2`.
    MinSnrVpred,
}

/// The smallest sigma that [`Weighting::SigmaSqrt`] tells from 0, where it has no bound: the last of 1000 timesteps.
const LEAST: f64 = 1e-3;

impl Weighting {
    /// Whether it has a gamma.
    pub fn has_gamma(self) -> bool {
        matches!(self, Self::MinSnrVelocity | Self::MinSnrVpred)
    }

    /// The weight at `sigma`, in 0..1; `gamma` limits the signal-to-noise ratio of min-SNR.
    pub fn at(self, sigma: f64, gamma: f64) -> f64 {
        match self {
            Self::None => 1.0,
            Self::Bsmntw => bsmntw(sigma),
            Self::Bell => bell(sigma),
            Self::HalfBell => bell(sigma.max(0.5)),
            Self::SigmaSqrt => sigma.max(LEAST).powi(-2),
            Self::Cosmap => 2.0 / (std::f64::consts::PI * (1.0 - 2.0 * sigma + 2.0 * sigma * sigma)),
            Self::Sigma => sigma,
            Self::MinSnrVelocity => (1.0 - sigma).powi(2).min(gamma * sigma * sigma),
            Self::MinSnrVpred => {
                let (signal, noise) = ((1.0 - sigma).powi(2), sigma * sigma);
                // min(snr, gamma) / (snr + 1), times sigma^2 above and below: sigma may be 0.
                signal.min(gamma * noise) / (signal + noise)
            }
        }
    }
}

/// `exp(-2 (sigma - 1/2)^2)`.
fn hump(sigma: f64) -> f64 {
    (-2.0 * (sigma - 0.5).powi(2)).exp()
}

/// The mean of [`hump`] over 0..1, which is `sqrt(pi / 2) erf(1 / sqrt(2))`.
const MEAN: f64 = 0.855_624_391_892_148_7;

/// The hump less its value at both ends, with mean 1 over uniform sigmas.
fn bell(sigma: f64) -> f64 {
    let least = (-0.5f64).exp();
    (hump(sigma) - least) / (MEAN - least)
}

/// exp(-2 ((t - 500) / 1000)^2), less its smallest value, over the 1000 timesteps of the grid with shift 5, scaled so
/// that the grid's weights have mean 1.
pub fn bsmntw(sigma: f64) -> f64 {
    let grid = (0..1000).map(|i| hump(shifted(1.0 - f64::from(i) / 1000.0, 5.0)));
    let (least, sum) = grid.fold((f64::INFINITY, 0.0), |(least, sum), w| (least.min(w), sum + w));
    (hump(sigma) - least) / (sum / 1000.0 - least)
}
