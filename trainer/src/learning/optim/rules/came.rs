//! CAME (Luo et al. 2023, arXiv 2307.02047), as came-pytorch has it.

use kernels::optimiser::State;
use kernels::{Result, Tensor};

use super::{averaged, factored, limited};

/// The settings of CAME.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Came {
    /// Decay of the first moment, of the squares and of the confidence.
    pub betas: [f64; 3],
    /// Added to the squares of gradients, and to those of the distance from the first moment.
    pub eps: [f64; 2],
    /// Largest root mean square of a tensor's update, before the learning rate.
    pub clip_threshold: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// The state of `parameter` before the first update: the first moment, the squares, the confidence.
///
/// # Errors
/// A device without memory.
pub fn begin(parameter: &Tensor) -> Result<Vec<Tensor>> {
    let mut slots = vec![parameter.zeros_like()?];
    slots.extend(factored::zeros(parameter)?);
    if factored::is_factored(parameter) {
        slots.extend(factored::zeros(parameter)?);
    }
    Ok(slots)
}

/// One update. Tensors without rows and columns have no confidence, and move by their first moment.
///
/// # Errors
/// A device that fails.
pub fn step(state: &State, gradient: &Tensor, settings: &Came, lr: f64) -> Result<State> {
    let Came { betas: [beta1, beta2, beta3], eps: [of_square, of_distance], .. } = *settings;
    let count = if factored::is_factored(&state.parameter) { 2 } else { 1 };
    let (first, rest) = (&state.slots[0], &state.slots[1..]);
    let squares = factored::averaged(&rest[..count], &(gradient.sqr()? + of_square)?, beta2)?;
    let update = limited(&factored::divided(gradient, &squares)?, settings.clip_threshold)?;
    let first = averaged(first, &update, beta1)?;
    let mut slots = vec![first.clone()];
    slots.extend(squares);
    let mut direction = first;
    if count == 2 {
        let distance = ((update - &direction)?.sqr()? + of_distance)?;
        let confidence = factored::averaged(&rest[count..], &distance, beta3)?;
        direction = factored::divided(&direction, &confidence)?;
        slots.extend(confidence);
    }
    let decayed = (&state.parameter * (1.0 - lr * settings.weight_decay))?;
    Ok(State { parameter: (decayed - (direction * lr)?)?, slots })
}
