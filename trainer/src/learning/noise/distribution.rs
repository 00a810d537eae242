//! The distributions of sigma: each is a map of a uniform number `u` or a normal number `n`.

use serde::{Deserialize, Serialize};
use special::{Beta as _, Error as _};

use crate::solver::shifted;

/// The distribution of sigma before its shift.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Distribution {
    /// `sigmoid(scale n)`, shifted: musubi-tuner's `shift`.
    Shift,
    /// Uniform in 0..1.
    Uniform,
    /// `sigmoid(scale n)`.
    Sigmoid,
    /// `sigmoid(mean + std n)`.
    LogitNormal,
    /// `1 - u - scale (cos^2(pi u / 2) - 1 + u)`: SD3's mode sampling with heavy tails.
    Mode,
    /// `sigmoid(-(mean + std n) / 2)`: a normal logarithm of the signal-to-noise ratio (arXiv 2411.14793).
    Logsnr,
    /// The beta distribution of `alpha` and `beta`.
    Beta,
    /// `1 - u^3`, mostly noise: ai-toolkit's `content`.
    Content,
    /// `u^3`, mostly signal: ai-toolkit's `style`.
    Style,
    /// `sigmoid(scale n)`, shifted by what FLUX derives from a clip's size.
    FluxShift,
    /// The same with the line that ai-toolkit has for FLUX.
    #[serde(rename = "flux-shift-ai-toolkit")]
    FluxShiftAiToolkit,
    /// The same as Qwen-Image derives it.
    QwenShift,
}

impl Distribution {
    /// Its name in a recipe.
    pub fn name(self) -> &'static str {
        match self {
            Self::Shift => "shift",
            Self::Uniform => "uniform",
            Self::Sigmoid => "sigmoid",
            Self::LogitNormal => "logit-normal",
            Self::Mode => "mode",
            Self::Logsnr => "logsnr",
            Self::Beta => "beta",
            Self::Content => "content",
            Self::Style => "style",
            Self::FluxShift => "flux-shift",
            Self::FluxShiftAiToolkit => "flux-shift-ai-toolkit",
            Self::QwenShift => "qwen-shift",
        }
    }

    /// The logarithm of the shift for latents of `tokens` tokens a frame, where it depends on them: musubi-tuner and
    /// diffusion-pipe count `(h / 2) (w / 2)` of a latent of h x w, and no frames.
    pub fn log_shift(self, tokens: usize) -> Option<f64> {
        let line = |[x1, y1]: [f64; 2], [x2, y2]: [f64; 2]| y1 + (y2 - y1) * (tokens as f64 - x1) / (x2 - x1);
        match self {
            Self::FluxShift => Some(line([256.0, 0.5], [4096.0, 1.15])),
            Self::FluxShiftAiToolkit => Some(line([256.0, 0.5], [4096.0, 1.16])),
            Self::QwenShift => Some(line([256.0, 0.5], [8192.0, 0.9])),
            _ => None,
        }
    }
}

/// A distribution with its numbers, before its shift.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs, reason = "the fields are those of `TimestepConfig`")]
pub enum Draw {
    /// `u`.
    Uniform,
    /// `sigmoid(mean + std n)`.
    Sigmoid { mean: f64, std: f64 },
    /// `1 - u - scale (cos^2(pi u / 2) - 1 + u)`.
    Mode { scale: f64 },
    /// `sigmoid(-(mean + std n) / 2)`.
    Logsnr { mean: f64, std: f64 },
    /// The inverse of the distribution function at `u`.
    Beta { alpha: f64, beta: f64 },
    /// `1 - u^3`.
    Content,
    /// `u^3`.
    Style,
}

/// The number that a [`Draw`] maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// Uniform in 0..1.
    Uniform,
    /// Of the standard normal distribution.
    Normal,
}

impl Draw {
    /// What it maps.
    pub fn input(self) -> Input {
        match self {
            Self::Sigmoid { .. } | Self::Logsnr { .. } => Input::Normal,
            _ => Input::Uniform,
        }
    }

    /// Sigma of the number `x`, uniform or normal as [`Self::input`] says.
    pub fn sigma(self, x: f64) -> f64 {
        match self {
            Self::Uniform => x,
            Self::Sigmoid { mean, std } => sigmoid(mean + std * x),
            Self::Mode { scale } => {
                let cos = (std::f64::consts::FRAC_PI_2 * x).cos();
                1.0 - x - scale * (cos * cos - 1.0 + x)
            }
            Self::Logsnr { mean, std } => sigmoid(-(mean + std * x) / 2.0),
            Self::Beta { alpha, beta } => x.inv_inc_beta(alpha, beta, alpha.ln_beta(beta)),
            Self::Content => 1.0 - x.powi(3),
            Self::Style => x.powi(3),
        }
    }

    /// Whether sigma falls while the number that is mapped rises.
    fn falls(self) -> bool {
        matches!(self, Self::Mode { .. } | Self::Logsnr { .. } | Self::Content)
    }

    /// The sigma below which the part `share` of all draws is.
    pub fn quantile(self, share: f64) -> f64 {
        let u = if self.falls() { 1.0 - share } else { share };
        match self.input() {
            Input::Uniform => self.sigma(u),
            Input::Normal => self.sigma(normal_quantile(u)),
        }
    }

    /// The probability of a sigma below `sigma`.
    pub fn below(self, sigma: f64) -> f64 {
        let logit = || (sigma / (1.0 - sigma)).ln();
        match self {
            Self::Uniform => sigma,
            Self::Sigmoid { mean, std } => normal_below((logit() - mean) / std),
            Self::Mode { .. } => {
                // Sigma falls in u all the way, so halving finds it.
                let halve = |(low, high): (f64, f64), _| match self.sigma((low + high) / 2.0) > sigma {
                    true => ((low + high) / 2.0, high),
                    false => (low, (low + high) / 2.0),
                };
                1.0 - (0..HALVINGS).fold((0.0, 1.0), halve).1
            }
            Self::Logsnr { mean, std } => normal_below((2.0 * logit() + mean) / std),
            Self::Beta { alpha, beta } => sigma.inc_beta(alpha, beta, alpha.ln_beta(beta)),
            Self::Content => 1.0 - (1.0 - sigma).cbrt(),
            Self::Style => sigma.cbrt(),
        }
    }
}

/// Halvings of 0..1 to the last bit of a number in it.
const HALVINGS: usize = 53;

/// What becomes of a drawn sigma before it is shifted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Grid {
    /// Nothing.
    #[default]
    None,
    /// It is an index into 1000 timesteps that descend, so that large draws are little noise: `1 - floor(1000 f) / 1000`, as
    /// musubi-tuner's `weighting_scheme` has it.
    Descending,
    /// The row below it of a table of 10000 quantiles from 0.0001 to 0.9999, as diffusion-pipe has it.
    Quantiles,
}

/// Timesteps of [`Grid::Descending`].
const TIMESTEPS: f64 = 1000.0;
/// Rows of [`Grid::Quantiles`].
pub const ROWS: usize = 10_000;
/// The first of its quantiles; the last one is as far from 1.
const FIRST: f64 = 1e-4;

/// `1 - floor(1000 f) / 1000`, at most the last index.
pub fn descending(f: f64) -> f64 {
    1.0 - (f * TIMESTEPS).floor().min(TIMESTEPS - 1.0) / TIMESTEPS
}

/// The sigma of row `row` of the table of `draw`.
pub fn row(draw: Draw, row: usize) -> f64 {
    draw.quantile(FIRST + (1.0 - 2.0 * FIRST) * row as f64 / (ROWS - 1) as f64)
}

/// The row that `u` in 0..1 falls on, of the `count` rows of a table; the product is in f32, as it is there.
pub fn row_of(u: f64, count: usize) -> usize {
    ((u as f32 * count as f32) as usize).min(count - 1)
}

/// `1 / (1 + e^-x)`.
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// The number below which the part `share` of the standard normal distribution is.
pub fn normal_quantile(share: f64) -> f64 {
    std::f64::consts::SQRT_2 * (2.0 * share - 1.0).inv_error()
}

/// The standard normal distribution function, within 1.5e-7. Source: Abramowitz and Stegun, 7.1.26.
fn normal_below(z: f64) -> f64 {
    let x = z.abs() / std::f64::consts::SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * x);
    let factors = [1.061_405_429, -1.453_152_027, 1.421_413_741, -0.284_496_736, 0.254_829_592];
    let tail = factors.iter().fold(0.0, |sum, factor| (sum + factor) * t) * (-x * x).exp();
    if z > 0.0 { 1.0 - tail / 2.0 } else { tail / 2.0 }
}

/// The sigma that a shift by `shift` makes into `sigma`.
pub fn unshifted(sigma: f64, shift: f64) -> f64 {
    sigma / (shift - (shift - 1.0) * sigma)
}

/// `draw` of the stratum `index` of `count`: its share of all draws lies in `index / count .. (index + 1) / count` of what the
/// range `min ..= max` leaves, at `u` of it.
pub fn stratified(draw: Draw, shift: f64, [min, max]: [f64; 2], [index, count]: [usize; 2], u: f64) -> f64 {
    let [low, high] = [min, max].map(|sigma| draw.below(unshifted(sigma, shift)));
    let share = low + (high - low) * (index as f64 + u) / count as f64;
    // `below` of normal numbers is right to 1.5e-7 only.
    shifted(draw.quantile(share), shift).clamp(min, max)
}
