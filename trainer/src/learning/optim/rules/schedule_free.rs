//! Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682), as schedulefree's `AdamWScheduleFreeReference` has it.
//!
//! Gradients are taken at y, the parameter that is trained; x, a mean of all z so far, is exported, sampled and held out.

use kernels::optimiser::State;
use kernels::{Result, Tensor};

use super::averaged;
use crate::learning::optim::{Globals, Step};

/// The settings of schedule-free AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScheduleFree {
    /// The share of x in y, and the decay of the second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, taken at y.
    pub weight_decay: f64,
    /// Power of the update's number in its weight in x.
    pub r: f64,
    /// Power of the learning rate in that weight.
    pub weight_lr_power: f64,
}

/// The slot of x.
pub const AVERAGED: usize = 2;
/// Largest learning rate so far.
const LR_MAX: &str = "lr_max";
/// Sum of the weights of all updates.
const WEIGHT_SUM: &str = "weight_sum";

/// The global state before the first update.
pub fn globals() -> Globals {
    Globals::from([(LR_MAX.to_owned(), 0.0), (WEIGHT_SUM.to_owned(), 0.0)])
}

/// The weight of this update in x, after it is added to the sum of all.
pub fn weight(globals: &mut Globals, settings: &ScheduleFree, step: &Step) -> f64 {
    let of = |name: &str| globals.get(name).copied().unwrap_or(0.0);
    let lr_max = of(LR_MAX).max(step.lr);
    let weight = (step.number as f64).powf(settings.r) * lr_max.powf(settings.weight_lr_power);
    let sum = of(WEIGHT_SUM) + weight;
    *globals = Globals::from([(LR_MAX.to_owned(), lr_max), (WEIGHT_SUM.to_owned(), sum)]);
    if sum > 0.0 { weight / sum } else { 0.0 }
}

/// The second moment, z and x of `parameter` before the first update.
///
/// # Errors
/// A device without memory.
pub fn begin(parameter: &Tensor) -> Result<Vec<Tensor>> {
    Ok(vec![parameter.zeros_like()?, parameter.copy()?, parameter.copy()?])
}

/// One update, of which x takes the share `weight`.
///
/// # Errors
/// A device that fails.
pub fn step(
    state: &State,
    gradient: &Tensor,
    settings: &ScheduleFree,
    step: &Step,
    weight: f64,
) -> Result<State> {
    let ScheduleFree { betas: [beta1, beta2], eps, weight_decay, .. } = *settings;
    let correction = 1.0 - beta2.powf(step.number as f64);
    let second = averaged(&state.slots[0], &gradient.sqr()?, beta2)?;
    let deviation = ((&second / correction)?.sqrt()? + eps)?;
    let decayed = (&state.slots[1] - (&state.parameter * (step.lr * weight_decay))?)?;
    let z = (decayed - ((gradient / deviation)? * step.lr)?)?;
    let x = averaged(&state.slots[AVERAGED], &z, 1.0 - weight)?;
    Ok(State { parameter: averaged(&x, &z, beta1)?, slots: vec![second, z, x] })
}
