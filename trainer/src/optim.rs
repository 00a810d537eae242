//! The optimiser: named AdamW states, one for each trainable tensor, on the device of its stage.

use std::collections::BTreeMap;
use std::thread;

use candle_core::{Device, DeviceLocation, Tensor};
use kernels::adamw::{self, State, Update};
use models::adapter::files::AdapterFile;
use models::dit::{Gradients, Linear};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::lr::LrSchedule;
use crate::pipeline::Pipeline;

/// AdamW and its learning rate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Peak learning rate. Default 1e-4.
    pub lr: f64,
    /// `constant`, `linear` or `cosine`. Default `constant`.
    pub schedule: LrSchedule,
    /// Steps over which the learning rate rises to its peak. Default 10.
    pub warmup: u64,
    /// Decay of the two moments. Default [0.9, 0.999].
    pub betas: [f64; 2],
    /// Added to the root of the second moment. Default 1e-8.
    pub eps: f64,
    /// Decoupled weight decay. Default 0.01.
    pub weight_decay: f64,
    /// Largest norm of all gradients together; longer ones are scaled down to it. 0 for none. Default 1.
    pub clip_norm: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            lr: 1e-4,
            schedule: LrSchedule::Constant,
            warmup: 10,
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.01,
            clip_norm: 1.0,
        }
    }
}

impl OptimizerConfig {
    /// Checks the values.
    ///
    /// # Errors
    /// Naming the key and what it must be.
    pub fn check(&self) -> Result<()> {
        let refuse = |key: &str, why: String| Err(Error::Setting { key: format!("optimizer.{key}"), why });
        let at_least_zero =
            [("weight_decay", self.weight_decay), ("eps", self.eps), ("clip_norm", self.clip_norm)];
        match at_least_zero.into_iter().find(|(_, v)| !v.is_finite() || *v < 0.0) {
            Some((key, value)) => refuse(key, format!("{value} is negative or no number")),
            None if !self.lr.is_finite() || self.lr <= 0.0 => {
                refuse("lr", format!("{} is not a positive number", self.lr))
            }
            None if self.betas.iter().any(|b| !(0.0..1.0).contains(b)) => {
                refuse("betas", format!("{:?}: both must be at least 0 and below 1", self.betas))
            }
            None => Ok(()),
        }
    }
}

/// The states of all trainable tensors, by name.
#[derive(Debug)]
pub struct Optimizer {
    states: BTreeMap<String, State>,
}

impl Optimizer {
    /// Moments of zero for every trainable tensor of the pipeline.
    pub fn new(pipeline: &Pipeline) -> Result<Self> {
        let mut states = BTreeMap::new();
        for stage in pipeline.stages() {
            for (name, parameter) in stage.adapters.parameters() {
                // Each in memory of its own: updates may be made in place.
                let (first, second) = (parameter.zeros_like()?, parameter.zeros_like()?);
                states.insert(name, State { parameter: parameter.copy()?, first, second });
            }
        }
        Ok(Self { states })
    }

    /// The states, ordered by name.
    pub fn states(&self) -> &BTreeMap<String, State> {
        &self.states
    }

    /// Puts saved states in place, each on the device where its fellow lies now.
    ///
    /// # Errors
    /// When the names or shapes are not those of this run.
    pub fn restore(&mut self, saved: BTreeMap<String, State>) -> Result<()> {
        let is_same = self.states.len() == saved.len()
            && self
                .states
                .iter()
                .zip(&saved)
                .all(|((a, x), (b, y))| a == b && x.parameter.dims() == y.parameter.dims());
        if !is_same {
            return Err(Error::ForeignCheckpoint);
        }
        for (name, saved) in saved {
            if let Some(state) = self.states.get_mut(&name) {
                let device = state.parameter.device().clone();
                let place = |t: &Tensor| t.to_device(&device);
                *state = State {
                    parameter: place(&saved.parameter)?,
                    first: place(&saved.first)?,
                    second: place(&saved.second)?,
                };
            }
        }
        Ok(())
    }

    /// One update of every tensor by its gradient times `factor`: one call for each device, which it does not wait for.
    pub fn update(&mut self, gradients: &Gradients, factor: f64, update: &Update) -> Result<()> {
        let mut by_device: Vec<(DeviceLocation, Vec<(&mut State, &Tensor)>)> = Vec::new();
        for (name, state) in &mut self.states {
            let gradient = found(gradients, name)?;
            let place = state.parameter.device().location();
            match by_device.iter_mut().find(|(device, _)| *device == place) {
                Some((_, items)) => items.push((state, gradient)),
                None => by_device.push((place, vec![(state, gradient)])),
            }
        }
        for (_, items) in &mut by_device {
            adamw::step_all(items, factor, update)?;
        }
        Ok(())
    }

    /// Hands the parameters to the stages' adapters.
    pub fn publish(&self, pipeline: &mut Pipeline) {
        let parameters = self.parameters();
        pipeline.stages_mut().iter_mut().for_each(|stage| stage.adapters.set_parameters(&parameters));
    }

    /// The parameters, by name.
    pub fn parameters(&self) -> BTreeMap<String, Tensor> {
        self.states.iter().map(|(name, state)| (name.clone(), state.parameter.clone())).collect()
    }
}

/// The norm of all gradients together, after a look at each. Waits for the devices, once each.
///
/// # Errors
/// A trainable tensor without a gradient, or with one that is not finite, by name.
pub fn checked_norm(gradients: &Gradients, names: impl Iterator<Item = impl AsRef<str>>) -> Result<f64> {
    let mut by_device: Vec<(DeviceLocation, Vec<String>, Vec<&Tensor>)> = Vec::new();
    for name in names {
        let name = name.as_ref().to_owned();
        let gradient = found(gradients, &name)?;
        let place = gradient.device().location();
        match by_device.iter_mut().find(|(device, ..)| *device == place) {
            Some((_, names, tensors)) => {
                names.push(name);
                tensors.push(gradient);
            }
            None => by_device.push((place, vec![name], vec![gradient])),
        }
    }
    let summed = by_device.into_iter().map(|(_, names, tensors)| Ok((names, adamw::square_sums(&tensors)?)));
    let mut squares: BTreeMap<String, f64> = BTreeMap::new();
    // All devices are asked before the first answer is waited for.
    for (names, sums) in summed.collect::<Result<Vec<_>>>()? {
        let values: Vec<f32> = sums.to_vec1()?;
        squares.extend(names.into_iter().zip(values.into_iter().map(f64::from)));
    }
    match squares.iter().find(|(_, square)| !square.is_finite()) {
        Some((name, _)) => Err(Error::NonFiniteGradient { name: name.clone() }),
        // Summed in the order of names, so that the sum does not depend on the split.
        None => Ok(squares.values().sum::<f64>().sqrt()),
    }
}

/// The gradient of the tensor `name`.
fn found<'a>(gradients: &'a Gradients, name: &str) -> Result<&'a Tensor> {
    gradients.get(name).ok_or_else(|| Error::MissingGradient { name: name.to_owned() })
}

/// What gradients of norm `norm` are multiplied by, so that none is longer than `clip_norm` (0 for no limit).
pub fn clip_factor(norm: f64, clip_norm: f64) -> f64 {
    if clip_norm > 0.0 && norm > clip_norm { clip_norm / norm } else { 1.0 }
}

/// Copies of `states` in host memory of their own, which no later update changes. Each device is read by a thread of its
/// own.
pub fn on_host(states: &BTreeMap<String, State>) -> Result<BTreeMap<String, State>> {
    let mut by_device: Vec<(DeviceLocation, Vec<(&String, &State)>)> = Vec::new();
    for (name, state) in states {
        let place = state.parameter.device().location();
        match by_device.iter_mut().find(|(device, _)| *device == place) {
            Some((_, own)) => own.push((name, state)),
            None => by_device.push((place, vec![(name, state)])),
        }
    }
    let copy = |(name, state): &(&String, &State)| -> Result<(String, State)> {
        let [parameter, first, second] = [&state.parameter, &state.first, &state.second].map(host_copy);
        Ok(((*name).clone(), State { parameter: parameter?, first: first?, second: second? }))
    };
    let copied: Vec<Result<Vec<(String, State)>>> = thread::scope(|scope| {
        let own = by_device.iter().map(|(_, own)| scope.spawn(|| own.iter().map(copy).collect()));
        let own: Vec<_> = own.collect();
        own.into_iter().map(|own| own.join().unwrap_or_else(|p| std::panic::resume_unwind(p))).collect()
    });
    Ok(copied.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
}

/// A copy of `tensor` in host memory that nothing else lies in.
fn host_copy(tensor: &Tensor) -> candle_core::Result<Tensor> {
    match tensor.device() {
        Device::Cpu => tensor.copy(),
        _ => tensor.to_device(&Device::Cpu),
    }
}

/// The adapters that `pipeline` trains as a file holds them. `states` are copies of theirs on the host, and the file shares
/// their memory.
pub fn adapter_file(pipeline: &Pipeline, states: &BTreeMap<String, State>) -> Result<AdapterFile> {
    let mut file = AdapterFile::default();
    for stage in pipeline.stages() {
        for (module, adapters) in stage.adapters.iter() {
            for adapter in adapters.iter().filter(|adapter| adapter.is_trainable()) {
                let change = match adapter.delta().wants_product() {
                    // What depends on the weight has to be told here, where the weight is.
                    true => {
                        let weight = stage.dit.linears().find(|linear| linear.name() == module);
                        let change = adapter.delta().to_change(weight.map(Linear::weight))?;
                        change.map(&mut |tensor| Ok(host_copy(tensor)?))?
                    }
                    false => {
                        let mut delta = adapter.delta().clone();
                        let own = |name: &str| states.get(&format!("{module}.{name}"));
                        delta.replace(|name| own(name).map(|state| state.parameter.clone()));
                        delta.to_change(None)?
                    }
                };
                file.modules.insert(module.to_owned(), change);
            }
        }
    }
    Ok(file)
}
