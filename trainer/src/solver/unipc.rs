//! UniPC of order 2 (`bh2`), predicting the clean latent, with its corrector.
//!
//! Source: Zhao et al. 2023 (arXiv 2302.04867), as in Wan-Video/Wan2.1 wan/utils/fm_solvers_unipc.py. The corrector
//! mends the sample of the step before with the prediction made from it; it asks the network nothing.

use kernels::Tensor;

use super::{Result, combine, lambda, predicted};

/// The history of the previous steps.
#[derive(Debug, Clone, Default)]
pub struct UniPc {
    /// The clean latents predicted one and two steps ago.
    m: [Option<Tensor>; 2],
    /// The corrected sample that the last step predicted from.
    from: Option<Tensor>,
    /// Whether the last step predicted with order 2.
    second_order: bool,
}

impl UniPc {
    /// Corrects `x`, then predicts the sample at the next sigma.
    pub fn step(&mut self, sigmas: &[f32], x: &Tensor, v: &Tensor, i: usize) -> Result<Tensor> {
        let m = predicted(x, v, sigmas[i])?;
        let x = self.correct(sigmas, x, &m, i)?;
        let last = i + 2 == sigmas.len();
        self.second_order = i > 0 && !last;
        // At sigma 0 the formula below tends to the predicted latent itself.
        let after = if last { m.clone() } else { self.predict(sigmas, &x, &m, i)? };
        let [one_ago, _] = std::mem::take(&mut self.m);
        self.m = [Some(m), one_ago];
        self.from = Some(x);
        Ok(after)
    }

    /// The sample at sigma i, mended by the clean latent `m` predicted from it. Nothing to mend at the first step.
    fn correct(&self, sigmas: &[f32], x: &Tensor, m: &Tensor, i: usize) -> Result<Tensor> {
        let (Some(from), Some(m1)) = (&self.from, &self.m[0]) else { return Ok(x.clone()) };
        let h = lambda(sigmas[i]) - lambda(sigmas[i - 1]);
        let e = (-h).exp_m1();
        let (ratio, gain) =
            (f64::from(sigmas[i]) / f64::from(sigmas[i - 1]), -(1.0 - f64::from(sigmas[i])) * e);
        let Some(m2) = self.m[1].as_ref().filter(|_| self.second_order) else {
            return combine(&[(ratio, from), (gain * 0.5, m1), (gain * 0.5, m)]);
        };
        let r = (lambda(sigmas[i - 2]) - lambda(sigmas[i - 1])) / h;
        let (rho1, rho2) = corrector_weights(h, e, r);
        // gain * (m1 + rho1 * (m2 - m1) / r + rho2 * (m - m1))
        let of_m1 = gain * (1.0 - rho1 / r - rho2);
        combine(&[(ratio, from), (of_m1, m1), (gain * rho1 / r, m2), (gain * rho2, m)])
    }

    /// The sample at sigma i+1 from the corrected sample `x` at sigma i.
    fn predict(&self, sigmas: &[f32], x: &Tensor, m: &Tensor, i: usize) -> Result<Tensor> {
        let h = lambda(sigmas[i + 1]) - lambda(sigmas[i]);
        let after = f64::from(sigmas[i + 1]);
        let (ratio, gain) = (after / f64::from(sigmas[i]), -(1.0 - after) * (-h).exp_m1());
        let Some(m1) = self.m[0].as_ref().filter(|_| self.second_order) else {
            return combine(&[(ratio, x), (gain, m)]);
        };
        let slope = 0.5 * h / (lambda(sigmas[i - 1]) - lambda(sigmas[i]));
        combine(&[(ratio, x), (gain * (1.0 - slope), m), (gain * slope, m1)])
    }
}

/// Solves [[1, 1], [r, 1]] rho = b, the order conditions of the `bh2` corrector for a step of `h` in lambda with
/// `e` = expm1(-h).
fn corrector_weights(h: f64, e: f64, r: f64) -> (f64, f64) {
    let k2 = e / -h - 1.0;
    let b1 = k2 / e;
    let k3 = k2 / -h - 0.5;
    let b2 = 2.0 * k3 / e;
    let rho1 = (b1 - b2) / (1.0 - r);
    (rho1, b1 - rho1)
}
