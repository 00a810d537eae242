//! The AdamW update (Loshchilov and Hutter 2019, arXiv 1711.05101), f32 throughout.

use crate::Result;
use crate::Tensor;
use crate::gpu::{File, Gpu, Launch, fits};
use crate::optimiser::State;

/// The settings of one update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay: the parameter shrinks by lr * weight_decay.
    pub weight_decay: f64,
    /// Number of this update, from 1: the moments start at zero and are corrected for it.
    pub step: u64,
}

/// What AdamW keeps of a parameter, f32 of its shape: the mean of its gradients, and that of their squares.
pub const SLOTS: [&str; 2] = ["first", "second"];

/// One step: decay, moments, bias correction, update; the order of `torch.optim.AdamW`.
pub fn step(state: &State, gradient: &Tensor, update: &Update) -> Result<State> {
    let Update { lr, beta1, beta2, eps, weight_decay, step } = *update;
    on_gpu!(gradient, |gpu| gpu.adamw(state, gradient, 1.0, update)?);
    let correction = |beta: f64| 1.0 - beta.powf(step as f64);
    let [first, second] = moments(state)?;
    let parameter = (&state.parameter * (1.0 - lr * weight_decay))?;
    let first = ((first * beta1)? + (gradient * (1.0 - beta1))?)?;
    let second = ((second * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
    let deviation = ((second.sqrt()? / correction(beta2).sqrt())? + eps)?;
    let parameter = (parameter - ((&first / &deviation)? * (lr / correction(beta1)))?)?;
    Ok(State { parameter, slots: vec![first, second] })
}

/// The two slots of a state.
///
/// # Errors
/// A state of another rule.
fn moments(state: &State) -> Result<[&Tensor; 2]> {
    match state.slots.as_slice() {
        [first, second] => Ok([first, second]),
        slots => Err(crate::Error::msg(format!(
            "AdamW keeps two tensors of a parameter, and there are {}",
            slots.len()
        ))),
    }
}

/// One step of many tensors of one device, each with its gradient times `factor`. It may update in place: the memory of a
/// state's moments must not be shared, and every tensor that shares the memory of a parameter sees its new value.
pub fn step_all(items: &mut [(&mut State, &Tensor)], factor: f64, update: &Update) -> Result<()> {
    items.iter_mut().try_for_each(|(state, gradient)| {
        **state = scaled_step(state, gradient, factor, update)?;
        Ok(())
    })
}

fn scaled_step(state: &State, gradient: &Tensor, factor: f64, update: &Update) -> Result<State> {
    on_gpu!(gradient, |gpu| gpu.adamw(state, gradient, factor, update)?);
    step(state, &(gradient * factor)?, update)
}

impl Gpu {
    fn adamw(&self, state: &State, gradient: &Tensor, factor: f64, update: &Update) -> Result<Option<State>> {
        let Update { lr, beta1, beta2, eps, weight_decay, step } = *update;
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        let [first, second] = moments(state)?;
        let old = [&state.parameter, first, second, gradient];
        if !(fits(&old)? && old.iter().all(|x| x.dtype() == candle_core::DType::F32)) {
            return Ok(None);
        }
        let new = || self.empty(gradient.shape(), candle_core::DType::F32);
        let new = [new()?, new()?, new()?];
        let mut launch = Launch::new(self, File::Optimiser, "adamw_f32")?;
        for x in old.into_iter().chain(&new) {
            launch = launch.tensor(x)?;
        }
        let count = gradient.elem_count();
        let launch =
            launch.size(count).float(factor).float(1.0 - lr * weight_decay).float(beta1).float(beta2);
        launch.float(lr / correction(beta1)).float(correction(beta2).sqrt()).float(eps).each(count)?;
        let [parameter, first, second] = new;
        Ok(Some(State { parameter, slots: vec![first, second] }))
    }
}
