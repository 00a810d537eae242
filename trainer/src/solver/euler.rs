//! Euler: x + (s_after - s) * v.

use kernels::Tensor;

use super::{Result, combine};

/// One step of the straight line.
pub fn step(sigmas: &[f32], x: &Tensor, v: &Tensor, i: usize) -> Result<Tensor> {
    combine(&[(1.0, x), (f64::from(sigmas[i + 1]) - f64::from(sigmas[i]), v)])
}
