//! Noise levels of every distribution on given random numbers.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::cases;
use crate::error::{Error, Result};
use crate::learning::noise::distribution::{ROWS, descending, normal_quantile, row, row_of};
use crate::learning::noise::{Distribution, Draw, Input};
use crate::solver::shifted;

/// What is wrong with a file of other keys.
const WHAT: &str =
    "cases of noise levels, `{\"u\": [...], \"n\": [...], \"cases\": [{\"name\": ..., \"params\": {...}}]}`";

/// A file of cases: uniform numbers, normal numbers, and maps of them.
#[derive(Debug, Deserialize, Serialize)]
struct Cases {
    u: Vec<f64>,
    n: Vec<f64>,
    cases: Vec<Case>,
}

/// A map; `sigma` is what it gives.
#[derive(Debug, Deserialize, Serialize)]
struct Case {
    name: String,
    input: String,
    params: Params,
    #[serde(default)]
    sigma: Vec<f64>,
}

/// The settings of a map, by the names that its trainer has for them.
#[derive(Debug, Clone, Copy, Default, Deserialize, Serialize)]
#[serde(default)]
struct Params {
    #[serde(skip_serializing_if = "Option::is_none")]
    scale: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mean: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    std: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    alpha: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    beta: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    latent_h: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    latent_w: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mu: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    shift: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bins: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    min_t: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_t: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rows: Option<usize>,
}

/// The cases of the file at `path` with `sigma` as computed here. What is computed of a clip's size replaces what the file has:
/// `tokens`, `mu` and `shift`, and the `rows` of a table.
///
/// # Errors
/// A file that cannot be read, a name that no map has, and a setting that is missing.
pub fn sigmas(path: &Path) -> Result<Value> {
    let mut all: Cases = cases(path, WHAT)?;
    let refuse = |why: String| Error::ProbeInput { path: path.to_owned(), why };
    let (u, n) = (&all.u, &all.n);
    for case in &mut all.cases {
        let map = case.params.map(&case.name);
        let map = map.map_err(|why| refuse(format!("case `{}`: {why}", case.name)))?;
        let input = if map.input == Input::Normal { "n" } else { "u" };
        if case.input != input {
            return Err(refuse(format!("case `{}` maps {input}, not {}", case.name, case.input)));
        }
        let numbers = if map.input == Input::Normal { n } else { u };
        case.params = map.params;
        case.sigma = numbers.iter().enumerate().map(|(i, x)| (map.of)(i, *x)).collect();
    }
    serde_json::to_value(&all).map_err(|error| refuse(error.to_string()))
}

/// A map of numbers, each with its index.
struct Map {
    input: Input,
    params: Params,
    of: Box<dyn Fn(usize, f64) -> f64>,
}

fn needed<T>(value: Option<T>, key: &str) -> Result<T, String> {
    value.ok_or_else(|| format!("`{key}` is missing"))
}

impl Params {
    /// The map called `name`.
    fn map(self, name: &str) -> Result<Map, String> {
        let map = |input: Input, of: Box<dyn Fn(usize, f64) -> f64>| Ok(Map { input, params: self, of });
        let plain = |draw: Draw| map(draw.input(), Box::new(move |_, x| draw.sigma(x)));
        let logit = || {
            let (mean, std) = (needed(self.mean, "mean")?, needed(self.std, "std")?);
            Ok::<_, String>(Draw::Sigmoid { mean, std })
        };
        let mode = || Ok::<_, String>(Draw::Mode { scale: needed(self.scale, "scale")? });
        match name {
            "uniform" => plain(Draw::Uniform),
            "sigmoid" => plain(Draw::Sigmoid { mean: 0.0, std: needed(self.scale, "scale")? }),
            "logit_normal" => plain(logit()?),
            "logit_normal_u" => {
                let draw = logit()?;
                map(Input::Uniform, Box::new(move |_, u| draw.sigma(normal_quantile(u))))
            }
            "logit_normal_grid" => {
                let draw = logit()?;
                map(Input::Normal, Box::new(move |_, n| descending(draw.sigma(n))))
            }
            "mode" => plain(mode()?),
            "mode_grid" => {
                let draw = mode()?;
                map(Input::Uniform, Box::new(move |_, u| descending(draw.sigma(u))))
            }
            "shift" => {
                let draw = Draw::Sigmoid { mean: 0.0, std: needed(self.scale, "scale")? };
                let shift = needed(self.shift, "shift")?;
                map(Input::Normal, Box::new(move |_, n| shifted(draw.sigma(n), shift)))
            }
            "shift_uniform" => {
                let shift = needed(self.shift, "shift")?;
                map(Input::Uniform, Box::new(move |_, u| shifted(u, shift)))
            }
            "logsnr" => {
                plain(Draw::Logsnr { mean: needed(self.mean, "mean")?, std: needed(self.std, "std")? })
            }
            "beta" => plain(self.beta()?),
            // OneTrainer's closed form falls in u where alpha is 1.
            "beta_onetrainer" => {
                let draw = self.beta()?;
                map(Input::Uniform, Box::new(move |_, u| draw.sigma(1.0 - u)))
            }
            "flux_shift" | "flux_shift_aitoolkit" | "qwen_shift" => self.by_size(name),
            "content" => plain(Draw::Content),
            "style" => plain(Draw::Style),
            "stratified_uniform" => {
                let bins = needed(self.bins, "bins")?;
                map(
                    Input::Uniform,
                    Box::new(move |i, u| Draw::Uniform.quantile((i as f64 + u) / bins as f64)),
                )
            }
            "quantile_table" | "quantile_table_slice" => self.table(),
            _ => Err("no such distribution".to_owned()),
        }
    }

    fn beta(self) -> Result<Draw, String> {
        Ok(Draw::Beta { alpha: needed(self.alpha, "alpha")?, beta: needed(self.beta, "beta")? })
    }

    /// A shift by the size of the latents.
    fn by_size(self, name: &str) -> Result<Map, String> {
        let (height, width) = (needed(self.latent_h, "latent_h")?, needed(self.latent_w, "latent_w")?);
        let tokens = (height / 2) * (width / 2);
        let distribution = match name {
            "flux_shift" => Distribution::FluxShift,
            "flux_shift_aitoolkit" => Distribution::FluxShiftAiToolkit,
            _ => Distribution::QwenShift,
        };
        let mu = needed(distribution.log_shift(tokens), "shift by size")?;
        let shift = mu.exp();
        let params = Self { tokens: Some(tokens), mu: Some(mu), shift: Some(shift), ..self };
        let of = move |_, n| shifted(Draw::Sigmoid { mean: 0.0, std: 1.0 }.sigma(n), shift);
        Ok(Map { input: Input::Normal, params, of: Box::new(of) })
    }

    /// diffusion-pipe's table, cut to `min_t` and `max_t` where they are given.
    fn table(self) -> Result<Map, String> {
        let draw = Draw::Sigmoid { mean: 0.0, std: 1.0 };
        let table: Vec<f64> = (0..ROWS).map(|index| row(draw, index)).collect();
        let below = |sigma: f64| table.partition_point(|row| *row < sigma);
        let rows = self.min_t.map_or(0, below)..self.max_t.map_or(ROWS, below);
        if rows.is_empty() {
            return Err("no row lies in min_t .. max_t".to_owned());
        }
        let cut = table[rows].to_vec();
        let params = Self { rows: self.rows.map(|_| cut.len()), ..self };
        Ok(Map { input: Input::Uniform, params, of: Box::new(move |_, u| cut[row_of(u, cut.len())]) })
    }
}
