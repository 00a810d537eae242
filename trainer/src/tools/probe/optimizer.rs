//! An optimiser's rule on parameters and gradients from a file.

use std::collections::BTreeMap;
use std::path::Path;

use kernels::Tensor;
use kernels::optimiser::State;
use serde::Deserialize;

use super::{Inputs, Outputs};
use crate::error::{Error, Result};
use crate::learning::optim::rules::adafactor::{Adafactor, Rate};
use crate::learning::optim::rules::came::Came;
use crate::learning::optim::rules::lion::Lion;
use crate::learning::optim::rules::muon::{Muon, MuonScale};
use crate::learning::optim::rules::prodigy::{Decay, Prodigy};
use crate::learning::optim::rules::schedule_free::ScheduleFree;
use crate::learning::optim::{AdamW, Items, Rule, Step};

/// A file of cases; other keys are for its reader.
#[derive(Debug, Deserialize)]
struct Cases {
    cases: BTreeMap<String, serde_json::Value>,
}

/// The settings of a case, by the names that the optimiser's own package has for them.
#[derive(Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
enum Settings {
    AdamW {
        lr: f64,
        betas: [f64; 2],
        eps: f64,
        weight_decay: f64,
    },
    AdamW8bit {
        lr: f64,
        betas: [f64; 2],
        eps: f64,
        weight_decay: f64,
    },
    Lion {
        lr: f64,
        betas: [f64; 2],
        weight_decay: f64,
    },
    Adafactor {
        lr: Option<f64>,
        eps: [f64; 2],
        clip_threshold: f64,
        decay_rate: f64,
        beta1: Option<f64>,
        weight_decay: f64,
        scale_parameter: bool,
        relative_step: bool,
        warmup_init: bool,
    },
    Prodigy {
        lr: f64,
        betas: [f64; 2],
        beta3: Option<f64>,
        eps: f64,
        weight_decay: f64,
        decouple: bool,
        use_bias_correction: bool,
        safeguard_warmup: bool,
        d0: f64,
        d_coef: f64,
        growth_rate: Option<f64>,
    },
    ScheduleFree {
        lr: f64,
        betas: [f64; 2],
        eps: f64,
        weight_decay: f64,
        warmup_steps: u64,
        r: f64,
        weight_lr_power: f64,
    },
    Muon {
        lr: f64,
        weight_decay: f64,
        momentum: f64,
        nesterov: bool,
        adjust_lr_fn: Option<String>,
    },
    #[serde(rename = "muon_bf16")]
    MuonBf16 {
        lr: f64,
        weight_decay: f64,
        momentum: f64,
        nesterov: bool,
        adjust_lr_fn: Option<String>,
    },
    Came {
        lr: f64,
        eps: [f64; 2],
        clip_threshold: f64,
        betas: [f64; 3],
        weight_decay: f64,
    },
}

/// A rule with the learning rate of its updates.
#[derive(Debug)]
pub struct Case {
    rule: Rule,
    lr: f64,
    /// Updates over which the rate rises evenly.
    warmup: u64,
    /// What ends the names of its inputs: `p0_8bit.N` and `grad_8bit.N` for moments in 8 bits.
    suffix: &'static str,
}

impl Case {
    /// The case `name` of the file at `path`.
    ///
    /// # Errors
    /// A file that cannot be read, a case that it does not have, and settings that its optimiser does not have.
    pub fn read(path: &Path, name: &str) -> Result<Self> {
        let refuse = |why: String| Error::ProbeInput { path: path.to_owned(), why };
        let io = |source| Error::Io { action: "read the cases", path: path.to_owned(), source };
        let text = std::fs::read(path).map_err(io)?;
        let Cases { mut cases } =
            serde_json::from_slice(&text).map_err(|error| refuse(format!("no file of cases: {error}")))?;
        let Some(case) = cases.remove(name) else {
            let names: Vec<&str> = cases.keys().map(String::as_str).collect();
            return Err(refuse(format!("there is no case `{name}`; it has {}", names.join(", "))));
        };
        let settings =
            serde_json::from_value(case).map_err(|error| refuse(format!("case `{name}`: {error}")))?;
        Self::of(settings).map_err(|why| refuse(format!("case `{name}`: {why}")))
    }

    fn of(settings: Settings) -> Result<Self, String> {
        let (lr, rule) = match settings {
            Settings::AdamW { lr, betas, eps, weight_decay } => {
                (lr, Rule::AdamW(AdamW { betas, eps, weight_decay }))
            }
            Settings::AdamW8bit { lr, betas, eps, weight_decay } => {
                (lr, Rule::AdamW8bit(AdamW { betas, eps, weight_decay }))
            }
            Settings::Lion { lr, betas, weight_decay } => (lr, Rule::Lion(Lion { betas, weight_decay })),
            settings @ Settings::Adafactor { .. } => return Self::adafactor(settings),
            settings @ Settings::Prodigy { .. } => return Self::prodigy(settings),
            Settings::ScheduleFree { lr, betas, eps, weight_decay, warmup_steps, r, weight_lr_power } => {
                let rule = Rule::ScheduleFree(ScheduleFree { betas, eps, weight_decay, r, weight_lr_power });
                return Ok(Self { rule, lr, warmup: warmup_steps, suffix: "" });
            }
            Settings::Muon { lr, weight_decay, momentum, nesterov, adjust_lr_fn }
            | Settings::MuonBf16 { lr, weight_decay, momentum, nesterov, adjust_lr_fn } => {
                let scale = match adjust_lr_fn.as_deref() {
                    None | Some("original") => MuonScale::Original,
                    Some("match_rms_adamw") => MuonScale::MatchAdamw,
                    Some("spectral_unclamped") => MuonScale::Spectral,
                    Some(other) => return Err(format!("adjust_lr_fn `{other}` is unknown")),
                };
                let (betas, eps) = ([0.9, 0.999], 1e-8);
                (lr, Rule::Muon(Muon { momentum, nesterov, scale, weight_decay, betas, eps }))
            }
            Settings::Came { lr, eps, clip_threshold, betas, weight_decay } => {
                (lr, Rule::Came(Came { betas, eps, clip_threshold, weight_decay }))
            }
        };
        let suffix = if matches!(rule, Rule::AdamW8bit(_)) { "_8bit" } else { "" };
        Ok(Self { rule, lr, warmup: 0, suffix })
    }

    fn adafactor(settings: Settings) -> Result<Self, String> {
        let Settings::Adafactor {
            lr,
            eps,
            clip_threshold,
            decay_rate,
            beta1,
            weight_decay,
            scale_parameter,
            relative_step,
            warmup_init,
        } = settings
        else {
            return Err("not of adafactor".to_owned());
        };
        let (rate, lr) = match (relative_step, warmup_init, lr) {
            (false, false, Some(lr)) => (Rate::OfTheRun, lr),
            (true, false, None) => (Rate::Relative, 0.0),
            (true, true, None) => (Rate::RelativeWithWarmup, 0.0),
            _ => {
                return Err(
                    "adafactor takes either an lr, or relative_step, with warmup_init or not".to_owned()
                );
            }
        };
        let rule = Adafactor { eps, clip_threshold, decay_rate, beta1, weight_decay, scale_parameter, rate };
        Ok(Self { rule: Rule::Adafactor(rule), lr, warmup: 0, suffix: "" })
    }

    fn prodigy(settings: Settings) -> Result<Self, String> {
        let Settings::Prodigy {
            lr,
            betas,
            beta3,
            eps,
            weight_decay,
            decouple,
            use_bias_correction,
            safeguard_warmup,
            d0,
            d_coef,
            growth_rate,
        } = settings
        else {
            return Err("not of prodigy".to_owned());
        };
        let rule = Prodigy {
            betas,
            beta3,
            eps,
            weight_decay,
            decay: if decouple { Decay::Decoupled } else { Decay::Coupled },
            bias_correction: use_bias_correction,
            safeguard_warmup,
            d0,
            d_coef,
            growth_rate: growth_rate.unwrap_or(f64::INFINITY),
        };
        Ok(Self { rule: Rule::Prodigy(rule), lr, warmup: 0, suffix: "" })
    }

    /// Updates `p0.N` by each of `grad.N` `[steps, ...]`: `p.N` `[steps, ...]` after every step, and `eval.N`, what would be
    /// exported then, where that is another tensor.
    ///
    /// # Errors
    /// Gradients that are missing or have another shape.
    pub fn run(&self, inputs: &Inputs) -> Result<Outputs> {
        let (begin, along) = (format!("p0{}.", self.suffix), format!("grad{}.", self.suffix));
        let names: Vec<String> =
            inputs.names().filter_map(|name| name.strip_prefix(&begin).map(str::to_owned)).collect();
        let mut states = Vec::new();
        let mut gradients = Vec::new();
        for name in &names {
            let parameter = inputs.float(&format!("{begin}{name}"))?;
            let gradient = inputs.float(&format!("{along}{name}"))?;
            if gradient.rank() == 0 || gradient.dims()[1..] != *parameter.dims() {
                let why = format!("{along}{name} has the shape {:?}", gradient.dims());
                return Err(inputs.refuse(format!("{why}, not [steps, ...] of {begin}{name}")));
            }
            states.push(self.rule.begin(&parameter)?);
            gradients.push(gradient);
        }
        let Some(steps) = gradients.iter().map(|gradient| gradient.dims()[0]).min() else {
            return Err(inputs.refuse(format!("there is no parameter {begin}N")));
        };
        let mut globals = self.rule.globals();
        let (mut parameters, mut exported) = (vec![Vec::new(); names.len()], vec![Vec::new(); names.len()]);
        for step in 0..steps {
            let now: Vec<Tensor> = gradients.iter().map(|g| g.get(step)).collect::<kernels::Result<_>>()?;
            let mut items = [Items { rate: 1.0, tensors: states.iter_mut().zip(&now).collect() }];
            self.rule.update(&mut items, &mut globals, &self.step(step as u64 + 1))?;
            let keep = |state: &State| (state.parameter.clone(), self.rule.exported(state).clone());
            for (i, (parameter, eval)) in states.iter().map(keep).enumerate() {
                parameters[i].push(parameter);
                exported[i].push(eval);
            }
        }
        let mut outputs = Outputs::new();
        for (name, (parameters, exported)) in names.iter().zip(parameters.iter().zip(&exported)) {
            outputs.insert(format!("p.{name}"), Tensor::stack(parameters, 0)?);
            if self.rule.exports_another() {
                outputs.insert(format!("eval.{name}"), Tensor::stack(exported, 0)?);
            }
        }
        Ok(outputs)
    }

    fn step(&self, number: u64) -> Step {
        let rise = if number < self.warmup { number as f64 / self.warmup as f64 } else { 1.0 };
        Step { lr: self.lr * rise, factor: 1.0, number }
    }
}
