//! The optimiser: a rule, and its state of each trainable tensor, by name, on the device of its stage.

mod config;
mod host;
mod rule;
pub mod rules;

use std::collections::BTreeMap;

use kernels::optimiser::{State, square_sums};
use kernels::{DeviceLocation, Tensor};
use models::dit::Gradients;

pub use config::{OptimizerConfig, OptimizerKind};
pub use host::{adapter_file, on_host};
pub use rule::{AdamW, Globals, Rule, Saved, Step};

use crate::error::{Error, Result};
use crate::pipeline::{Pipeline, Stage};

/// A rule with its state of all trainable tensors of a network.
#[derive(Debug)]
pub struct Optimizer {
    rule: Rule,
    globals: Globals,
    states: BTreeMap<String, State>,
}

impl Optimizer {
    /// The state before the first step for every trainable tensor of the pipeline.
    ///
    /// # Errors
    /// When a device's memory runs out.
    pub fn new(pipeline: &Pipeline, rule: Rule) -> Result<Self> {
        Self::of(pipeline.stages(), rule)
    }

    /// The same for the trainable tensors of `stages`.
    ///
    /// # Errors
    /// When a device's memory runs out.
    pub fn of(stages: &[Stage], rule: Rule) -> Result<Self> {
        let mut states = BTreeMap::new();
        for stage in stages {
            for (name, parameter) in stage.adapters.parameters() {
                states.insert(name, rule.begin(&parameter)?);
            }
        }
        Ok(Self { rule, globals: rule.globals(), states })
    }

    /// The rule.
    pub fn rule(&self) -> Rule {
        self.rule
    }

    /// Its state for a checkpoint.
    pub fn saved(&self) -> Saved {
        let (rule, globals) = (self.rule.name().to_owned(), self.globals.clone());
        Saved { rule, globals, tensors: self.states.clone() }
    }

    /// The states, ordered by name.
    pub fn states(&self) -> &BTreeMap<String, State> {
        &self.states
    }

    /// Restores a saved state, each tensor on the device of the current one.
    ///
    /// # Errors
    /// If rule, names or shapes are not those of this run.
    pub fn restore(&mut self, saved: Saved) -> Result<()> {
        let is_like = |own: &State, saved: &State| {
            let (mine, theirs) = (own.slots.iter(), saved.slots.iter());
            own.parameter.dims() == saved.parameter.dims()
                && mine.map(Tensor::dims).eq(theirs.map(Tensor::dims))
        };
        let is_same = saved.rule == self.rule.name()
            && saved.globals.keys().eq(self.globals.keys())
            && self.states.len() == saved.tensors.len()
            && self.states.iter().zip(&saved.tensors).all(|((a, x), (b, y))| a == b && is_like(x, y));
        if !is_same {
            return Err(Error::ForeignCheckpoint);
        }
        for (state, saved) in self.states.values_mut().zip(saved.tensors.into_values()) {
            let device = state.parameter.device().clone();
            let slots = saved.slots.iter().zip(&state.slots);
            let slots = slots.map(|(slot, own)| slot.to_device(&device)?.to_dtype(own.dtype()));
            *state = State {
                parameter: saved.parameter.to_device(&device)?,
                slots: slots.collect::<kernels::Result<_>>()?,
            };
        }
        self.globals = saved.globals;
        Ok(())
    }

    /// One update of every tensor by its gradient: one asynchronous call for each device.
    ///
    /// # Errors
    /// A missing gradient, or a device that fails.
    pub fn update(&mut self, gradients: &Gradients, step: &Step) -> Result<()> {
        let mut by_device: Vec<(DeviceLocation, Vec<(&mut State, &Tensor)>)> = Vec::new();
        for (name, state) in &mut self.states {
            let gradient = found(gradients, name)?;
            let place = state.parameter.device().location();
            match by_device.iter_mut().find(|(device, _)| *device == place) {
                Some((_, items)) => items.push((state, gradient)),
                None => by_device.push((place, vec![(state, gradient)])),
            }
        }
        let mut by_device: Vec<_> = by_device.into_iter().map(|(_, items)| items).collect();
        self.rule.update(&mut by_device, &mut self.globals, step)
    }

    /// Gives the parameters to the stages' adapters.
    pub fn publish(&self, pipeline: &mut Pipeline) {
        self.publish_to(pipeline.stages_mut());
    }

    /// Hands the parameters to the adapters of `stages`.
    pub fn publish_to(&self, stages: &mut [Stage]) {
        let parameters = self.parameters();
        stages.iter_mut().for_each(|stage| stage.adapters.set_parameters(&parameters));
    }

    /// Gives the stages' adapters what is exported, for clips and held-out losses, where that is another tensor than the one
    /// that is trained.
    pub fn publish_exported(&self, pipeline: &mut Pipeline) {
        if self.rule.exports_another() {
            let exported =
                |(name, state): (&String, &State)| (name.clone(), self.rule.exported(state).clone());
            let exported: BTreeMap<String, Tensor> = self.states.iter().map(exported).collect();
            pipeline.stages_mut().iter_mut().for_each(|stage| stage.adapters.set_parameters(&exported));
        }
    }

    /// The parameters, by name.
    pub fn parameters(&self) -> BTreeMap<String, Tensor> {
        self.states.iter().map(|(name, state)| (name.clone(), state.parameter.clone())).collect()
    }
}

/// The norm of all gradients together; checks each of them. Waits for the devices, once each.
///
/// # Errors
/// If a trainable tensor has no gradient, or one that is not finite; by name.
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
    let summed = by_device.into_iter().map(|(_, names, tensors)| Ok((names, square_sums(&tensors)?)));
    let mut squares: BTreeMap<String, f64> = BTreeMap::new();
    // The work is queued on all devices before waiting for the first.
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

/// The factor that limits gradients of norm `norm` to `clip_norm` (0 for no limit).
pub fn clip_factor(norm: f64, clip_norm: f64) -> f64 {
    if clip_norm > 0.0 && norm > clip_norm { clip_norm / norm } else { 1.0 }
}
