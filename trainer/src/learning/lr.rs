//! The learning rate as a function of the step.
//!
//! A warm-up of `W` of the `N` updates comes first; behind it `x = (i - W) / (N - W)` is the position of update `i` (from 0). The
//! curves are those of transformers' `optimization.py`, OneTrainer's `lr_scheduler_util.py` (REX, floors) and torch's `OneCycleLR`.
//! Tandem's own warm-up is `(i + 1) / (W + 1)`, so that no update has the rate 0; transformers' is `i / W`.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The shape of the learning rate over a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LrSchedule {
    /// The same all along.
    Constant,
    /// Falls evenly to the floor.
    Linear,
    /// Falls along half a cosine to the floor, once or several times.
    Cosine,
    /// Falls to the floor as a power of what is left of the run.
    Polynomial,
    /// Falls as one over the root of the step, whatever the length of the run.
    InverseSqrt,
    /// Stays high for long and falls fast at the end (REX, arXiv 2107.04197).
    Rex,
    /// Rises to the peak and falls to nearly nothing (Smith and Topin 2017, arXiv 1708.07120).
    OneCycle,
}

impl LrSchedule {
    /// Its name in a recipe.
    pub fn name(self) -> &'static str {
        match self {
            Self::Constant => "constant",
            Self::Linear => "linear",
            Self::Cosine => "cosine",
            Self::Polynomial => "polynomial",
            Self::InverseSqrt => "inverse-sqrt",
            Self::Rex => "rex",
            Self::OneCycle => "one-cycle",
        }
    }

    /// Whether the rate of a step depends on the length of the run.
    pub fn depends_on_length(self) -> bool {
        !matches!(self, Self::Constant | Self::InverseSqrt)
    }
}

/// The numbers of a schedule and of its warm-up, each for the schedules that are named.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RateConfig {
    /// Smallest rate as a fraction of `optimizer.lr`, at least 0 and below 1, with `linear`, `cosine`, `polynomial`, `rex` and
    /// `one-cycle`. Default 0, with `one-cycle` 4e-6.
    pub floor: Option<f64>,
    /// How often the rate falls from its peak, with `cosine`: above 1 it restarts. Default 1.
    pub cycles: Option<u64>,
    /// Power of what is left of the run, above 0, with `polynomial`. Default 1.
    pub power: Option<f64>,
    /// Steps after which the rate has fallen by the root of 2, with `inverse-sqrt`. Default the warm-up, without one 10000.
    pub timescale: Option<u64>,
    /// Fraction of the run in which the rate rises, above 0 and below 1, with `one-cycle`. Default 0.3.
    pub rise: Option<f64>,
    /// First rate as a fraction of `optimizer.lr`, above 0 and at most 1, with `one-cycle`. Default 0.04.
    pub start: Option<f64>,
    /// Whether the rate follows cosines or lines, with `one-cycle`: `cosine` or `linear`. Default `cosine`.
    pub anneal: Option<Anneal>,
    /// 2, or 3 to fall back to the first rate as fast as it rose and then to the floor, with `one-cycle`. Default 2.
    pub phases: Option<u64>,
    /// Rate of the first step of the warm-up as a fraction of `optimizer.lr`, 0 to 1. Default 1 / (warm-up + 1), which leaves no
    /// step without a change; 0 is transformers' convention.
    pub warmup_start: Option<f64>,
    /// `linear`, or `constant`: all of the warm-up has the rate of its first step. Default `linear`.
    pub warmup_shape: Option<WarmUpShape>,
}

/// The lines between the ends of a phase of [`LrSchedule::OneCycle`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Anneal {
    /// Half a cosine.
    Cosine,
    /// A line.
    Linear,
}

/// How the rate goes from the first step of the warm-up to the peak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WarmUpShape {
    /// Along a line.
    Linear,
    /// At once, behind the warm-up.
    Constant,
}

/// A warm-up. Every rate is a fraction of the peak.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WarmUp {
    /// Updates before the peak.
    pub steps: u64,
    /// Rate of the first one; `None` is `1 / (steps + 1)`.
    pub start: Option<f64>,
    /// How it goes on.
    pub shape: WarmUpShape,
}

impl WarmUp {
    /// Tandem's own: `(i + 1) / (steps + 1)`.
    pub fn above_zero(steps: u64) -> Self {
        Self { steps, start: None, shape: WarmUpShape::Linear }
    }

    /// transformers': `i / steps`, so that the first update changes nothing.
    pub fn from_zero(steps: u64) -> Self {
        Self { steps, start: Some(0.0), shape: WarmUpShape::Linear }
    }

    /// The rate of update `step` of the warm-up to `peak`.
    fn at(self, peak: f64, step: u64) -> f64 {
        let Self { steps, start, shape } = self;
        match (start, shape) {
            // In this order: runs that are resumed keep the bits of their rates.
            (None, WarmUpShape::Linear) => peak * (step + 1) as f64 / (steps + 1) as f64,
            (Some(start), WarmUpShape::Linear) => {
                peak * (start + (1.0 - start) * (step as f64 / steps as f64))
            }
            (start, WarmUpShape::Constant) => peak * start.unwrap_or(1.0 / (steps + 1) as f64),
        }
    }
}

/// The rate behind the warm-up, as a fraction of the peak. `floor` is the smallest such fraction.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs, reason = "the fields are those of `RateConfig`")]
pub enum Curve {
    /// 1.
    Constant,
    /// `1 - x`.
    Linear { floor: f64 },
    /// `(1 + cos(pi (cycles x mod 1))) / 2`.
    Cosine { floor: f64, cycles: u64 },
    /// `(1 - x)^power`.
    Polynomial { floor: f64, power: f64 },
    /// `1 / sqrt((i + timescale - W) / timescale)`.
    InverseSqrt { timescale: u64 },
    /// `(1 - x) / (0.1 + 0.9 (1 - x))`.
    Rex { floor: f64 },
    /// torch's `OneCycleLR`, which has its warm-up in it.
    OneCycle(OneCycle),
}

/// The phases of [`Curve::OneCycle`]: fractions of the peak, and of the run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OneCycle {
    /// First rate.
    pub start: f64,
    /// Last rate.
    pub floor: f64,
    /// Part of the run in which it rises.
    pub rise: f64,
    /// The lines in between.
    pub anneal: Anneal,
    /// Whether it falls back to the first rate before it falls to the last one.
    pub phases: Phases,
}

/// The phases of a [`OneCycle`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phases {
    /// Up and down.
    Two,
    /// Up, down to the first rate in the same time, then to the last one.
    Three,
}

impl OneCycle {
    /// The ends of the phases as (last update, rate there).
    fn ends(self, steps: u64) -> [(f64, f64); 3] {
        let (steps, up) = (steps as f64, self.rise * steps as f64);
        let last = (steps - 1.0, self.floor);
        match self.phases {
            Phases::Two => [(up - 1.0, 1.0), last, last],
            Phases::Three => [(up - 1.0, 1.0), (2.0 * up - 2.0, self.start), last],
        }
    }

    fn at(self, step: u64, steps: u64) -> f64 {
        let (step, mut from) = (step as f64, (0.0, self.start));
        for to in self.ends(steps) {
            if step <= to.0 && to.0 > from.0 {
                let part = (step - from.0) / (to.0 - from.0);
                let left = match self.anneal {
                    Anneal::Cosine => 0.5 * (1.0 + (PI * part).cos()),
                    Anneal::Linear => 1.0 - part,
                };
                return to.1 + (from.1 - to.1) * left;
            }
            from = to;
        }
        self.floor
    }
}

/// The learning rates of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Peak rate.
    pub peak: f64,
    /// Updates of the run.
    pub steps: u64,
    /// What comes first.
    pub warmup: WarmUp,
    /// What follows.
    pub curve: Curve,
}

/// REX's d.
const REX: f64 = 0.9;

impl Rates {
    /// The rate of update `step` (from 0).
    pub fn at(&self, step: u64) -> f64 {
        let Self { peak, steps, warmup, curve } = *self;
        if step < warmup.steps && !matches!(curve, Curve::OneCycle(_)) {
            return warmup.at(peak, step);
        }
        let progress =
            (step - warmup.steps.min(step)) as f64 / steps.saturating_sub(warmup.steps).max(1) as f64;
        let left = 1.0 - progress.min(1.0);
        let above = |floor: f64, fraction: f64| floor + (1.0 - floor) * fraction;
        peak * match curve {
            Curve::Constant => 1.0,
            Curve::Linear { floor } => above(floor, left),
            Curve::Cosine { floor, .. } if progress >= 1.0 => floor,
            Curve::Cosine { floor, cycles } => {
                let cycle = (cycles as f64 * progress) % 1.0;
                above(floor, 0.5 * (1.0 + (PI * cycle).cos()))
            }
            Curve::Polynomial { floor, power } => above(floor, left.powf(power)),
            Curve::InverseSqrt { timescale } => {
                let (scale, behind) = (timescale as f64, (step - warmup.steps.min(step)) as f64);
                ((behind + scale) / scale).sqrt().recip()
            }
            Curve::Rex { floor } => above(floor, left / ((1.0 - REX) + REX * left)),
            Curve::OneCycle(cycle) => cycle.at(step, steps),
        }
    }
}

/// Steps of `timescale` where there is no warm-up to take them from.
const TIMESCALE: u64 = 10_000;

impl RateConfig {
    /// The curve of `schedule` behind `warmup` updates.
    pub fn curve(&self, schedule: LrSchedule, warmup: u64) -> Curve {
        let floor = self.floor.unwrap_or(0.0);
        match schedule {
            LrSchedule::Constant => Curve::Constant,
            LrSchedule::Linear => Curve::Linear { floor },
            LrSchedule::Cosine => Curve::Cosine { floor, cycles: self.cycles.unwrap_or(1) },
            LrSchedule::Polynomial => Curve::Polynomial { floor, power: self.power.unwrap_or(1.0) },
            LrSchedule::InverseSqrt => {
                let of_warmup = if warmup > 0 { warmup } else { TIMESCALE };
                Curve::InverseSqrt { timescale: self.timescale.unwrap_or(of_warmup) }
            }
            LrSchedule::Rex => Curve::Rex { floor },
            LrSchedule::OneCycle => Curve::OneCycle(OneCycle {
                start: self.start.unwrap_or(0.04),
                floor: self.floor.unwrap_or(4e-6),
                rise: self.rise.unwrap_or(0.3),
                anneal: self.anneal.unwrap_or(Anneal::Cosine),
                phases: if self.phases == Some(3) { Phases::Three } else { Phases::Two },
            }),
        }
    }

    /// The warm-up over `steps` updates.
    pub fn warmup(&self, steps: u64) -> WarmUp {
        let shape = self.warmup_shape.unwrap_or(WarmUpShape::Linear);
        WarmUp { steps, start: self.warmup_start, shape }
    }

    /// Checks the values, and that each belongs to `schedule`, which a warm-up of `warmup` updates comes before.
    ///
    /// # Errors
    /// Naming the key and what it must be.
    pub fn check(&self, schedule: LrSchedule, warmup: Option<u64>) -> Result<()> {
        use LrSchedule::{Cosine, InverseSqrt, Linear, OneCycle, Polynomial, Rex};
        let keys: [(&str, bool, &[LrSchedule]); 8] = [
            ("floor", self.floor.is_some(), &[Linear, Cosine, Polynomial, Rex, OneCycle]),
            ("cycles", self.cycles.is_some(), &[Cosine]),
            ("power", self.power.is_some(), &[Polynomial]),
            ("timescale", self.timescale.is_some(), &[InverseSqrt]),
            ("rise", self.rise.is_some(), &[OneCycle]),
            ("start", self.start.is_some(), &[OneCycle]),
            ("anneal", self.anneal.is_some(), &[OneCycle]),
            ("phases", self.phases.is_some(), &[OneCycle]),
        ];
        let is_foreign = |(_, is_set, of): &(&str, bool, &[LrSchedule])| *is_set && !of.contains(&schedule);
        if let Some((key, _, of)) = keys.into_iter().find(is_foreign) {
            let of: Vec<&str> = of.iter().map(|schedule| schedule.name()).collect();
            return refuse(
                key,
                format!("{} has no such setting, it is one of {}", schedule.name(), of.join(", ")),
            );
        }
        self.check_values()?;
        let has_warmup_keys = self.warmup_start.is_some() || self.warmup_shape.is_some();
        let key = if self.warmup_start.is_some() { "warmup_start" } else { "warmup_shape" };
        match (schedule, warmup) {
            (OneCycle, Some(1..)) => Err(Error::Setting {
                key: "optimizer.warmup".into(),
                why: "one-cycle begins with a rise of its own (optimizer.rate.rise): leave out the warm-up"
                    .into(),
            }),
            (OneCycle, _) | (_, Some(0)) if has_warmup_keys => {
                refuse(key, "there is no warm-up that it could be for".into())
            }
            _ => Ok(()),
        }
    }

    fn check_values(&self) -> Result<()> {
        for (key, value) in [("floor", self.floor), ("rise", self.rise)] {
            if let Some(value) = value.filter(|value| !(0.0..1.0).contains(value)) {
                return refuse(key, format!("{value} must be at least 0 and below 1"));
            }
        }
        for (key, value) in [("start", self.start), ("warmup_start", self.warmup_start)] {
            if let Some(value) = value.filter(|value| !(0.0..=1.0).contains(value)) {
                return refuse(key, format!("{value} must be between 0 and 1"));
            }
        }
        for (key, value) in [("power", self.power), ("rise", self.rise), ("start", self.start)] {
            if let Some(value) = value.filter(|value| !value.is_finite() || *value <= 0.0) {
                return refuse(key, format!("{value} must be above 0"));
            }
        }
        for (key, value) in [("cycles", self.cycles), ("timescale", self.timescale)] {
            if value == Some(0) {
                return refuse(key, "must be at least 1".into());
            }
        }
        match self.phases {
            None | Some(2 | 3) => Ok(()),
            Some(other) => refuse("phases", format!("{other} must be 2 or 3")),
        }
    }
}

impl Rates {
    /// What there is to note of a warm-up that is longer than the run.
    pub fn note(&self) -> Option<String> {
        let Self { steps, warmup: WarmUp { steps: warmup, .. }, .. } = *self;
        (warmup > steps).then(|| {
            format!(
                "optimizer.warmup = {warmup} is longer than the run of {steps} steps: the rate ends at {:.2e} and does not come to \
                 {:.2e}",
                self.at(steps.saturating_sub(1)),
                self.peak
            )
        })
    }

    /// Checks that the run is long enough for every phase of its schedule.
    ///
    /// # Errors
    /// A run that is too short.
    pub fn check(&self) -> Result<()> {
        let steps = self.steps;
        let Curve::OneCycle(cycle) = self.curve else { return Ok(()) };
        let [(up, _), (down, _), (last, _)] = cycle.ends(steps);
        let is_short = match cycle.phases {
            Phases::Two => up <= 0.0 || up >= last,
            Phases::Three => up <= 0.0 || down >= last,
        };
        match is_short {
            true => refuse(
                "rise",
                format!("{} of {steps} steps leave no room for every phase of one-cycle", cycle.rise),
            ),
            false => Ok(()),
        }
    }
}

fn refuse(key: &str, why: String) -> Result<()> {
    Err(Error::Setting { key: format!("optimizer.rate.{key}"), why })
}
