//! The noising of a training sample: which sigma, which noise, which weight. Pure functions of seed, step and slot.
//!
//! x_sigma = (1 - sigma) x0 + sigma noise; the network gets 1000 sigma as its timestep and predicts noise - x0.

pub mod distribution;
mod streams;
mod weighting;

use kernels::random::Key;
use serde::{Deserialize, Serialize};

pub use distribution::{Distribution, Draw, Grid, Input};
pub use streams::{EVAL_SIGMAS, Streams};
pub use weighting::{Weighting, bsmntw};

use crate::error::{Error, Result};
use crate::learning::NoiseRange;
use crate::solver::shifted;
use distribution::{ROWS, descending, row, row_of, unshifted};

/// How the noise level of a sample is drawn, and what its error counts for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TimestepConfig {
    /// `shift` (sigmoid of a normal number, then shifted), `uniform`, `sigmoid`, `logit-normal`, `mode`, `logsnr`, `beta`, `content`,
    /// `style`, `flux-shift`, `flux-shift-ai-toolkit` or `qwen-shift` (shifted by the size of the clip). Default `shift`.
    pub distribution: Distribution,
    /// Shift applied to the drawn sigma, 1 for none; not where the size of the clip decides it. Default 3 with `shift`, else 1.
    pub shift: Option<f64>,
    /// Factor of the normal number, above 0, with `shift`, `sigmoid` and the shifts by size; with `mode` the weight of both ends,
    /// -1 to 1.75. Default 1.
    pub scale: f64,
    /// Mean of the normal number, with `logit-normal` and `logsnr`. Default 0.
    pub mean: f64,
    /// Deviation of the normal number, with `logit-normal` and `logsnr`. Default 1.
    pub std: f64,
    /// The first number of `beta`, above 0: larger ones draw more noise. Default 2.
    pub alpha: Option<f64>,
    /// The second number of `beta`, above 0: larger ones draw less noise. Default 2.
    pub beta: Option<f64>,
    /// Whether the samples of a step have one draw each out of as many equal parts of the distribution. Default false.
    pub stratified: bool,
    /// What becomes of the drawn number before its shift: `none`, `descending` (it is an index into 1000 descending timesteps, as in
    /// musubi-tuner's `weighting_scheme`) or `quantiles` (diffusion-pipe's table of 10000). Default `none`.
    pub grid: Grid,
    /// Smallest sigma: lower draws are drawn again, which cuts the distribution and does not bend it. Default 0.
    pub min: f64,
    /// Largest sigma. Default 1.
    pub max: f64,
    /// What a sample's error counts for by its sigma: `none`, `bsmntw`, a bell over the timesteps that leaves both ends out, `bell`,
    /// `half-bell`, `sigma-sqrt`, `cosmap`, `sigma`, `min-snr-velocity` or `min-snr-vpred`. Default `none`.
    pub weighting: Weighting,
    /// Largest signal-to-noise ratio that counts, above 0, with the two `min-snr`. Default 5.
    pub gamma: Option<f64>,
}

impl Default for TimestepConfig {
    fn default() -> Self {
        Self {
            distribution: Distribution::Shift,
            shift: None,
            scale: 1.0,
            mean: 0.0,
            std: 1.0,
            alpha: None,
            beta: None,
            stratified: false,
            grid: Grid::None,
            min: 0.0,
            max: 1.0,
            weighting: Weighting::None,
            gamma: None,
        }
    }
}

/// The place of a sample among those of its step, for stratified draws.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Which of them it is.
    pub index: usize,
    /// How many there are.
    pub count: usize,
}

impl Place {
    /// A sample alone: the whole distribution is its part.
    pub const ALONE: Self = Self { index: 0, count: 1 };
}

/// Draws before a range is considered empty.
const MAX_DRAWS: u64 = 100_000;
/// The numbers that the distribution of SD3's mode sampling is monotone for, 2 / (pi - 2) at most.
const MODE_SCALES: [f64; 2] = [-1.0, 1.751_938_393_884_108_7];
/// Tokens of a frame of 832 x 480 pixels.
const COMMON_TOKENS: usize = 1560;

impl TimestepConfig {
    /// Checks the values, and that the distribution has mass in the range.
    ///
    /// # Errors
    /// Naming the key and what it must be.
    pub fn check(&self) -> Result<()> {
        let positive = [
            ("shift", Some(self.shift())),
            ("scale", (self.distribution != Distribution::Mode).then_some(self.scale)),
            ("std", Some(self.std)),
            ("alpha", self.alpha),
            ("beta", self.beta),
            ("gamma", self.gamma),
        ];
        let values = positive.into_iter().filter_map(|(key, value)| Some((key, value?)));
        if let Some((key, value)) = values.into_iter().find(|(_, v)| !v.is_finite() || *v <= 0.0) {
            return refuse(key, format!("{value} is not a positive number"));
        }
        if !(0.0..1.0).contains(&self.min) || self.max > 1.0 || self.max <= self.min || !self.mean.is_finite()
        {
            return refuse(
                "min / max",
                format!("{} .. {} is not a range of sigmas within 0 .. 1", self.min, self.max),
            );
        }
        self.check_keys()?;
        self.for_tokens(COMMON_TOKENS).sigma(Key::new(0, "check", &[])).map(drop)
    }

    /// Checks that every key belongs to the distribution and the weighting.
    fn check_keys(&self) -> Result<()> {
        let name = self.distribution.name();
        let [least, most] = MODE_SCALES;
        if self.distribution == Distribution::Mode && !(least..=most).contains(&self.scale) {
            return refuse("scale", format!("{} must be between -1 and 1.75 with mode", self.scale));
        }
        if self.distribution != Distribution::Beta && (self.alpha.is_some() || self.beta.is_some()) {
            let key = if self.alpha.is_some() { "alpha" } else { "beta" };
            return refuse(key, format!("{name} has no such setting, it is one of beta"));
        }
        if self.gamma.is_some() && !self.weighting.has_gamma() {
            let why = "is for weighting = \"min-snr-velocity\" or \"min-snr-vpred\": leave it out";
            return refuse("gamma", why.into());
        }
        if self.shift.is_some() && self.is_by_size() {
            return refuse("shift", format!("{name} derives it from the size of each clip: leave it out"));
        }
        if self.stratified && self.grid != Grid::None {
            return refuse("grid", "no grid can be drawn in equal parts: leave out it, or stratified".into());
        }
        Ok(())
    }

    /// Whether the shift depends on the size of the clip.
    pub fn is_by_size(&self) -> bool {
        self.distribution.log_shift(COMMON_TOKENS).is_some()
    }

    /// The same for clips of `tokens` tokens a frame, with the shift that they get.
    #[must_use]
    pub fn for_tokens(&self, tokens: usize) -> Self {
        match self.distribution.log_shift(tokens) {
            Some(log) => Self { distribution: Distribution::Shift, shift: Some(log.exp()), ..self.clone() },
            None => self.clone(),
        }
    }

    /// The shift, settled.
    pub fn shift(&self) -> f64 {
        self.shift.unwrap_or(if self.distribution == Distribution::Shift { 3.0 } else { 1.0 })
    }

    /// The distribution with its numbers, before its shift.
    pub fn draw(&self) -> Draw {
        let Self { scale, mean, std, .. } = *self;
        match self.distribution {
            Distribution::Uniform => Draw::Uniform,
            Distribution::Shift
            | Distribution::Sigmoid
            | Distribution::FluxShift
            | Distribution::FluxShiftAiToolkit
            | Distribution::QwenShift => Draw::Sigmoid { mean: 0.0, std: scale },
            Distribution::LogitNormal => Draw::Sigmoid { mean, std },
            Distribution::Mode => Draw::Mode { scale },
            Distribution::Logsnr => Draw::Logsnr { mean, std },
            Distribution::Beta => {
                Draw::Beta { alpha: self.alpha.unwrap_or(2.0), beta: self.beta.unwrap_or(2.0) }
            }
            Distribution::Content => Draw::Content,
            Distribution::Style => Draw::Style,
        }
    }

    /// The sigma of one sample, in min..max.
    ///
    /// # Errors
    /// When the distribution practically never falls into the range, and where it depends on the size of a clip
    /// ([`Self::for_tokens`]).
    pub fn sigma(&self, key: Key) -> Result<f64> {
        self.sigma_at(key, Place::ALONE)
    }

    /// The same of the sample at `place` in its step.
    ///
    /// # Errors
    /// As [`Self::sigma`].
    pub fn sigma_at(&self, key: Key, place: Place) -> Result<f64> {
        if self.is_by_size() {
            return Err(Error::Setting {
                key: "train.timesteps.distribution".into(),
                why: format!("{} needs the size of a clip", self.distribution.name()),
            });
        }
        let empty = || Error::Setting {
            key: "train.timesteps.min / max".into(),
            why: format!(
                "this distribution practically never falls into {} .. {}; widen the range",
                self.min, self.max
            ),
        };
        if self.stratified {
            let (range, place) = ([self.min, self.max], [place.index, place.count]);
            let u = key.child("draw", 0).uniform(0);
            let is_empty = self.below(self.max) - self.below(self.min) < 1.0 / MAX_DRAWS as f64;
            let sigma = || distribution::stratified(self.draw(), self.shift(), range, place, u);
            return if is_empty { Err(empty()) } else { Ok(sigma()) };
        }
        let drawn = (0..MAX_DRAWS).map(|draw| shifted(self.unshifted(key, draw), self.shift()));
        drawn.into_iter().find(|sigma| (self.min..=self.max).contains(sigma)).ok_or_else(empty)
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

    /// The probability of a sigma in each of `count` equal parts of 0..1.
    pub fn histogram(&self, count: usize) -> Vec<f64> {
        let from = |index: usize| match index {
            0 => 1.0,
            index if index == count => 0.0,
            index => self.share_from(index as f64 / count as f64),
        };
        (0..count).map(|index| from(index) - from(index + 1)).collect()
    }

    /// The probability of a sigma below `sigma` before the cut.
    fn below(&self, sigma: f64) -> f64 {
        let (draw, sigma) = (self.draw(), unshifted(sigma, self.shift()));
        match self.grid {
            Grid::None | Grid::Quantiles => draw.below(sigma),
            Grid::Descending => 1.0 - draw.below(1.0 - sigma),
        }
    }

    fn unshifted(&self, key: Key, draw: u64) -> f64 {
        // Each draw has a stream of its own: two uniform numbers make one normal number.
        let (key, distribution) = (key.child("draw", draw), self.draw());
        let drawn = || match distribution.input() {
            Input::Uniform => distribution.sigma(key.uniform(0)),
            Input::Normal => distribution.sigma(f64::from(key.normals(1)[0])),
        };
        match self.grid {
            Grid::None => drawn(),
            Grid::Descending => descending(drawn()),
            Grid::Quantiles => row(distribution, row_of(key.uniform(0), ROWS)),
        }
    }

    /// The weight of the error of a sample at `sigma`.
    pub fn weight(&self, sigma: f64) -> f64 {
        self.weighting.at(sigma, self.gamma.unwrap_or(5.0))
    }
}

fn refuse(key: &str, why: String) -> Result<()> {
    Err(Error::Setting { key: format!("train.timesteps.{key}"), why })
}
