//! The optimiser: a rule, and its state of each trainable tensor, by name, on the device of its stage.

mod config;
mod groups;
mod host;
mod norm_limit;
mod rule;
pub mod rules;

use std::collections::BTreeMap;

use kernels::optimiser::{State, square_sums};
use kernels::{DeviceLocation, Tensor};
use models::dit::Gradients;

pub use config::{OptimizerConfig, OptimizerKind};
pub use host::{adapter_file, on_host};
pub use norm_limit::NormLimit;
pub use rule::{AdamW, Average, Globals, Items, Rule, Saved, Step};

use crate::error::{Error, Result};
use crate::learning::ema::{self, EmaConfig};
use crate::pipeline::{Pipeline, Stage};

/// A rule with its state of all trainable tensors of a network.
#[derive(Debug)]
pub struct Optimizer {
    rule: Rule,
    globals: Globals,
    states: BTreeMap<String, State>,
    /// The average of the parameters, the last slot of each state, where one is kept.
    ema: EmaConfig,
    /// What the learning rate of a tensor is multiplied by, of those that have another one than the run.
    rates: BTreeMap<String, f64>,
    limit: Option<NormLimit>,
    /// What the product of the factors of each module is multiplied by.
    scales: BTreeMap<String, f64>,
}

/// Which tensor of a state is used.
#[derive(Debug, Clone, Copy)]
pub struct Shown {
    rule: Rule,
    average: Average,
}

impl Shown {
    /// The tensor of `state` that is used.
    pub fn of(self, state: &State) -> &Tensor {
        match (self.average, state.slots.last()) {
            (Average::Kept, Some(average)) => average,
            _ => self.rule.exported(state),
        }
    }

    /// What files hold of an optimiser of `rule`.
    pub fn in_files(rule: Rule, ema: &EmaConfig) -> Self {
        let average = if ema.is_kept() && ema.files { Average::Kept } else { Average::None };
        Self { rule, average }
    }

    /// What clips and held-out losses are made with.
    pub fn in_clips(rule: Rule, ema: &EmaConfig) -> Self {
        let average = if ema.is_kept() && ema.clips { Average::Kept } else { Average::None };
        Self { rule, average }
    }

    /// Whether that is another tensor than the one that is trained.
    pub fn is_another(self) -> bool {
        self.average == Average::Kept || self.rule.exports_another()
    }
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
        let (globals, rates) = (rule.globals(), BTreeMap::new());
        let (ema, scales) = (EmaConfig::default(), BTreeMap::new());
        Ok(Self { rule, globals, states, ema, rates, limit: None, scales })
    }

    /// The same with an average of the parameters, where `ema` asks for one.
    ///
    /// # Errors
    /// When a device's memory runs out.
    pub fn averaged(mut self, ema: EmaConfig) -> Result<Self> {
        if ema.is_kept() {
            for state in self.states.values_mut() {
                state.slots.push(state.parameter.copy()?);
            }
        }
        Ok(Self { ema, ..self })
    }

    /// The same with the learning rate of each tensor multiplied by `factor` of its name.
    #[must_use]
    pub fn at_rates(self, factor: impl Fn(&str) -> f64) -> Self {
        let rates = self.states.keys().map(|name| (name.clone(), factor(name)));
        Self { rates: rates.filter(|(_, factor)| *factor != 1.0).collect(), ..self }
    }

    /// The same with the norm of each change limited.
    #[must_use]
    pub fn limited(self, limit: Option<NormLimit>) -> Self {
        Self { limit, ..self }
    }

    /// The same, where the product of the factors of each module is multiplied by `scale` of its name.
    #[must_use]
    pub fn scaled(self, scale: impl Fn(&str) -> f64) -> Self {
        let modules = self.states.keys().filter_map(|name| name.strip_suffix(".lora_A.weight"));
        let scales = modules.map(|module| (module.to_owned(), scale(module))).collect();
        Self { scales, ..self }
    }

    /// What adapter files hold.
    pub fn in_files(&self) -> Shown {
        Shown::in_files(self.rule, &self.ema)
    }

    /// What clips and held-out losses are made with.
    pub fn in_clips(&self) -> Shown {
        Shown::in_clips(self.rule, &self.ema)
    }

    /// The rule.
    pub fn rule(&self) -> Rule {
        self.rule
    }

    /// Its state for a checkpoint.
    pub fn saved(&self) -> Saved {
        let (rule, globals) = (self.rule.name().to_owned(), self.globals.clone());
        Saved { rule, globals, tensors: self.states.clone(), average: self.average() }
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
            && saved.average == self.average()
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
        // The rule does not know the average.
        let mut averages = Vec::new();
        if self.average() == Average::Kept {
            averages.extend(self.states.values_mut().map(|state| state.slots.pop()));
        }
        let mut by_device: Vec<(DeviceLocation, Items)> = Vec::new();
        for (name, state) in &mut self.states {
            let gradient = found(gradients, name)?;
            let place = state.parameter.device().location();
            let rate = self.rates.get(name).copied().unwrap_or(1.0);
            match by_device.iter_mut().find(|(device, items)| *device == place && items.rate == rate) {
                Some((_, items)) => items.tensors.push((state, gradient)),
                None => by_device.push((place, Items { rate, tensors: vec![(state, gradient)] })),
            }
        }
        let mut by_device: Vec<_> = by_device.into_iter().map(|(_, items)| items).collect();
        self.rule.update(&mut by_device, &mut self.globals, step)?;
        if let Some(limit) = self.limit {
            limit.apply(&mut self.states, &self.scales)?;
        }
        if self.ema.is_kept() {
            for (state, average) in self.states.values_mut().zip(averages) {
                let before = average.as_ref().unwrap_or(&state.parameter);
                state.slots.push(ema::step(before, &state.parameter, self.ema.decay)?);
            }
        }
        Ok(())
    }

    fn average(&self) -> Average {
        if self.ema.is_kept() { Average::Kept } else { Average::None }
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

    /// Gives the stages' adapters what clips and held-out losses are made with, where that is another tensor than the one that is
    /// trained.
    pub fn publish_exported(&self, pipeline: &mut Pipeline) {
        let shown = self.in_clips();
        if shown.is_another() {
            let exported = |(name, state): (&String, &State)| (name.clone(), shown.of(state).clone());
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
