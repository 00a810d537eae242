//! The `[optimizer]` section of a recipe.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::rule::{AdamW, Rule};
use super::rules::adafactor::{Adafactor, Rate};
use super::rules::came::Came;
use super::rules::lion::Lion;
use super::rules::muon::{Muon, MuonScale};
use super::rules::prodigy::{Decay, Prodigy};
use super::rules::schedule_free::ScheduleFree;
use crate::error::{Error, Result};
use crate::learning::ema::EmaConfig;
use crate::learning::lr::{LrSchedule, RateConfig, Rates};

/// The optimiser and its learning rate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// `adamw`, `adamw-8bit`, `lion`, `adafactor`, `schedule-free`, `prodigy`, `came` or `muon`. Default `adamw`.
    pub kind: OptimizerKind,
    /// Peak learning rate; with `prodigy` the factor of the rate that it finds, usually 1. Default 1e-4.
    pub lr: f64,
    /// `constant`, `linear`, `cosine`, `polynomial`, `inverse-sqrt`, `rex` or `one-cycle`. Default `constant`.
    pub schedule: LrSchedule,
    /// Steps over which the learning rate rises to its peak, at most those of the run. Default 10; `one-cycle` has none.
    pub warmup: Option<u64>,
    /// The numbers of the schedule.
    pub rate: RateConfig,
    /// Decay of the two moments, each at least 0 and below 1; not with `adafactor`. Default [0.9, 0.999], with `lion`
    /// [0.9, 0.99].
    pub betas: Option<[f64; 2]>,
    /// Added to the root of the second moment; not used by `lion`, `adafactor` and `came`. Default 1e-8.
    pub eps: f64,
    /// Decoupled weight decay. Default 0.01.
    pub weight_decay: f64,
    /// Largest norm of all gradients together; larger ones are scaled down to it (gradient clipping). 0 for none. Default 1.
    pub clip_norm: f64,
    /// Decay of the momentum, at least 0 and below 1: of `muon`, default 0.95, and of `adafactor`, which by default has none.
    pub momentum: Option<f64>,
    /// With `adafactor`: whether the rate of a tensor is multiplied by the root mean square of its numbers. Default false.
    pub scale_parameter: Option<bool>,
    /// With `adafactor`: whether it sets the rate itself, min(1e-2, 1 / sqrt(step)), in place of `lr`. Default false.
    pub relative_step: Option<bool>,
    /// With `prodigy`: the first estimate of the rate, above 0. Default 1e-6.
    pub d0: Option<f64>,
    /// With `prodigy`: factor of its estimates of the rate, above 0. Default 1.
    pub d_coef: Option<f64>,
    /// With `prodigy`: largest factor by which the estimate grows in a step, above 1. Default none.
    pub growth_rate: Option<f64>,
    /// With `prodigy`: whether the moments are corrected for their start at zero. Default false.
    pub bias_correction: Option<bool>,
    /// With `prodigy`: whether the estimate allows for a warm-up of the rate. Default false.
    pub safeguard_warmup: Option<bool>,
    /// With `came`: decay of its confidence, at least 0 and below 1. Default 0.9999.
    pub beta3: Option<f64>,
    /// With `muon`: whether its step looks ahead by the gradient. Default true.
    pub nesterov: Option<bool>,
    /// With `muon`: factor of the rate by the shape of a matrix: `original`, `match-adamw` (rates that fit AdamW) or `spectral`.
    /// Default `original`.
    pub muon_scale: Option<MuonScale>,
    /// Learning rate of the matrices B of LoRA and DoRA over that of the matrices A (LoRA+, arXiv 2402.12354), above 0. Default 1.
    pub lr_b_ratio: Option<f64>,
    /// Learning rates of modules by pattern, as in `adapter.targets`, in place of `lr`: `{ "ffn.*" = 5e-5 }`. Default none.
    pub lr_by_module: BTreeMap<String, f64>,
    /// Learning rate of the expert for high noise, in place of `lr`, where it is trained. Default none.
    pub lr_high: Option<f64>,
    /// Learning rate of the expert for low noise. Default none.
    pub lr_low: Option<f64>,
    /// Largest Frobenius norm of the change of a module's weight: after each step, LoRAs whose change is larger are scaled down to
    /// it (sd-scripts' `scale_weight_norms`), above 0. Default none.
    pub norm_limit: Option<f64>,
}

/// An optimiser by the name that a recipe has for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum OptimizerKind {
    /// Adam with decoupled weight decay.
    #[serde(rename = "adamw")]
    AdamW,
    /// The same with its moments in 8 bits, in blocks of 256.
    #[serde(rename = "adamw-8bit")]
    AdamW8bit,
    /// The sign of a momentum.
    #[serde(rename = "lion")]
    Lion,
    /// A second moment of rows and columns.
    #[serde(rename = "adafactor")]
    Adafactor,
    /// AdamW with an average in place of a schedule.
    #[serde(rename = "schedule-free")]
    ScheduleFree,
    /// AdamW that finds its learning rate.
    #[serde(rename = "prodigy")]
    Prodigy,
    /// Adafactor with a first moment and its confidence.
    #[serde(rename = "came")]
    Came,
    /// A momentum made orthogonal; AdamW for what is not a matrix.
    #[serde(rename = "muon")]
    Muon,
}

impl fmt::Display for OptimizerKind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::AdamW => "adamw",
            Self::AdamW8bit => "adamw-8bit",
            Self::Lion => "lion",
            Self::Adafactor => "adafactor",
            Self::ScheduleFree => "schedule-free",
            Self::Prodigy => "prodigy",
            Self::Came => "came",
            Self::Muon => "muon",
        })
    }
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            kind: OptimizerKind::AdamW,
            lr: 1e-4,
            schedule: LrSchedule::Constant,
            warmup: None,
            rate: RateConfig::default(),
            betas: None,
            eps: 1e-8,
            weight_decay: 0.01,
            clip_norm: 1.0,
            momentum: None,
            scale_parameter: None,
            relative_step: None,
            d0: None,
            d_coef: None,
            growth_rate: None,
            bias_correction: None,
            safeguard_warmup: None,
            beta3: None,
            nesterov: None,
            muon_scale: None,
            lr_b_ratio: None,
            lr_by_module: BTreeMap::new(),
            lr_high: None,
            lr_low: None,
            norm_limit: None,
        }
    }
}

/// Steps of the warm-up where nothing else is said.
const WARMUP: u64 = 10;
/// Prodigy multiplies the rate that it finds by `lr`: one below this was meant for another optimiser.
const LEAST_PRODIGY_LR: f64 = 1e-2;

impl OptimizerConfig {
    /// The decay of the two moments, settled.
    pub fn betas(&self) -> [f64; 2] {
        self.betas.unwrap_or(match self.kind {
            OptimizerKind::Lion => [0.9, 0.99],
            _ => [0.9, 0.999],
        })
    }

    /// Steps of the warm-up, settled.
    pub fn warmup(&self) -> u64 {
        self.warmup.unwrap_or(if self.schedule == LrSchedule::OneCycle { 0 } else { WARMUP })
    }

    /// The learning rates of a run of `steps` updates.
    pub fn rates(&self, steps: u64) -> Rates {
        let warmup = self.warmup();
        let curve = self.rate.curve(self.schedule, warmup);
        Rates { peak: self.lr, steps, warmup: self.rate.warmup(warmup), curve }
    }

    /// The same with its betas and its warm-up written out.
    #[must_use]
    pub fn settled(self) -> Self {
        Self { betas: Some(self.betas()), warmup: Some(self.warmup()), ..self }
    }

    /// The rule with its settings.
    pub fn rule(&self) -> Rule {
        let Self { eps, weight_decay, momentum, .. } = *self;
        let betas = self.betas();
        let adamw = AdamW { betas, eps, weight_decay };
        match self.kind {
            OptimizerKind::AdamW => Rule::AdamW(adamw),
            OptimizerKind::AdamW8bit => Rule::AdamW8bit(adamw),
            OptimizerKind::Lion => Rule::Lion(Lion { betas, weight_decay }),
            OptimizerKind::Adafactor => Rule::Adafactor(Adafactor {
                eps: [1e-30, 1e-3],
                clip_threshold: 1.0,
                decay_rate: -0.8,
                beta1: momentum,
                weight_decay,
                scale_parameter: self.scale_parameter.unwrap_or(false),
                rate: if self.relative_step == Some(true) { Rate::Relative } else { Rate::OfTheRun },
            }),
            OptimizerKind::ScheduleFree => {
                Rule::ScheduleFree(ScheduleFree { betas, eps, weight_decay, r: 0.0, weight_lr_power: 2.0 })
            }
            OptimizerKind::Prodigy => Rule::Prodigy(Prodigy {
                betas,
                beta3: None,
                eps,
                weight_decay,
                decay: Decay::Decoupled,
                bias_correction: self.bias_correction.unwrap_or(false),
                safeguard_warmup: self.safeguard_warmup.unwrap_or(false),
                d0: self.d0.unwrap_or(1e-6),
                d_coef: self.d_coef.unwrap_or(1.0),
                growth_rate: self.growth_rate.unwrap_or(f64::INFINITY),
            }),
            OptimizerKind::Came => Rule::Came(Came {
                betas: [betas[0], betas[1], self.beta3.unwrap_or(0.9999)],
                eps: [1e-30, 1e-16],
                clip_threshold: 1.0,
                weight_decay,
            }),
            OptimizerKind::Muon => Rule::Muon(Muon {
                momentum: momentum.unwrap_or(0.95),
                nesterov: self.nesterov.unwrap_or(true),
                scale: self.muon_scale.unwrap_or(MuonScale::Original),
                weight_decay,
                betas,
                eps,
            }),
        }
    }

    /// Checks the values.
    ///
    /// # Errors
    /// Naming the key and what it must be.
    pub fn check(&self) -> Result<()> {
        let at_least_zero =
            [("weight_decay", self.weight_decay), ("eps", self.eps), ("clip_norm", self.clip_norm)];
        if let Some((key, value)) = at_least_zero.into_iter().find(|(_, v)| !v.is_finite() || *v < 0.0) {
            return refuse(key, format!("{value} is negative or not a number"));
        }
        if !self.lr.is_finite() || self.lr <= 0.0 {
            return refuse("lr", format!("{} is not a positive number", self.lr));
        }
        if self.betas().iter().any(|b| !(0.0..1.0).contains(b)) {
            return refuse("betas", format!("{:?}: both must be at least 0 and below 1", self.betas()));
        }
        for (key, value) in [("momentum", self.momentum), ("beta3", self.beta3)] {
            if let Some(value) = value.filter(|value| !(0.0..1.0).contains(value)) {
                return refuse(key, format!("{value} must be at least 0 and below 1"));
            }
        }
        for (key, value, least) in
            [("d0", self.d0, 0.0), ("d_coef", self.d_coef, 0.0), ("growth_rate", self.growth_rate, 1.0)]
        {
            if let Some(value) = value.filter(|value| !value.is_finite() || *value <= least) {
                return refuse(key, format!("{value} must be above {least}"));
            }
        }
        let of_modules = self.lr_by_module.values().map(|lr| ("lr_by_module", Some(*lr)));
        let of_others = [
            ("lr_b_ratio", self.lr_b_ratio),
            ("lr_high", self.lr_high),
            ("lr_low", self.lr_low),
            ("norm_limit", self.norm_limit),
        ];
        for (key, value) in of_others.into_iter().chain(of_modules) {
            if let Some(value) = value.filter(|value| !value.is_finite() || *value <= 0.0) {
                return refuse(key, format!("{value} must be a positive number"));
            }
        }
        self.rate.check(self.schedule, self.warmup)?;
        self.check_kind()
    }

    /// Checks that it may be averaged as `ema` asks.
    ///
    /// # Errors
    /// An average of what is an average.
    pub fn check_average(&self, ema: &EmaConfig) -> Result<()> {
        match self.kind {
            OptimizerKind::ScheduleFree if ema.is_kept() => Err(Error::Setting {
                key: "train.ema.decay".into(),
                why: "schedule-free keeps an average of its own: leave out one of the two".into(),
            }),
            _ => Ok(()),
        }
    }

    /// Checks that every key belongs to the optimiser.
    fn check_kind(&self) -> Result<()> {
        use OptimizerKind::{Adafactor, Came, Muon, Prodigy, ScheduleFree};
        let keys: [(&str, bool, &[OptimizerKind]); 11] = [
            ("momentum", self.momentum.is_some(), &[Adafactor, Muon]),
            ("scale_parameter", self.scale_parameter.is_some(), &[Adafactor]),
            ("relative_step", self.relative_step.is_some(), &[Adafactor]),
            ("d0", self.d0.is_some(), &[Prodigy]),
            ("d_coef", self.d_coef.is_some(), &[Prodigy]),
            ("growth_rate", self.growth_rate.is_some(), &[Prodigy]),
            ("bias_correction", self.bias_correction.is_some(), &[Prodigy]),
            ("safeguard_warmup", self.safeguard_warmup.is_some(), &[Prodigy]),
            ("beta3", self.beta3.is_some(), &[Came]),
            ("nesterov", self.nesterov.is_some(), &[Muon]),
            ("muon_scale", self.muon_scale.is_some(), &[Muon]),
        ];
        let kind = self.kind;
        if let Some((key, _, of)) = keys.into_iter().find(|(_, is_set, of)| *is_set && !of.contains(&kind)) {
            let of: Vec<String> = of.iter().map(OptimizerKind::to_string).collect();
            return refuse(key, format!("{kind} has no such setting, it is one of {}", of.join(" and ")));
        }
        match kind {
            Prodigy if self.has_groups() => refuse(
                self.first_group(),
                "prodigy finds one rate for all tensors: leave it out, or use another optimiser".into(),
            ),
            Adafactor if self.relative_step == Some(true) && self.has_groups() => refuse(
                self.first_group(),
                "adafactor sets the rate itself with relative_step: leave out one of the two".into(),
            ),
            ScheduleFree if self.norm_limit.is_some() => refuse(
                "norm_limit",
                "schedule-free exports an average, which this would not limit: leave it out".into(),
            ),
            ScheduleFree if self.schedule != LrSchedule::Constant => {
                refuse("schedule", "schedule-free needs `constant`: its average replaces a schedule".into())
            }
            Adafactor if self.relative_step == Some(true) && self.schedule != LrSchedule::Constant => refuse(
                "schedule",
                "adafactor sets the rate itself with relative_step: leave out one of the two".into(),
            ),
            Adafactor if self.relative_step == Some(true) && self.warmup.is_some_and(|warmup| warmup > 0) => {
                refuse(
                    "warmup",
                    "adafactor sets the rate itself with relative_step: leave out one of the two".into(),
                )
            }
            Prodigy if self.lr < LEAST_PRODIGY_LR => refuse(
                "lr",
                format!(
                    "prodigy multiplies the rate that it finds by this, and {} is tiny: write lr = 1",
                    self.lr
                ),
            ),
            _ => Ok(()),
        }
    }
}

fn refuse(key: &str, why: String) -> Result<()> {
    Err(Error::Setting { key: format!("optimizer.{key}"), why })
}
