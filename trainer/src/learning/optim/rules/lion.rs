//! Lion (Chen et al. 2023, arXiv 2302.06675), as lion-pytorch has it.

use kernels::optimiser::State;
use kernels::{Result, Tensor};

use super::{averaged, sign};

/// The settings of Lion.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lion {
    /// Share of the momentum in the step, and decay of the momentum.
    pub betas: [f64; 2],
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// p (1 - lr wd) - lr sign(b1 m + (1 - b1) g), then m = b2 m + (1 - b2) g.
///
/// # Errors
/// A device that fails.
pub fn step(state: &State, gradient: &Tensor, settings: &Lion, lr: f64) -> Result<State> {
    let Lion { betas: [beta1, beta2], weight_decay } = *settings;
    let momentum = &state.slots[0];
    let direction = sign(&averaged(momentum, gradient, beta1)?)?;
    let parameter = ((&state.parameter * (1.0 - lr * weight_decay))? - (direction * lr)?)?;
    Ok(State { parameter, slots: vec![averaged(momentum, gradient, beta2)?] })
}
