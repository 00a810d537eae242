//! Rules of optimisers: the state of each tensor and of the run, the update, and which tensor is exported.
//!
//! Checkpoints, exports, forecasts and probes ask the rule, so a new one is a variant of [`Rule`] and its op in `kernels`.

use std::collections::BTreeMap;

use kernels::optimiser::State;
use kernels::{Tensor, adamw};

use crate::error::Result;

/// An optimiser's rule with its settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// Adam with decoupled weight decay.
    AdamW(AdamW),
}

/// The settings of [`Rule::AdamW`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the two moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay: a parameter shrinks by the learning rate times this.
    pub weight_decay: f64,
}

/// Global state of a rule for a network, by name.
pub type Globals = BTreeMap<String, f64>;

/// The state of the optimisers of a run in a checkpoint.
#[derive(Debug, Clone, Default)]
pub struct Saved {
    /// [`Rule::name`].
    pub rule: String,
    /// The global state of a network.
    pub globals: Globals,
    /// The state of each trainable tensor.
    pub tensors: BTreeMap<String, State>,
}

/// One optimiser step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Learning rate.
    pub lr: f64,
    /// The factor of every gradient (gradient clipping).
    pub factor: f64,
    /// Number of this update of the network, from 1.
    pub number: u64,
}

/// Parameters of one device with their gradients.
pub type Items<'a> = Vec<(&'a mut State, &'a Tensor)>;

impl Rule {
    /// Its name in checkpoints.
    pub fn name(self) -> &'static str {
        match self {
            Self::AdamW(_) => "adamw",
        }
    }

    /// The names of the state slots of the rule `name`, in the order of [`State::slots`]; `None` for an unknown rule.
    pub fn slots_of(name: &str) -> Option<&'static [&'static str]> {
        match name {
            "adamw" => Some(&adamw::SLOTS),
            _ => None,
        }
    }

    /// The global state before the first step.
    pub fn globals(self) -> Globals {
        match self {
            Self::AdamW(_) => Globals::new(),
        }
    }

    /// The state of `parameter` before the first step. No memory is shared: updates may be made in place.
    ///
    /// # Errors
    /// When the device has no memory left.
    pub fn begin(self, parameter: &Tensor) -> Result<State> {
        match self {
            Self::AdamW(_) => {
                let zeros = adamw::SLOTS.iter().map(|_| parameter.zeros_like());
                let slots = zeros.collect::<kernels::Result<_>>()?;
                Ok(State { parameter: parameter.copy()?, slots })
            }
        }
    }

    /// Updates all tensors of a network, those of each device together.
    ///
    /// # Errors
    /// A device that fails.
    pub fn update(self, devices: &mut [Items], _globals: &mut Globals, step: &Step) -> Result<()> {
        let Step { lr, factor, number } = *step;
        match self {
            Self::AdamW(AdamW { betas: [beta1, beta2], eps, weight_decay }) => {
                let update = adamw::Update { lr, beta1, beta2, eps, weight_decay, step: number };
                devices.iter_mut().try_for_each(|items| Ok(adamw::step_all(items, factor, &update)?))
            }
        }
    }

    /// The tensor of a state that is used in adapter files, samples and held-out losses.
    pub fn exported(self, state: &State) -> &Tensor {
        match self {
            Self::AdamW(_) => &state.parameter,
        }
    }
}
