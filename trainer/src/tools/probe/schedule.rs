//! Learning rates of every schedule, with transformers' warm-up and torch's one-cycle.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::cases;
use crate::error::{Error, Result};
use crate::learning::lr::{Anneal, Curve, OneCycle, Phases, Rates, WarmUp};

/// What is wrong with a file of other keys.
const WHAT: &str = "the settings of schedules, `{\"params\": {...}}`";

/// A file of settings; of `lr_of_step` only the names are read.
#[derive(Debug, Deserialize)]
struct Cases {
    params: Params,
    lr_of_step: Option<Map<String, Value>>,
}

/// The settings that the schedules share, by the names that transformers and torch have for them.
#[derive(Debug, Clone, Deserialize, Serialize)]
struct Params {
    lr: f64,
    steps: u64,
    warmup: u64,
    floor: f64,
    cycles: u64,
    power: f64,
    lr_end: f64,
    timescale: u64,
    div_factor: f64,
    final_div_factor: f64,
    pct_start: f64,
    three_phase_pct_start: f64,
}

/// The schedules of a file that names none.
const NAMES: [&str; 15] = [
    "constant",
    "linear",
    "cosine",
    "cosine_floor",
    "cosine_restarts",
    "cosine_restarts_floor",
    "polynomial",
    "inverse_sqrt",
    "inverse_sqrt_timescale",
    "rex",
    "rex_floor",
    "linear_floor",
    "one_cycle_cos",
    "one_cycle_linear",
    "one_cycle_three_phase",
];

/// `{"params": ..., "lr_of_step": {NAME: [rate of each step]}}` of the settings in the file at `path`: of the schedules that it
/// names in `lr_of_step`, else of all. Steps count from 0, and a warm-up begins with the rate 0.
///
/// # Errors
/// A file that cannot be read, and a name that no schedule has.
pub fn rates(path: &Path) -> Result<Value> {
    let Cases { params, lr_of_step } = cases(path, WHAT)?;
    let names: Vec<String> = match &lr_of_step {
        Some(named) => named.keys().cloned().collect(),
        None => NAMES.map(str::to_owned).to_vec(),
    };
    let mut all = Map::new();
    for name in names {
        let curve = params.curve(&name).ok_or_else(|| Error::ProbeInput {
            path: path.to_owned(),
            why: format!("no schedule is called `{name}`; there are {}", NAMES.join(", ")),
        })?;
        let Params { lr: peak, steps, warmup, .. } = params;
        let rates = Rates { peak, steps, warmup: WarmUp::from_zero(warmup), curve };
        all.insert(name, (0..steps).map(|step| rates.at(step)).collect());
    }
    Ok(json!({ "params": params, "lr_of_step": all }))
}

impl Params {
    /// The curve called `name`.
    fn curve(&self, name: &str) -> Option<Curve> {
        let Self { floor, cycles, power, warmup, timescale, .. } = *self;
        let cycle = |rise, anneal, phases| {
            let start = self.div_factor.recip();
            Curve::OneCycle(OneCycle { start, floor: start / self.final_div_factor, rise, anneal, phases })
        };
        Some(match name {
            "constant" => Curve::Constant,
            "linear" => Curve::Linear { floor: 0.0 },
            "linear_floor" => Curve::Linear { floor },
            "cosine" => Curve::Cosine { floor: 0.0, cycles: 1 },
            "cosine_floor" => Curve::Cosine { floor, cycles: 1 },
            "cosine_restarts" => Curve::Cosine { floor: 0.0, cycles },
            "cosine_restarts_floor" => Curve::Cosine { floor, cycles },
            "polynomial" => Curve::Polynomial { floor: self.lr_end / self.lr, power },
            "inverse_sqrt" => Curve::InverseSqrt { timescale: if warmup > 0 { warmup } else { 10_000 } },
            "inverse_sqrt_timescale" => Curve::InverseSqrt { timescale },
            "rex" => Curve::Rex { floor: 0.0 },
            "rex_floor" => Curve::Rex { floor },
            "one_cycle_cos" => cycle(self.pct_start, Anneal::Cosine, Phases::Two),
            "one_cycle_linear" => cycle(self.pct_start, Anneal::Linear, Phases::Two),
            "one_cycle_three_phase" => cycle(self.three_phase_pct_start, Anneal::Cosine, Phases::Three),
            _ => return None,
        })
    }
}
