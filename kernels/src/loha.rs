//! LoHa: delta = scale * (W1a W1b ∘ W2a W2b) as a matrix; ∘ multiplies number by number, so that two thin pairs of rank r
//! reach rank r². Source: Hyeon-Woo et al. 2021 (arXiv 2108.06098); the names are LyCORIS's.

use crate::Tensor;
use candle_core::DType;

use crate::Result;
use crate::linear::{flat, unflat};
use crate::product::{End, product};
use crate::profile::{self, Class};

/// The factors of one adapter, f32 masters.
#[derive(Debug, Clone)]
pub struct Factors {
    /// [out, r].
    pub w1_a: Tensor,
    /// [r, in].
    pub w1_b: Tensor,
    /// [out, r].
    pub w2_a: Tensor,
    /// [r, in].
    pub w2_b: Tensor,
    /// What the product is multiplied by.
    pub scale: f64,
}

/// The gradients of [`forward`].
#[derive(Debug, Clone)]
pub struct Gradients {
    /// Of the input, in its dtype.
    pub dx: Tensor,
    /// Of w1_a, w1_b, w2_a, w2_b, f32.
    pub factors: [Tensor; 4],
}

impl Factors {
    /// The matrix [out, in] that this adds to a weight, computed in `dtype`.
    pub fn delta(&self, dtype: DType) -> Result<Tensor> {
        let [first, second] = self.halves(dtype)?;
        (first * second)? * self.scale
    }

    /// The two products, [out, in] each.
    fn halves(&self, dtype: DType) -> Result<[Tensor; 2]> {
        let half =
            |a: &Tensor, b: &Tensor| product(&a.to_dtype(dtype)?, &b.to_dtype(dtype)?, End::plain(dtype));
        Ok([half(&self.w1_a, &self.w1_b)?, half(&self.w2_a, &self.w2_b)?])
    }
}

/// x delta^T: `x` [.., in] -> [.., out], in the dtype of `x`.
pub fn forward(x: &Tensor, factors: &Factors) -> Result<Tensor> {
    let _noted = profile::scope(Class::Gemm, x.device());
    let delta = factors.delta(x.dtype())?;
    unflat(&product(&flat(x)?, &delta.t()?, End::plain(x.dtype()))?, x, delta.dim(0)?)
}

/// The gradients of [`forward`] for `x` [.., in] and `dy` [.., out].
///
/// With G = scale * dy^T x: dW1 = G ∘ W2 and dW2 = G ∘ W1; d(a b) gives da = d b^T, db = a^T d.
pub fn backward(x: &Tensor, dy: &Tensor, factors: &Factors) -> Result<Gradients> {
    let _noted = profile::scope(Class::Gemm, x.device());
    let (x_flat, dy, dtype) = (flat(x)?, flat(dy)?.to_dtype(x.dtype())?, x.dtype());
    let delta = factors.delta(dtype)?;
    let dx = unflat(&product(&dy, &delta, End::plain(dtype))?, x, delta.dim(1)?)?;
    drop(delta);
    let of_delta = product(&dy.t()?, &x_flat, End { scale: factors.scale, ..End::plain(DType::F32) })?;
    let [first, second] = factors.halves(DType::F32)?;
    let (d_first, d_second) = ((&of_delta * second)?, (&of_delta * first)?);
    let Factors { w1_a, w1_b, w2_a, w2_b, .. } = factors;
    let plain = |a: &Tensor, b: &Tensor| product(a, b, End::plain(DType::F32));
    Ok(Gradients {
        dx,
        factors: [
            plain(&d_first, &w1_b.t()?)?,
            plain(&w1_a.t()?, &d_first)?,
            plain(&d_second, &w2_b.t()?)?,
            plain(&w2_a.t()?, &d_second)?,
        ],
    })
}
