//! Losses with masks and weights, and their gradients, on given tensors.

use std::path::Path;

use kernels::Tensor;
use kernels::loss::{Reduction, Terms, loss};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Inputs, Outputs, cases};
use crate::error::{Error, Result};
use crate::learning::loss::{CSchedule, LossConfig, LossKind, LossScale};
use crate::learning::mask;
use crate::learning::noise::Weighting;

/// What is wrong with a file of other keys.
const WHAT: &str = "settings of losses, `{\"params\": {...}, \"losses\": {\"LOSS.WEIGHTS.REDUCTION\": ...}}`";

/// A file of cases; of `losses` and `weights` the names are read.
#[derive(Debug, Deserialize)]
struct Cases {
    params: Params,
    losses: Map<String, Value>,
    #[serde(default)]
    sigmas: Vec<f64>,
    #[serde(default)]
    weights: Map<String, Value>,
    bell_index_table: Option<Indices>,
}

#[derive(Debug, Deserialize)]
struct Indices {
    index: Vec<f64>,
}

/// The settings that the cases share; other keys are for their reader.
#[derive(Debug, Deserialize)]
struct Params {
    outside: f64,
    huber_delta: f64,
    smooth_l1_beta: f64,
    pseudo_c: f64,
    kohya_c: f64,
    gamma: f64,
    /// Frames, height, width and cell of each mask.
    masks: Vec<[usize; 4]>,
}

/// What the cases of the file at `path` come to for `pred` and `target` [b, c, t, h, w], `sigma` `[b]` and `maskN.pixels`
/// [b, f, h, w] in 0..255, of which the first is that of the losses: in the form of the file, and `maskN.latent`, `weight_clamp`,
/// `weight_lerp` and `grad.LOSS.WEIGHTS.REDUCTION`.
///
/// # Errors
/// A file that cannot be read, a name that no loss has, and tensors that are missing.
pub fn run(path: &Path, inputs: &Inputs) -> Result<(Value, Outputs)> {
    let given: Cases = cases(path, WHAT)?;
    let refuse = |why: String| Error::ProbeInput { path: path.to_owned(), why };
    let (params, mut outputs) = (&given.params, Outputs::new());
    for (index, [.., cell]) in params.masks.iter().enumerate() {
        let pixels = (inputs.ranked(&format!("mask{index}.pixels"), 4)? / 255.0)?;
        outputs.insert(format!("mask{index}.latent"), mask::of_latents(&pixels, *cell)?);
    }
    let latent = outputs.get("mask0.latent").cloned().ok_or_else(|| refuse("no mask is named".to_owned()))?;
    let lerp = latent.affine(1.0 - params.outside, params.outside)?.unsqueeze(1)?;
    outputs.insert("weight_clamp".to_owned(), mask::weights(&latent, params.outside)?);
    outputs.insert("weight_lerp".to_owned(), lerp);
    let tensors = (inputs.ranked("pred", 5)?, inputs.ranked("target", 5)?);
    let sigmas: Vec<f32> = inputs.ranked("sigma", 1)?.to_vec1()?;
    let mut losses = Map::new();
    for name in given.losses.keys() {
        let (kind, tag) = name.split_once('.').unwrap_or((name, ""));
        let config = params.loss(kind).ok_or_else(|| refuse(format!("no loss is called `{kind}`")))?;
        let (weights, reduction) = match tag.split_once('.').unwrap_or((tag, "none")) {
            ("nomask", reduction) => (None, reduction),
            ("clamp", reduction) => (outputs.get("weight_clamp").cloned(), reduction),
            ("lerp", reduction) => (outputs.get("weight_lerp").cloned(), reduction),
            ("outside0", reduction) => (Some(mask::weights(&latent, 0.0)?), reduction),
            _ => return Err(refuse(format!("`{name}`: weights are nomask, clamp, lerp or outside0"))),
        };
        let reduction = reduced(reduction)
            .ok_or_else(|| refuse(format!("`{name}`: reductions are none, sample and batch")))?;
        let (value, gradient) = of(&config, &tensors, &sigmas, weights.as_ref(), reduction)?;
        losses.insert(name.clone(), value.into());
        outputs.insert(format!("grad.{name}"), gradient);
    }
    let mut weights = Map::new();
    for name in given.weights.keys() {
        let weight = params.weight(name).ok_or_else(|| refuse(format!("no weight is called `{name}`")))?;
        weights.insert(name.clone(), given.sigmas.iter().map(|sigma| weight(*sigma)).collect());
    }
    let mut object = json!({ "losses": losses, "sigmas": given.sigmas, "weights": weights });
    if let Some(Indices { index }) = given.bell_index_table {
        let of = |weighting: Weighting| -> Vec<f64> {
            index.iter().map(|index| weighting.at(1.0 - index / 1000.0, params.gamma)).collect()
        };
        let (bell, half) = (of(Weighting::Bell), of(Weighting::HalfBell));
        object["bell_index_table"] = json!({ "index": index, "bell": bell, "half_bell": half });
    }
    Ok((object, outputs))
}

fn reduced(name: &str) -> Option<Reduction> {
    Some(match name {
        "none" => Reduction::Elements,
        "sample" => Reduction::Samples,
        "batch" => Reduction::Batch,
        _ => return None,
    })
}

/// A loss and its gradient.
fn of(
    config: &LossConfig,
    (prediction, target): &(Tensor, Tensor),
    sigmas: &[f32],
    weights: Option<&Tensor>,
    reduction: Reduction,
) -> Result<(f64, Tensor)> {
    let each = |of: &dyn Fn(f64) -> f64| -> Result<Tensor> {
        let values: Vec<f32> = sigmas.iter().map(|sigma| of(f64::from(*sigma)) as f32).collect();
        Ok(Tensor::new(values, prediction.device())?)
    };
    let (samples, scale) = (each(&|sigma| config.factor_at(sigma))?, each(&|sigma| config.scale_at(sigma))?);
    let (penalty, counted) = (config.penalty(), None);
    let terms = Terms { penalty, scale: Some(&scale), samples: &samples, counted, weights, reduction };
    let loss = loss(prediction, target, &terms)?;
    Ok((f64::from(loss.value.to_scalar::<f32>()?), loss.d_prediction))
}

impl Params {
    /// The loss called `name`.
    fn loss(&self, name: &str) -> Option<LossConfig> {
        let of = |kind, c| LossConfig { kind, c: Some(c), ..LossConfig::default() };
        let plain = |kind| LossConfig { kind, ..LossConfig::default() };
        let kohya = |scale, schedule| LossConfig {
            scale: Some(scale),
            c_schedule: Some(schedule),
            ..of(LossKind::PseudoHuber, self.kohya_c)
        };
        Some(match name {
            "mse" => plain(LossKind::Mse),
            "l1" => plain(LossKind::L1),
            "huber" => of(LossKind::Huber, self.huber_delta),
            "smooth_l1" => of(LossKind::SmoothL1, self.smooth_l1_beta),
            "pseudo_huber" => of(LossKind::PseudoHuber, self.pseudo_c),
            "pseudo_huber_2c" => kohya(LossScale::TwoC, CSchedule::Constant),
            "pseudo_huber_2" => kohya(LossScale::Two, CSchedule::Constant),
            "pseudo_huber_2c_exponential" => kohya(LossScale::TwoC, CSchedule::Exponential),
            "pseudo_huber_2c_snr" => kohya(LossScale::TwoC, CSchedule::Snr),
            _ => return None,
        })
    }

    /// The weight by sigma, or the c by sigma, called `name`.
    fn weight(&self, name: &str) -> Option<Box<dyn Fn(f64) -> f64>> {
        let (gamma, c) = (self.gamma, self.kohya_c);
        let weight = |weighting: Weighting| -> Option<Box<dyn Fn(f64) -> f64>> {
            Some(Box::new(move |sigma| weighting.at(sigma, gamma)))
        };
        let of_c = |schedule: CSchedule| -> Option<Box<dyn Fn(f64) -> f64>> {
            Some(Box::new(move |sigma| schedule.at(c, sigma)))
        };
        match name {
            "sigma_sqrt" => weight(Weighting::SigmaSqrt),
            "cosmap" => weight(Weighting::Cosmap),
            "bell" => weight(Weighting::Bell),
            "half_bell" => weight(Weighting::HalfBell),
            "sigma" => weight(Weighting::Sigma),
            "min_snr_velocity" => weight(Weighting::MinSnrVelocity),
            "min_snr_vpred" => weight(Weighting::MinSnrVpred),
            "huber_c_exponential" => of_c(CSchedule::Exponential),
            "huber_c_snr" => of_c(CSchedule::Snr),
            "huber_c_snr_simpletuner" => of_c(CSchedule::SnrSimpletuner),
            _ => None,
        }
    }
}
