//! A solver on a network that anyone can write down.

use kernels::{Device, Tensor};

use super::{Inputs, Outputs};
use crate::error::Result;
use crate::solver::{Schedule, Solver};

/// v(x, sigma) = 0.5 x + (0.2 + sigma) sin(2x) - c.
fn velocity(x: &Tensor, sigma: f32, c: &Tensor) -> Result<Tensor> {
    let wave = ((x * 2.0)?.sin()? * (0.2 + f64::from(sigma)))?;
    Ok(((x * 0.5)? + wave)?.broadcast_sub(c)?)
}

/// From `x` at the first sigma along v(x, sigma) = 0.5 x + (0.2 + sigma) sin(2x) - `c`: `x` [steps + 1, ...] at every
/// sigma, with `sigmas` `[steps + 1]` and `timesteps` `[steps]`.
///
/// # Errors
/// Missing tensors, or a `c` that does not broadcast over `x`.
pub fn integrate(schedule: &Schedule, inputs: &Inputs) -> Result<Outputs> {
    let (x, c) = (inputs.float("x")?, inputs.float("c")?);
    let mut solver = Solver::new(schedule.clone());
    let mut trajectory = vec![x];
    for (i, &sigma) in schedule.sigmas[..schedule.steps()].iter().enumerate() {
        let v = velocity(&trajectory[i], sigma, &c)?;
        trajectory.push(solver.step(&trajectory[i], &v, i)?);
    }
    Ok(Outputs::from([
        ("x".to_owned(), Tensor::stack(&trajectory, 0)?),
        ("sigmas".to_owned(), Tensor::new(schedule.sigmas.as_slice(), &Device::Cpu)?),
        ("timesteps".to_owned(), Tensor::new(schedule.timesteps.as_slice(), &Device::Cpu)?),
    ]))
}
