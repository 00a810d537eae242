//! LoKr: delta = scale * W1 ⊗ W2, a Kronecker product, applied as two small products without computing the matrix.
//! Source: Edalati et al. 2022 (arXiv 2212.10650), Yeh et al. 2023 (arXiv 2309.14859); the names are LyCORIS's.

use crate::Tensor;
use candle_core::{D, DType};

use crate::Result;
use crate::linear::{flat, unflat};
use crate::product::{End, product};
use crate::profile::{self, Class};

/// One side of the product, f32 masters.
#[derive(Debug, Clone)]
pub enum Half {
    /// The matrix itself.
    Full(Tensor),
    /// The product of a [rows, r] and b [r, columns].
    Low(Tensor, Tensor),
}

/// The factors of one adapter: rows and columns of W1 times those of W2 are those of the weight.
#[derive(Debug, Clone)]
pub struct Factors {
    /// W1, the coarse side.
    pub w1: Half,
    /// W2, the fine side.
    pub w2: Half,
    /// What the product is multiplied by.
    pub scale: f64,
}

/// The gradients of [`forward`].
#[derive(Debug, Clone)]
pub struct Gradients {
    /// Of the input, in its dtype.
    pub dx: Tensor,
    /// Of W1 (a full matrix, or its a and b), f32.
    pub w1: Half,
    /// Of W2.
    pub w2: Half,
}

impl Half {
    /// The matrix in `dtype`.
    pub fn matrix(&self, dtype: DType) -> Result<Tensor> {
        match self {
            Self::Full(matrix) => matrix.to_dtype(dtype),
            Self::Low(a, b) => product(&a.to_dtype(dtype)?, &b.to_dtype(dtype)?, End::plain(dtype)),
        }
    }

    /// (rows, columns).
    pub fn dims(&self) -> Result<(usize, usize)> {
        match self {
            Self::Full(matrix) => matrix.dims2(),
            Self::Low(a, b) => Ok((a.dim(0)?, b.dim(1)?)),
        }
    }

    /// The gradients of its factors, from that of the matrix.
    fn backward(&self, d: Tensor) -> Result<Self> {
        match self {
            Self::Full(_) => Ok(Self::Full(d)),
            Self::Low(a, b) => {
                let plain = |a: &Tensor, b: &Tensor| product(a, b, End::plain(DType::F32));
                Ok(Self::Low(plain(&d, &b.t()?)?, plain(&a.t()?, &d)?))
            }
        }
    }
}

impl Factors {
    /// (out, in).
    pub fn dims(&self) -> Result<(usize, usize)> {
        let ((o1, i1), (o2, i2)) = (self.w1.dims()?, self.w2.dims()?);
        Ok((o1 * o2, i1 * i2))
    }

    /// The matrix [out, in] that this adds to a weight, in f32.
    pub fn delta(&self) -> Result<Tensor> {
        let (w1, w2) = (self.w1.matrix(DType::F32)?, self.w2.matrix(DType::F32)?);
        let ((o1, i1), (o2, i2)) = (w1.dims2()?, w2.dims2()?);
        let blocks = w1.reshape((o1, 1, i1, 1))?.broadcast_mul(&w2.reshape((1, o2, 1, i2))?)?;
        blocks.reshape((o1 * o2, i1 * i2))? * self.scale
    }
}

/// x delta^T: `x` [.., in] -> [.., out], in the dtype of `x`.
pub fn forward(x: &Tensor, factors: &Factors) -> Result<Tensor> {
    let _noted = profile::scope(Class::Gemm, x.device());
    let dtype = x.dtype();
    let (w1, w2) = (factors.w1.matrix(dtype)?, factors.w2.matrix(dtype)?);
    let inner = fine(x, &w1, &w2)?;
    let y = product(&inner, &w1.t()?, End { scale: factors.scale, ..End::plain(dtype) })?;
    let (o1, o2) = (w1.dim(0)?, w2.dim(0)?);
    unflat(&turned(&y, o2)?, x, o1 * o2)
}

/// The gradients of [`forward`] for `x` [.., in] and `dy` [.., out].
pub fn backward(x: &Tensor, dy: &Tensor, factors: &Factors) -> Result<Gradients> {
    let _noted = profile::scope(Class::Gemm, x.device());
    let dtype = x.dtype();
    let (w1, w2) = (factors.w1.matrix(dtype)?, factors.w2.matrix(dtype)?);
    let ((o1, i1), (o2, i2)) = (w1.dims2()?, w2.dims2()?);
    let inner = fine(x, &w1, &w2)?;
    let scaled = |dtype| End { scale: factors.scale, ..End::plain(dtype) };
    // Rows (token, o2), in the order of the coarse product's result.
    let dy = turned(&dy.to_dtype(dtype)?.contiguous()?.reshape(((), o2))?, o1)?;
    let d_w1 = product(&dy.t()?, &inner, scaled(DType::F32))?;
    let d_inner = turned(&product(&dy, &w1, scaled(dtype))?, o2)?.reshape(((), o2))?;
    let x_fine = flat(x)?.reshape(((), i2))?;
    let d_w2 = product(&d_inner.t()?, &x_fine, End::plain(DType::F32))?;
    let dx = product(&d_inner, &w2, End::plain(dtype))?.reshape(((), i1 * i2))?;
    Ok(Gradients {
        dx: unflat(&dx, x, x.dim(D::Minus1)?)?,
        w1: factors.w1.backward(d_w1)?,
        w2: factors.w2.backward(d_w2)?,
    })
}

/// `x` [.., i1 * i2] through W2: rows (token, o2), columns i1.
fn fine(x: &Tensor, w1: &Tensor, w2: &Tensor) -> Result<Tensor> {
    let (i1, i2) = (w1.dim(1)?, w2.dim(1)?);
    let y = product(&flat(x)?.reshape(((), i2))?, &w2.t()?, End::plain(x.dtype()))?;
    turned(&y, i1)?.reshape(((), i1))
}

/// A matrix whose rows are (token, `inner`) with the columns in `inner`'s place: [token * columns, inner] as rows.
fn turned(x: &Tensor, inner: usize) -> Result<Tensor> {
    let (rows, columns) = x.dims2()?;
    x.reshape((rows / inner, inner, columns))?.transpose(1, 2)?.contiguous()?.reshape(((), inner))
}
