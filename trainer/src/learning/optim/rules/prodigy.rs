//! Prodigy (Mishchenko and Defazio 2023, arXiv 2306.06101), as prodigyopt has it: AdamW that finds its learning rate from how far
//! the parameters have moved along their gradients. The estimate d is one for all tensors of a network.

use kernels::optimiser::State;
use kernels::{Result, Tensor};

use crate::learning::optim::{Globals, Step};

/// The settings of Prodigy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prodigy {
    /// Decay of the two moments.
    pub betas: [f64; 2],
    /// Decay of the sums that d is estimated from; none for the root of the second moment's.
    pub beta3: Option<f64>,
    /// Added to the root of the second moment, times d.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// How the weight decay acts.
    pub decay: Decay,
    /// Whether the moments are corrected for their start at zero.
    pub bias_correction: bool,
    /// Whether the learning rate is left out of one of the sums, so that a warm-up does not make d too large.
    pub safeguard_warmup: bool,
    /// d before the first update.
    pub d0: f64,
    /// Factor of the estimates of d.
    pub d_coef: f64,
    /// Largest factor between d and the next d.
    pub growth_rate: f64,
}

/// How weight decay acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decay {
    /// The parameter shrinks, as in AdamW.
    Decoupled,
    /// It is added to the gradient.
    Coupled,
}

/// The names of d, the largest estimate, its numerator and the number of updates in the global state.
const NAMES: [&str; 4] = ["d", "d_max", "d_numerator", "updates"];

/// The estimate of d and what it is made of.
#[derive(Debug, Clone, Copy)]
struct Estimate {
    d: f64,
    d_max: f64,
    numerator: f64,
    updates: f64,
}

impl Estimate {
    fn read(globals: &Globals) -> Self {
        let [d, d_max, numerator, updates] = NAMES.map(|name| globals.get(name).copied().unwrap_or(0.0));
        Self { d, d_max, numerator, updates }
    }

    fn globals(self) -> Globals {
        let values = [self.d, self.d_max, self.numerator, self.updates];
        NAMES.into_iter().map(str::to_owned).zip(values).collect()
    }
}

/// The global state before the first update.
pub fn globals(settings: &Prodigy) -> Globals {
    Estimate { d: settings.d0, d_max: settings.d0, numerator: 0.0, updates: 0.0 }.globals()
}

/// The first and second moment, the sum of gradients and the starting point of `parameter`.
///
/// # Errors
/// A device without memory.
pub fn begin(parameter: &Tensor) -> Result<Vec<Tensor>> {
    let zeros = || parameter.zeros_like();
    Ok(vec![zeros()?, zeros()?, zeros()?, parameter.copy()?])
}

/// One update of all of `items`, which are those of one device each. Waits once for each device, for the sums.
///
/// # Errors
/// A device that fails.
pub fn step_all(
    devices: &mut [Vec<(&mut State, Tensor)>],
    globals: &mut Globals,
    settings: &Prodigy,
    step: &Step,
) -> Result<()> {
    let now = Estimate::read(globals);
    let [beta1, beta2] = settings.betas;
    let number = now.updates + 1.0;
    let correction = match settings.bias_correction {
        true => (1.0 - beta2.powf(number)).sqrt() / (1.0 - beta1.powf(number)),
        false => 1.0,
    };
    let dlr = now.d * step.lr * correction;
    let sums = devices.iter_mut().map(|items| moments(items, now.d, dlr, settings));
    let sums = sums.collect::<Result<Vec<Option<Tensor>>>>()?;
    let (mut numerator, mut denominator) = (0.0, 0.0);
    // A shadow has no numbers: a rehearsal goes on as with a first gradient.
    let is_rehearsal = sums.iter().flatten().any(Tensor::is_shadow);
    for sums in sums.iter().flatten().filter(|sums| !sums.is_shadow()) {
        for pair in sums.to_vec2::<f32>()? {
            numerator += f64::from(pair[0]);
            denominator += f64::from(pair[1]);
        }
    }
    let beta3 = settings.beta3.unwrap_or(beta2.sqrt());
    let numerator = beta3 * now.numerator + now.d / settings.d0 * dlr * numerator;
    if denominator == 0.0 && !is_rehearsal {
        return Ok(());
    }
    let hat = settings.d_coef * numerator / if is_rehearsal { 1.0 } else { denominator };
    let d = if now.d == settings.d0 { now.d.max(hat) } else { now.d };
    let d_max = now.d_max.max(hat);
    let next = Estimate { d: d_max.min(d * settings.growth_rate), d_max, numerator, updates: number };
    for (state, _) in devices.iter_mut().flatten() {
        let [first, second, ..] = state.slots.as_slice() else { continue };
        let update = (first / (second.sqrt()? + next.d * settings.eps)?)?;
        let decayed = match settings.decay {
            Decay::Decoupled => (&state.parameter * (1.0 - dlr * settings.weight_decay))?,
            Decay::Coupled => state.parameter.clone(),
        };
        state.parameter = (decayed - (update * dlr)?)?;
    }
    *globals = next.globals();
    Ok(())
}

/// Updates the moments and sums of the tensors of a device: `[tensors, 2]`, of each <g, p0 - p> and the sum of |s|.
fn moments(
    items: &mut [(&mut State, Tensor)],
    d: f64,
    dlr: f64,
    settings: &Prodigy,
) -> Result<Option<Tensor>> {
    let [beta1, beta2] = settings.betas;
    let beta3 = settings.beta3.unwrap_or(beta2.sqrt());
    let mut sums = Vec::new();
    for (state, gradient) in items {
        if settings.decay == Decay::Coupled && settings.weight_decay > 0.0 {
            *gradient = (&*gradient + (&state.parameter * settings.weight_decay)?)?;
        }
        let [first, second, sum, start] = state.slots.as_slice() else { continue };
        let along = (&*gradient * (start - &state.parameter)?)?.sum_all()?;
        let first = ((first * beta1)? + (&*gradient * (d * (1.0 - beta1)))?)?;
        let second = ((second * beta2)? + (gradient.sqr()? * (d * d * (1.0 - beta2)))?)?;
        let share = d / settings.d0 * if settings.safeguard_warmup { d } else { dlr };
        let sum = ((sum * beta3)? + (&*gradient * share)?)?;
        sums.push(Tensor::stack(&[along, sum.abs()?.sum_all()?], 0)?);
        state.slots = vec![first, second, sum, start.clone()];
    }
    if sums.is_empty() { Ok(None) } else { Ok(Some(Tensor::stack(&sums, 0)?)) }
}
