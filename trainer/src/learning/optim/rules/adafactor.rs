//! Adafactor (Shazeer and Stern 2018, arXiv 1804.04235), as transformers' `optimization.py` has it.

use kernels::optimiser::State;
use kernels::{Result, Tensor};

use super::{averaged, factored, limited, root_mean_square};
use crate::learning::optim::Step;

/// The settings of Adafactor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adafactor {
    /// Added to the squares of gradients, and the least scale of a parameter.
    pub eps: [f64; 2],
    /// Largest root mean square of a tensor's update, before the learning rate.
    pub clip_threshold: f64,
    /// The second moment's decay at update k is 1 - k^this.
    pub decay_rate: f64,
    /// Decay of a first moment, which is kept only with it.
    pub beta1: Option<f64>,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Whether the rate is multiplied by the root mean square of the parameter.
    pub scale_parameter: bool,
    /// Where the rate comes from.
    pub rate: Rate,
}

/// Where Adafactor's rate comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rate {
    /// The learning rate of the run.
    OfTheRun,
    /// min(1e-2, 1 / sqrt(k)) at update k.
    Relative,
    /// min(1e-6 k, 1 / sqrt(k)) at update k.
    RelativeWithWarmup,
}

impl Rate {
    fn at(self, step: &Step) -> f64 {
        let number = step.number as f64;
        match self {
            Self::OfTheRun => step.lr,
            Self::Relative => number.sqrt().recip().min(1e-2),
            Self::RelativeWithWarmup => number.sqrt().recip().min(1e-6 * number),
        }
    }
}

/// The moments of `parameter` before the first update.
///
/// # Errors
/// A device without memory.
pub fn begin(parameter: &Tensor, settings: &Adafactor) -> Result<Vec<Tensor>> {
    let mut slots = factored::zeros(parameter)?;
    if settings.beta1.is_some() {
        slots.push(parameter.zeros_like()?);
    }
    Ok(slots)
}

/// One update.
///
/// # Errors
/// A device that fails.
pub fn step(state: &State, gradient: &Tensor, settings: &Adafactor, step: &Step) -> Result<State> {
    let Adafactor { eps: [of_square, of_scale], clip_threshold, decay_rate, beta1, weight_decay, .. } =
        *settings;
    let decay = 1.0 - (step.number as f64).powf(decay_rate);
    let count = state.slots.len() - usize::from(beta1.is_some());
    let mut slots = factored::averaged(&state.slots[..count], &(gradient.sqr()? + of_square)?, decay)?;
    let update = limited(&factored::divided(gradient, &slots)?, clip_threshold)?;
    let rate = settings.rate.at(step);
    let scale = match settings.scale_parameter {
        true => Some(root_mean_square(&state.parameter)?.maximum(of_scale)?),
        false => None,
    };
    let scaled = |x: &Tensor, factor: f64| match &scale {
        Some(scale) => x.broadcast_mul(&(scale * factor)?),
        None => x * factor,
    };
    let mut update = scaled(&update, rate)?;
    if let Some(beta1) = beta1 {
        update = averaged(&state.slots[count], &update, beta1)?;
        slots.push(update.clone());
    }
    let decayed = match weight_decay > 0.0 {
        true => (&state.parameter - scaled(&state.parameter, rate * weight_decay)?)?,
        false => state.parameter.clone(),
    };
    Ok(State { parameter: (decayed - update)?, slots })
}
