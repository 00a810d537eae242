//! A few steps of training on given noise, with given starting factors.

use std::collections::BTreeMap;
use std::path::Path;

use kernels::low_rank::Factors;
use kernels::{DType, Device, Tensor};
use models::adapter::{Adapter, Adapters};
use models::dit::config::PATCH;
use models::dit::{BlockPlan, Conditioning, DitConfig, Raw, Role};
use models::names;
use serde::Deserialize;

use super::{Inputs, Outputs};
use crate::error::{Error, Result};
use crate::learning::optim::{Optimizer, OptimizerConfig, Rule, Step, checked_norm};
use crate::pipeline::{MicroBatch, NetworkInput, Objective, Pipeline};

/// The contents of `--train-config`, as JSON. Other programs' files have more keys; those that are not used are reported.
#[derive(Debug, Clone, Deserialize)]
pub struct TrainProbe {
    /// Rank of the factors.
    pub rank: usize,
    /// The delta is scaled by alpha / rank.
    pub alpha: f64,
    /// Learning rate of every step.
    pub lr: f64,
    /// Decay of the two moments. Default [0.9, 0.999].
    #[serde(default = "default_betas")]
    pub betas: [f64; 2],
    /// Added to the root of the second moment. Default 1e-8.
    #[serde(default = "default_eps")]
    pub eps: f64,
    /// Decoupled weight decay. Default 0.01.
    #[serde(default = "default_weight_decay")]
    pub weight_decay: f64,
    /// Keys that are not used.
    #[serde(flatten)]
    pub unused: BTreeMap<String, serde_json::Value>,
}

fn default_betas() -> [f64; 2] {
    OptimizerConfig::default().betas()
}

fn default_eps() -> f64 {
    OptimizerConfig::default().eps
}

fn default_weight_decay() -> f64 {
    OptimizerConfig::default().weight_decay
}

impl TrainProbe {
    /// Reads the settings.
    ///
    /// # Errors
    /// A file that cannot be read, missing keys, and numbers that cannot work.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).map_err(|source| Error::Io {
            action: "read the settings",
            path: path.to_owned(),
            source,
        })?;
        let refuse = |why: String| Error::ProbeInput { path: path.to_owned(), why };
        let settings: Self = serde_json::from_slice(&text).map_err(|error| refuse(error.to_string()))?;
        if settings.rank == 0 || !settings.alpha.is_finite() {
            return Err(refuse("rank must be at least 1 and alpha a number".into()));
        }
        let Self { lr, betas, eps, weight_decay, .. } = settings;
        let betas = Some(betas);
        OptimizerConfig { lr, betas, eps, weight_decay, ..OptimizerConfig::default() }.check()?;
        Ok(settings)
    }

    fn rule(&self) -> Rule {
        let Self { betas, eps, weight_decay, .. } = *self;
        let betas = Some(betas);
        OptimizerConfig { betas, eps, weight_decay, ..OptimizerConfig::default() }.rule()
    }
}

/// The trainable factors `init.<module>.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank], under the official names of
/// modules or those of diffusers.
///
/// # Errors
/// Modules that the model does not have, half pairs, and shapes that fit neither module nor rank.
pub fn starting_adapters(inputs: &Inputs, dit: &DitConfig, settings: &TrainProbe) -> Result<Adapters> {
    let known = dit.adaptable_modules();
    let mut adapters = Adapters::default();
    let names = inputs.names().filter_map(|name| name.strip_prefix("init."));
    for name in names {
        let parts = name.strip_suffix(".lora_A.weight").or(name.strip_suffix(".lora_B.weight"));
        let found = parts.and_then(|given| {
            let official = official_name(given);
            Some((given, known.iter().find(|(known, ..)| *known == official)?))
        });
        let Some((given, (module, out, input))) = found else {
            let why =
                format!("`init.{name}` names no module of this model; modules are named like {}", known[0].0);
            return Err(inputs.refuse(format!("{why}, followed by .lora_A.weight or .lora_B.weight")));
        };
        if name.ends_with(".lora_B.weight") && !adapters.of(module).is_empty() {
            continue; // added with its A
        }
        let (a, b) = (format!("init.{given}.lora_A.weight"), format!("init.{given}.lora_B.weight"));
        let factor = |name: &str, shape: [usize; 2]| -> Result<Tensor> {
            let factor = inputs.float(name)?;
            match factor.dims() == shape {
                true => Ok(factor),
                false => Err(inputs.refuse(format!("`{name}` has shape {:?}, not {shape:?}", factor.dims()))),
            }
        };
        let (a, b) = (factor(&a, [settings.rank, *input])?, factor(&b, [*out, settings.rank])?);
        let scale = settings.alpha / settings.rank as f64;
        adapters.attach(module.clone(), Adapter::trainable(Factors { a, b, scale }));
    }
    match adapters.parameters().is_empty() {
        false => Ok(adapters),
        true => {
            Err(inputs.refuse("there is no init.<module>.lora_A.weight, so nothing would be trained".into()))
        }
    }
}

/// The official name of a module that is named officially or as in diffusers.
fn official_name(given: &str) -> String {
    let is_official = names::module_to_diffusers(given).is_some();
    let renamed = || names::module_from_diffusers(given);
    if is_official { given.to_owned() } else { renamed().unwrap_or_else(|| given.to_owned()) }
}

/// The names of `inputs` for tensors of adapters: official ones, or those of diffusers where its starting factors have these.
fn as_given(inputs: &Inputs, tensor: &str) -> String {
    let other = tensor.rfind(".lora_").and_then(|end| {
        let (module, end) = tensor.split_at(end);
        Some(format!("{}{end}", names::module_to_diffusers(module)?))
    });
    let is_there = |name: &String| inputs.names().any(|own| own.strip_prefix("init.") == Some(name));
    other.filter(is_there).unwrap_or_else(|| tensor.to_owned())
}

/// One AdamW step for each entry of `sigmas` `[steps]`, `[steps, b]` or, for each token, `[steps, b, l]`, on `x0`
/// [b, c, t, h, w] with `noise` [steps, b, c, t, h, w] and `context` [b, s, text_dim]. Tokens with a sigma of 0 are shown
/// clean. In place of sigmas, `timesteps` may hold a thousand times as much, in the same shapes. `cond` (or `y`)
/// [b, c', t, h, w] is concatenated after the noisy channels, `clip_fea` [b, s, width] is for the image branch, `ref_latent`,
/// `camera` and `vace_context` for control models; `loss_weight_mask`, which broadcasts over x0, weights the mean. Returns `losses` `[steps]`, `grad_norms` `[steps]`, `grad0.<tensor>` of the first step and
/// `final.<tensor>`; gradients are not clipped.
///
/// # Errors
/// If shapes do not match, or a gradient is missing or not finite.
pub fn train(pipeline: &mut Pipeline, inputs: &Inputs, settings: &TrainProbe) -> Result<Outputs> {
    let given = Given::read(inputs)?;
    let mut optimizer = Optimizer::new(pipeline, settings.rule())?;
    let plans = pipeline.layers().into_iter().map(|id| (id, BlockPlan::default())).collect();
    let (mut outputs, mut losses, mut norms) = (Outputs::new(), Vec::new(), Vec::new());
    for step in 0..given.sigmas.dim(0)? {
        let outcome = pipeline.train(&[given.micro_batch(step)?], &plans)?;
        losses.push(outcome.losses[0].to_dtype(DType::F32)?.to_scalar::<f32>()?);
        norms.push(checked_norm(&outcome.gradients, optimizer.states().keys())? as f32);
        if step == 0 {
            let first = outcome
                .gradients
                .iter()
                .map(|(name, g)| (format!("grad0.{}", as_given(inputs, name)), g.clone()));
            outputs.extend(first);
        }
        let step = Step { lr: settings.lr, factor: 1.0, number: step as u64 + 1 };
        optimizer.update(&outcome.gradients, &step)?;
        optimizer.publish(pipeline);
    }
    let last: BTreeMap<String, Tensor> = optimizer.parameters();
    let last = last.into_iter().map(|(name, x)| (format!("final.{}", as_given(inputs, &name)), x));
    outputs.extend(last);
    outputs.insert("losses".into(), Tensor::new(losses, &Device::Cpu)?);
    outputs.insert("grad_norms".into(), Tensor::new(norms, &Device::Cpu)?);
    Ok(outputs)
}

/// The tensors of a training probe, checked against each other.
struct Given {
    x0: Tensor,
    noise: Tensor,
    /// [steps, b, 1], or [steps, b, l] with one for each token.
    sigmas: Tensor,
    /// Text, and a picture where there is one.
    conditioning: Conditioning<Raw>,
    /// Channels after the noisy ones.
    cond: Option<Tensor>,
    mask: Option<Tensor>,
}

impl Given {
    fn read(inputs: &Inputs) -> Result<Self> {
        let (x0, noise) = (inputs.ranked("x0", 5)?, inputs.ranked("noise", 6)?);
        let conditioning = inputs.conditioning()?;
        let cond = match inputs.optional("cond")? {
            Some(cond) => Some(cond),
            None => inputs.optional("y")?,
        };
        let context = conditioning.require(Role::TEXT)?;
        let (batch, steps) = (x0.dim(0)?, noise.dim(0)?);
        let fits = |behind: &Tensor| {
            behind.rank() == 5 && behind.dim(0).ok() == Some(batch) && behind.dims()[2..] == x0.dims()[2..]
        };
        let is_cond_fit = cond.as_ref().is_none_or(fits);
        if &noise.dims()[1..] != x0.dims() || context.dim(0)? != batch || steps == 0 || !is_cond_fit {
            return Err(inputs.refuse(format!(
                "x0 {:?}, noise {:?}, context {:?} and cond {:?} do not fit: [b, c, t, h, w], [steps, b, c, t, h, w], \
                 [b, s, width] and [b, any, t, h, w] are expected",
                x0.dims(),
                noise.dims(),
                context.dims(),
                cond.as_ref().map(Tensor::dims)
            )));
        }
        let sigmas = Self::sigmas(inputs, &x0, steps)?;
        let mask = inputs.optional("loss_weight_mask")?;
        Ok(Self { x0, noise, sigmas, conditioning, cond, mask })
    }

    /// `sigmas`, or `timesteps` over 1000, as [steps, b, 1] or [steps, b, l].
    fn sigmas(inputs: &Inputs, x0: &Tensor, steps: usize) -> Result<Tensor> {
        let (batch, _, frames, height, width) = x0.dims5()?;
        let tokens = frames * (height / PATCH) * (width / PATCH);
        let (name, sigmas) = match inputs.optional("timesteps")? {
            Some(timesteps) => ("timesteps", (timesteps / 1000.0)?),
            None => ("sigmas", inputs.float("sigmas")?),
        };
        match sigmas.dims() {
            &[s] if s == steps => Ok(sigmas.reshape((steps, 1, 1))?.broadcast_as((steps, batch, 1))?),
            &[s, b] if (s, b) == (steps, batch) => Ok(sigmas.unsqueeze(2)?),
            &[s, b, l] if (s, b, l) == (steps, batch, tokens) => Ok(sigmas),
            shape => Err(inputs.refuse(format!(
                "`{name}` has shape {shape:?}: [{steps}], [{steps}, {batch}] or [{steps}, {batch}, {tokens}] is expected"
            ))),
        }
    }

    /// x = (1 - sigma) x0 + sigma noise, and the velocity noise - x0.
    fn micro_batch(&self, step: usize) -> Result<MicroBatch> {
        let (noise, sigmas) = (self.noise.get(step)?, self.sigmas.get(step)?.contiguous()?);
        let (batch, count) = sigmas.dims2()?;
        let spread = match count {
            1 => sigmas.reshape((batch, 1, 1, 1, 1))?,
            _ => self.spread(&sigmas)?,
        };
        let noisy = (self.x0.broadcast_mul(&spread.affine(-1.0, 1.0)?)? + noise.broadcast_mul(&spread)?)?;
        let timestep = (sigmas.to_dtype(DType::F64)? * 1000.0)?.to_dtype(DType::F32)?;
        let timestep = if count == 1 { timestep.squeeze(1)? } else { timestep };
        let input = NetworkInput {
            x_bcthw: match &self.cond {
                Some(cond) => Tensor::cat(&[&noisy, cond], 1)?,
                None => noisy,
            },
            cond: self.conditioning.clone().with(Role::TIMESTEP, timestep),
        };
        let target = (&noise - &self.x0)?;
        Ok(MicroBatch {
            input,
            target,
            weights: vec![1.0; batch],
            mask: self.mask.clone(),
            objective: Objective::default(),
            dropout: None,
        })
    }

    /// Sigmas [b, l] of tokens over the pixels of their patches: [b, 1, t, h, w].
    fn spread(&self, sigmas: &Tensor) -> Result<Tensor> {
        let (batch, _, frames, height, width) = self.x0.dims5()?;
        let grid = sigmas.reshape((batch * frames, height / PATCH, 1, width / PATCH, 1))?;
        let wide = grid.broadcast_as((batch * frames, height / PATCH, PATCH, width / PATCH, PATCH))?;
        Ok(wide.contiguous()?.reshape((batch, 1, frames, height, width))?)
    }
}
