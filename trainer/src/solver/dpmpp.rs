//! DPM-Solver++ of order 2, multistep, midpoint, predicting the clean latent.
//!
//! Source: Lu et al. 2022 (arXiv 2211.01095), as in Wan-Video/Wan2.1 wan/utils/fm_solvers.py.

use kernels::Tensor;

use super::{Result, combine, lambda, predicted};

/// The history: the clean latent that the previous step predicted.
#[derive(Debug, Clone, Default)]
pub struct DpmPp2m {
    before: Option<Tensor>,
}

impl DpmPp2m {
    /// One step: first order at both ends of the run, second order between.
    pub fn step(&mut self, sigmas: &[f32], x: &Tensor, v: &Tensor, i: usize) -> Result<Tensor> {
        let m = predicted(x, v, sigmas[i])?;
        let (sigma, after) = (f64::from(sigmas[i]), f64::from(sigmas[i + 1]));
        let h = lambda(sigmas[i + 1]) - lambda(sigmas[i]);
        let gain = -(1.0 - after) * (-h).exp_m1();
        let last = i + 2 == sigmas.len();
        let result = match self.before.take().filter(|_| !last) {
            Some(before) => {
                // From sigma 1, where lambda is infinite, the slope has no weight: h / inf = 0.
                let slope = 0.5 * h / (lambda(sigmas[i]) - lambda(sigmas[i - 1]));
                combine(&[(after / sigma, x), (gain * (1.0 + slope), &m), (-gain * slope, &before)])?
            }
            None => combine(&[(after / sigma, x), (gain, &m)])?,
        };
        self.before = Some(m);
        Ok(result)
    }
}
