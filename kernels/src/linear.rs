//! The frozen linear layer: forward, and backward to its input only. A frozen weight has no gradient to compute.

use crate::Result;
use crate::profile::{self, Class};
use crate::weight::Weight;
use candle_core::{D, Tensor};

/// y = x W^T + b, plus `onto` where one is given.
///
/// `x` is [.., in], `weight` [out, in], `bias` `[out]`, `onto` [.., out]; the result is [.., out] in the weight's compute
/// dtype, to which `x` is cast first (bf16 weights: bf16 GEMM with f32 accumulation).
pub fn forward(x: &Tensor, weight: &Weight, bias: Option<&Tensor>, onto: Option<&Tensor>) -> Result<Tensor> {
    let _noted = profile::scope(Class::Gemm, x.device());
    let matrix = weight.dequantised(weight.dtype())?;
    let y = flat(x)?.to_dtype(matrix.dtype())?.matmul(&matrix.t()?)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    };
    plus(unflat(&y, x, matrix.dim(0)?)?, onto)
}

/// dx = dy W, the gradient of the input of [`forward`], plus `onto` where one is given.
///
/// `dy` is [.., out], `weight` [out, in], `onto` [.., in]; the result is [.., in] in the weight's compute dtype.
pub fn backward_input(dy: &Tensor, weight: &Weight, onto: Option<&Tensor>) -> Result<Tensor> {
    let _noted = profile::scope(Class::Gemm, dy.device());
    let matrix = weight.dequantised(weight.dtype())?;
    let dx = flat(dy)?.to_dtype(matrix.dtype())?.matmul(&matrix)?;
    plus(unflat(&dx, dy, matrix.dim(1)?)?, onto)
}

/// `onto` + `y`, in the dtype of `y`.
pub(crate) fn plus(y: Tensor, onto: Option<&Tensor>) -> Result<Tensor> {
    match onto {
        Some(onto) => onto.to_dtype(y.dtype())? + y,
        None => Ok(y),
    }
}

/// [.., width] as a matrix [rows, width], contiguous: anything else makes the GEMM copy or refuse.
pub(crate) fn flat(x: &Tensor) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    x.contiguous()?.reshape(((), width))
}

/// The matrix `y` [rows, width] in the leading shape of `like`.
pub(crate) fn unflat(y: &Tensor, like: &Tensor, width: usize) -> Result<Tensor> {
    let mut shape = like.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = width;
    }
    y.reshape(shape)
}
