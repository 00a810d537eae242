//! The noising of a training sample: which sigma, which noise, which weight. Pure functions of seed, step and slot.
//!
//! x_sigma = (1 - sigma) x0 + sigma noise; the network gets 1000 sigma as its timestep and predicts noise - x0.

use kernels::random::Key;
use models::expert::Expert;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::learning::NoiseRange;
use crate::solver::shifted;

/// How the noise level of a sample is drawn, and what its error counts for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TimestepConfig {
    /// `shift` (sigmoid of a normal number, then shifted), `uniform`, `sigmoid` or `logit-normal`. Default `shift`.
    pub distribution: Distribution,
    /// Shift applied to the drawn sigma, 1 for none. Default 3 with `shift`, else 1.
    pub shift: Option<f64>,
    /// Factor of the normal number, with `shift` and `sigmoid`. Default 1.
    pub scale: f64,
    /// Mean of the normal number, with `logit-normal`. Default 0.
    pub mean: f64,
    /// Deviation of the normal number, with `logit-normal`. Default 1.
    pub std: f64,
    /// Smallest sigma: lower draws are drawn again, which cuts the distribution and does not bend it. Default 0.
    pub min: f64,
    /// Largest sigma. Default 1.
    pub max: f64,
    /// `none` or `bsmntw`, a bell over the timesteps that leaves both ends out. Default `none`.
    pub weighting: Weighting,
}

/// The distribution of sigma before its shift.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Distribution {
    /// sigmoid(scale * normal), shifted: musubi-tuner's `shift`.
    Shift,
    /// Uniform in 0..1.
    Uniform,
    /// sigmoid(scale * normal).
    Sigmoid,
    /// sigmoid(mean + std * normal).
    LogitNormal,
}

/// The weight of a sample's error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weighting {
    /// 1 at every noise level.
    None,
    /// DiffSynth-Studio's bell, diffsynth/schedulers/flow_match.py `set_training_weight`.
    Bsmntw,
}

impl Default for TimestepConfig {
    fn default() -> Self {
        Self {
            distribution: Distribution::Shift,
            shift: None,
            scale: 1.0,
            mean: 0.0,
            std: 1.0,
            min: 0.0,
            max: 1.0,
            weighting: Weighting::None,
        }
    }
}

/// Draws before a range is considered empty.
const MAX_DRAWS: u64 = 100_000;

impl TimestepConfig {
    /// Checks the values, and that the distribution has mass in the range.
    ///
    /// # Errors
    /// Naming the key and what it must be.
    pub fn check(&self) -> Result<()> {
        let positive = [("shift", self.shift()), ("scale", self.scale), ("std", self.std)];
        if let Some((key, value)) = positive.into_iter().find(|(_, v)| !v.is_finite() || *v <= 0.0) {
            return Err(Error::Setting {
                key: format!("train.timesteps.{key}"),
                why: format!("{value} is not a positive number"),
            });
        }
        if !(0.0..1.0).contains(&self.min) || self.max > 1.0 || self.max <= self.min || !self.mean.is_finite()
        {
            return Err(Error::Setting {
                key: "train.timesteps.min / max".into(),
                why: format!("{} .. {} is not a range of sigmas within 0 .. 1", self.min, self.max),
            });
        }
        self.sigma(Key::new(0, "check", &[])).map(drop)
    }

    /// The shift, settled.
    pub fn shift(&self) -> f64 {
        self.shift.unwrap_or(if self.distribution == Distribution::Shift { 3.0 } else { 1.0 })
    }

    /// The sigma of one sample, in min..max.
    ///
    /// # Errors
    /// When the distribution practically never falls into the range.
    pub fn sigma(&self, key: Key) -> Result<f64> {
        let drawn = (0..MAX_DRAWS).map(|draw| shifted(self.unshifted(key, draw), self.shift()));
        drawn.into_iter().find(|sigma| (self.min..=self.max).contains(sigma)).ok_or_else(|| Error::Setting {
            key: "train.timesteps.min / max".into(),
            why: format!(
                "this distribution practically never falls into {} .. {}; widen the range",
                self.min, self.max
            ),
        })
    }

    /// The same distribution, restricted to the noise levels of `range`.
    ///
    /// # Errors
    /// Where `min` and `max` leave none of them, or the distribution never falls there.
    pub fn within(&self, range: NoiseRange) -> Result<Self> {
        let [low, high] = range.sigmas();
        let cut = Self { min: self.min.max(low), max: self.max.min(high), ..self.clone() };
        match range.expert() {
            Some(expert) if cut.min >= cut.max => Err(Error::Setting {
                key: "train.timesteps.min / max".into(),
                why: format!(
                    "{} .. {} leaves no noise levels of the expert for {expert} noise, which has the sigmas {low:.3} .. {high:.3}; \
                     widen the range, or train the other expert",
                    self.min, self.max
                ),
            }),
            _ => cut.check().map(|()| cut),
        }
    }

    /// The probability of a sigma from `sigma` up: the part of the expert for high noise if the boundary is there.
    pub fn share_from(&self, sigma: f64) -> f64 {
        let sigma = sigma.clamp(self.min, self.max);
        let [before, at, end] = [self.min, sigma, self.max].map(|sigma| self.below(sigma));
        if end > before { ((end - at) / (end - before)).clamp(0.0, 1.0) } else { 0.0 }
    }

    /// The probability of a sigma below `sigma` before the cut.
    fn below(&self, sigma: f64) -> f64 {
        let shift = self.shift();
        let unshifted = sigma / (shift - (shift - 1.0) * sigma);
        let logit = (unshifted / (1.0 - unshifted)).ln();
        match self.distribution {
            Distribution::Uniform => unshifted,
            Distribution::Shift | Distribution::Sigmoid => normal_below(logit / self.scale),
            Distribution::LogitNormal => normal_below((logit - self.mean) / self.std),
        }
    }

    fn unshifted(&self, key: Key, draw: u64) -> f64 {
        // Each draw has a stream of its own: two uniform numbers make one normal number.
        let key = key.child("draw", draw);
        let sigmoid = |z: f64| 1.0 / (1.0 + (-z).exp());
        match self.distribution {
            Distribution::Uniform => key.uniform(0),
            Distribution::Shift | Distribution::Sigmoid => sigmoid(self.scale * f64::from(key.normals(1)[0])),
            Distribution::LogitNormal => sigmoid(self.mean + self.std * f64::from(key.normals(1)[0])),
        }
    }

    /// The weight of the error of a sample at `sigma`.
    pub fn weight(&self, sigma: f64) -> f64 {
        match self.weighting {
            Weighting::None => 1.0,
            Weighting::Bsmntw => bsmntw(sigma),
        }
    }
}

/// The standard normal distribution function, within 1.5e-7. Source: Abramowitz and Stegun, 7.1.26.
fn normal_below(z: f64) -> f64 {
    let x = z.abs() / std::f64::consts::SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * x);
    let factors = [1.061_405_429, -1.453_152_027, 1.421_413_741, -0.284_496_736, 0.254_829_592];
    let tail = factors.iter().fold(0.0, |sum, factor| (sum + factor) * t) * (-x * x).exp();
    if z > 0.0 { 1.0 - tail / 2.0 } else { tail / 2.0 }
}

/// exp(-2 ((t - 500) / 1000)^2), less its smallest value, over the 1000 timesteps of the grid with shift 5, scaled so
/// that the grid's weights have mean 1.
pub fn bsmntw(sigma: f64) -> f64 {
    let bell = |sigma: f64| (-2.0 * (sigma - 0.5).powi(2)).exp();
    let grid = (0..1000).map(|i| bell(shifted(1.0 - f64::from(i) / 1000.0, 5.0)));
    let (least, sum) = grid.fold((f64::INFINITY, 0.0), |(least, sum), w| (least.min(w), sum + w));
    (bell(sigma) - least) / (sum / 1000.0 - least)
}

/// The nine sigmas of the held-out loss.
pub const EVAL_SIGMAS: [f64; 9] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9];

/// The streams of random numbers of a training run, each a function of seed, step and slot.
///
/// A slot is the index of a sample in its step, counted over all micro-batches, so that the same samples get the same noise
/// for every split into micro-batches.
#[derive(Debug, Clone, Copy)]
pub struct Streams {
    seed: u64,
}

impl Streams {
    /// The streams of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// For the sigma of a sample.
    pub fn sigma(self, step: u64, slot: u64) -> Key {
        Key::new(self.seed, "sigma", &[step, slot])
    }

    /// For the noise of a sample.
    pub fn noise(self, step: u64, slot: u64) -> Key {
        Key::new(self.seed, "noise", &[step, slot])
    }

    /// The expert of a micro-batch, if the one for high noise gets the fraction `high` of them.
    pub fn expert(self, step: u64, micro_batch: u64, high: f64) -> Expert {
        let is_high = Key::new(self.seed, "expert", &[step, micro_batch]).uniform(0) < high;
        if is_high { Expert::High } else { Expert::Low }
    }

    /// For whether a sample's caption is dropped, and for which of its texts it gets.
    pub fn caption(self, step: u64, slot: u64) -> Key {
        Key::new(self.seed, "caption", &[step, slot])
    }

    /// For whether a sample gets its first frame clean, in models that take it in place.
    pub fn picture(self, step: u64, slot: u64) -> Key {
        Key::new(self.seed, "picture", &[step, slot])
    }

    /// For which conditions of a sample are left out: a number for each.
    pub fn conditions(self, step: u64, slot: u64) -> Key {
        Key::new(self.seed, "conditions", &[step, slot])
    }

    /// For the dropout of the adapters' input.
    pub fn dropout(self, step: u64, slot: u64) -> Key {
        Key::new(self.seed, "dropout", &[step, slot])
    }

    /// For the noise of a held-out item, the same at every evaluation.
    pub fn eval(self, item: u64, sigma: u64) -> Key {
        Key::new(self.seed, "eval", &[item, sigma])
    }
}
