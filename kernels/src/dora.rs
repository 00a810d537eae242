//! DoRA: the weight with a low-rank change, each row scaled to a trained length:
//! W' = m (W + s B A) / n. The change of the output is computed from the plain product u = x W^T:
//!
//! ```text
//! delta = k ((c - 1) u + c s (x A^T) B^T),   c = m / n,   k the strength
//! ```
//!
//! The length n passes no gradient, as the authors propose and PEFT does. Source: Liu et al. 2024 (arXiv 2402.09353),
//! section 4.3; huggingface/peft src/peft/tuners/lora/dora.py.

use crate::Tensor;
use candle_core::{D, DType};

use crate::Result;
use crate::linear::flat;
use crate::low_rank::{self, FactorGradients, Factors};
use crate::product::{End, product};
use crate::profile::{self, Class};
use crate::weight::Weight;

/// Rows whose squares are summed at once: a whole weight in f32 would be twice its size in bf16.
const ROWS: usize = 1024;

/// The lengths of a change, each `[out]` f32.
#[derive(Debug, Clone)]
pub struct Lengths {
    /// m, the new length of each row.
    pub magnitude: Tensor,
    /// n, the length that each row is divided by.
    pub norm: Tensor,
    /// k: 1 is all of the change.
    pub strength: f64,
}

/// The gradients of [`forward`].
#[derive(Debug, Clone)]
pub struct Gradients {
    /// Of the input through the low-rank pair, in its dtype.
    pub dx: Tensor,
    /// Of the plain product u, in the dtype of the input.
    pub d_plain: Tensor,
    /// Of A and B.
    pub factors: FactorGradients,
    /// Of m, `[out]` f32.
    pub d_magnitude: Tensor,
}

/// The square of the length of each row of a frozen weight, `[out]` f32.
pub fn row_squares(weight: &Weight) -> Result<Tensor> {
    let matrix = weight.dequantised(weight.dtype())?;
    let rows = matrix.dim(0)?;
    let squares = (0..rows).step_by(ROWS).map(|start| {
        let part = matrix.narrow(0, start, ROWS.min(rows - start))?;
        part.to_dtype(DType::F32)?.sqr()?.sum(D::Minus1)
    });
    Tensor::cat(&squares.collect::<Result<Vec<_>>>()?, 0)
}

/// The length of each row of W + s B A, `[out]` f32, without that matrix: `squares` is [`row_squares`] of W.
///
/// |w + s b A|² = |w|² + 2 s b (A w) + s² b (A A^T) b^T for a row w of W and b of B.
pub fn merged_norm(weight: &Weight, squares: &Tensor, factors: &Factors) -> Result<Tensor> {
    let (dtype, Factors { a, b, scale }) = (weight.dtype(), factors);
    let plain = |a: &Tensor, b: &Tensor| product(a, b, End::plain(DType::F32));
    let along = plain(&weight.dequantised(dtype)?, &a.to_dtype(dtype)?.t()?)?;
    let own = plain(b, &plain(a, &a.t()?)?)?;
    let with_weight = ((along * b)?.sum(D::Minus1)? * (2.0 * scale))?;
    let alone = ((own * b)?.sum(D::Minus1)? * (scale * scale))?;
    // Rounding may take the square of a zero row below zero.
    ((squares + with_weight)? + alone)?.maximum(f64::from(f32::MIN_POSITIVE))?.sqrt()
}

/// The change of `plain` = x W^T [.., out] (no bias): `x` [.., in] -> [.., out], in the dtype of `x`.
pub fn forward(x: &Tensor, plain: &Tensor, factors: &Factors, lengths: &Lengths) -> Result<Tensor> {
    let [of_plain, of_pair] = lengths.shares(x.dtype())?;
    let low = low_rank::forward(x, factors, None)?;
    let plain = plain.to_dtype(x.dtype())?;
    plain.broadcast_mul(&of_plain)? + low.broadcast_mul(&of_pair)?
}

/// The gradients of [`forward`] for `dy` [.., out].
pub fn backward(
    x: &Tensor,
    plain: &Tensor,
    dy: &Tensor,
    factors: &Factors,
    lengths: &Lengths,
) -> Result<Gradients> {
    let [of_plain, of_pair] = lengths.shares(x.dtype())?;
    let dy = dy.to_dtype(x.dtype())?;
    let whole = low_rank::forward(x, factors, Some(&plain.to_dtype(x.dtype())?))?;
    let d_magnitude = {
        let _noted = profile::scope(Class::Gemm, x.device());
        let along = flat(&(dy.to_dtype(DType::F32)? * whole.to_dtype(DType::F32)?)?)?.sum(0)?;
        (along.div(&lengths.norm)? * lengths.strength)?
    };
    drop(whole);
    let mut pair = low_rank::backward(x, &dy.broadcast_mul(&of_pair)?, factors, None)?;
    let d_plain = dy.broadcast_mul(&of_plain)?;
    let factors = pair.factors.pop().ok_or_else(|| candle_core::Error::msg("one pair, no gradient"))?;
    Ok(Gradients { dx: pair.dx, d_plain, factors, d_magnitude })
}

impl Lengths {
    /// What the plain product and the pair's are multiplied by, `[out]` each in `dtype`: k (c - 1) and k c.
    fn shares(&self, dtype: DType) -> Result<[Tensor; 2]> {
        let c = self.magnitude.div(&self.norm)?;
        let share = |c: Tensor| (c * self.strength)?.to_dtype(dtype);
        Ok([share((&c - 1.0)?)?, share(c)?])
    }
}
