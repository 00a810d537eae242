//! Rules of optimisers: the state of each tensor and of the run, the update, and which tensor is exported.
//!
//! Checkpoints, exports, forecasts and probes ask the rule, so a new one is a variant of [`Rule`] and its update in `rules`.

use std::collections::BTreeMap;

use kernels::optimiser::State;
use kernels::{Tensor, adamw};
use serde::{Deserialize, Serialize};

use super::rules::adafactor::{self, Adafactor};
use super::rules::adamw8bit::{self, Tables};
use super::rules::came::{self, Came};
use super::rules::lion::{self, Lion};
use super::rules::muon::{self, Muon};
use super::rules::prodigy::{self, Prodigy};
use super::rules::schedule_free::{self, ScheduleFree};
use crate::error::Result;

/// An optimiser's rule with its settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// Adam with decoupled weight decay.
    AdamW(AdamW),
    /// The same with its moments in 8 bits.
    AdamW8bit(AdamW),
    /// The sign of a momentum.
    Lion(Lion),
    /// A second moment of rows and columns.
    Adafactor(Adafactor),
    /// AdamW with an average in place of a schedule.
    ScheduleFree(ScheduleFree),
    /// AdamW that finds its learning rate.
    Prodigy(Prodigy),
    /// Adafactor with a first moment and its confidence.
    Came(Came),
    /// A momentum made orthogonal.
    Muon(Muon),
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
    /// The state of each trainable tensor; with an average it is the last of the slots.
    pub tensors: BTreeMap<String, State>,
    /// Whether there is an average of the parameters.
    pub average: Average,
}

/// Whether an average of the parameters is kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Average {
    /// None is.
    #[default]
    None,
    /// The last slot of each state is one.
    Kept,
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
#[derive(Debug)]
pub struct Items<'a> {
    /// What their learning rate is multiplied by.
    pub rate: f64,
    /// Each parameter with its state, and its gradient.
    pub tensors: Vec<(&'a mut State, &'a Tensor)>,
}

impl Step {
    /// The same at `rate` times its learning rate.
    fn times(&self, rate: f64) -> Self {
        Self { lr: self.lr * rate, ..*self }
    }
}

impl Rule {
    /// Its name in checkpoints.
    pub fn name(self) -> &'static str {
        match self {
            Self::AdamW(_) => "adamw",
            Self::AdamW8bit(_) => "adamw-8bit",
            Self::Lion(_) => "lion",
            Self::Adafactor(_) => "adafactor",
            Self::ScheduleFree(_) => "schedule-free",
            Self::Prodigy(_) => "prodigy",
            Self::Came(_) => "came",
            Self::Muon(_) => "muon",
        }
    }

    /// The names of what the rule `name` can keep of a tensor with `rank` dimensions, in the order of [`State::slots`], of
    /// which the last may be missing; `None` for an unknown rule.
    pub fn slots_of(name: &str, rank: usize) -> Option<&'static [&'static str]> {
        let is_matrix = rank >= 2;
        Some(match name {
            "adamw" => &adamw::SLOTS,
            "adamw-8bit" => &["first", "first_max", "second", "second_max"],
            "lion" => &["momentum"],
            "adafactor" if is_matrix => &["rows", "columns", "first"],
            "adafactor" => &["second", "first"],
            "schedule-free" => &["second", "z", "x"],
            "prodigy" => &["first", "second", "sum", "start"],
            "came" if is_matrix => &["first", "rows", "columns", "confidence_rows", "confidence_columns"],
            "came" => &["first", "second"],
            "muon" if rank == 2 => &["momentum"],
            "muon" => &adamw::SLOTS,
            _ => return None,
        })
    }

    /// The global state before the first step.
    pub fn globals(self) -> Globals {
        match self {
            Self::ScheduleFree(_) => schedule_free::globals(),
            Self::Prodigy(settings) => prodigy::globals(&settings),
            _ => Globals::new(),
        }
    }

    /// The state of `parameter` before the first step. No memory is shared: updates may be made in place.
    ///
    /// # Errors
    /// When the device has no memory left.
    pub fn begin(self, parameter: &Tensor) -> Result<State> {
        let slots = match self {
            Self::AdamW8bit(_) => adamw8bit::begin(parameter)?,
            Self::Lion(_) => vec![parameter.zeros_like()?],
            Self::Muon(_) if parameter.rank() == 2 => vec![parameter.zeros_like()?],
            Self::AdamW(_) | Self::Muon(_) => vec![parameter.zeros_like()?, parameter.zeros_like()?],
            Self::Adafactor(settings) => adafactor::begin(parameter, &settings)?,
            Self::ScheduleFree(_) => schedule_free::begin(parameter)?,
            Self::Prodigy(_) => prodigy::begin(parameter)?,
            Self::Came(_) => came::begin(parameter)?,
        };
        Ok(State { parameter: parameter.copy()?, slots })
    }

    /// Updates all tensors of a network, those of each device together.
    ///
    /// # Errors
    /// A device that fails.
    pub fn update(self, devices: &mut [Items], globals: &mut Globals, step: &Step) -> Result<()> {
        match self {
            Self::AdamW(settings) => devices.iter_mut().try_for_each(|items| {
                let update = settings.update(&step.times(items.rate));
                Ok(adamw::step_all(&mut items.tensors, step.factor, &update)?)
            }),
            Self::AdamW8bit(settings) => devices.iter_mut().try_for_each(|items| {
                let Some((first, _)) = items.tensors.first() else { return Ok(()) };
                let tables = Tables::on(first.parameter.device())?;
                each(items, step, |state, g, step| adamw8bit::step(state, g, &settings, step, &tables))
            }),
            Self::Lion(settings) => {
                of_each(devices, step, |state, g, step| lion::step(state, g, &settings, step.lr))
            }
            Self::Adafactor(settings) => {
                of_each(devices, step, |state, g, step| adafactor::step(state, g, &settings, step))
            }
            Self::ScheduleFree(settings) => {
                // A constant factor of the rate changes no weight.
                let weight = schedule_free::weight(globals, &settings, step);
                of_each(devices, step, |state, g, step| {
                    schedule_free::step(state, g, &settings, step, weight)
                })
            }
            Self::Prodigy(settings) => {
                let factor = step.factor;
                let mut scaled = Vec::new();
                for items in devices {
                    let own = items.tensors.iter_mut().map(|(state, g)| Ok((&mut **state, (*g * factor)?)));
                    scaled.push(own.collect::<kernels::Result<Vec<_>>>()?);
                }
                Ok(prodigy::step_all(&mut scaled, globals, &settings, step)?)
            }
            Self::Came(settings) => {
                of_each(devices, step, |state, g, step| came::step(state, g, &settings, step.lr))
            }
            Self::Muon(settings) => {
                let Muon { betas, eps, weight_decay, .. } = settings;
                of_each(devices, step, |state, g, step| match g.rank() {
                    2 => muon::step(state, g, &settings, step.lr),
                    _ => adamw::step(state, g, &AdamW { betas, eps, weight_decay }.update(step)),
                })
            }
        }
    }

    /// The tensor of a state that is used in adapter files, samples and held-out losses.
    pub fn exported(self, state: &State) -> &Tensor {
        match self {
            Self::ScheduleFree(_) => &state.slots[schedule_free::AVERAGED], // `begin` makes it
            _ => &state.parameter,
        }
    }

    /// Whether what is exported is another tensor than the one that is trained.
    pub fn exports_another(self) -> bool {
        matches!(self, Self::ScheduleFree(_))
    }
}

impl AdamW {
    fn update(self, step: &Step) -> adamw::Update {
        let Self { betas: [beta1, beta2], eps, weight_decay } = self;
        adamw::Update { lr: step.lr, beta1, beta2, eps, weight_decay, step: step.number }
    }
}

/// Replaces every state of all devices by `update` of it, of its gradient times the factor of `step`, and of `step` at its rate.
fn of_each(
    devices: &mut [Items],
    step: &Step,
    update: impl Fn(&State, &Tensor, &Step) -> kernels::Result<State>,
) -> Result<()> {
    devices.iter_mut().try_for_each(|items| each(items, step, &update))
}

/// The same for those of one device.
fn each(
    items: &mut Items,
    step: &Step,
    update: impl Fn(&State, &Tensor, &Step) -> kernels::Result<State>,
) -> Result<()> {
    let step = step.times(items.rate);
    for (state, gradient) in &mut items.tensors {
        **state = update(state, &(*gradient * step.factor)?, &step)?;
    }
    Ok(())
}
