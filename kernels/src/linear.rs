//! The frozen linear layer: forward, and backward to its input only. A frozen weight has no gradient to compute.

use crate::Result;
use crate::Tensor;
use crate::product::{End, Then, product};
use crate::profile::{self, Class};
use crate::weight::Weight;
use candle_core::{D, DType};

/// y = x W^T + b, plus `onto` where one is given.
///
/// `x` is [.., in], `weight` [out, in], `bias` `[out]`, `onto` [.., out]; the result is [.., out] in the weight's compute
/// dtype, to which `x` is cast first (bf16 weights: bf16 GEMM with f32 accumulation).
pub fn forward(x: &Tensor, weight: &Weight, bias: Option<&Tensor>, onto: Option<&Tensor>) -> Result<Tensor> {
    forward_then(x, weight, bias, onto, Then::Stay)
}

/// GELU (tanh) of [`forward`], in the same pass where a GPU can.
pub fn forward_gelu(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Tensor>,
    onto: Option<&Tensor>,
) -> Result<Tensor> {
    forward_then(x, weight, bias, onto, Then::Gelu)
}

fn forward_then(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Tensor>,
    onto: Option<&Tensor>,
    then: Then,
) -> Result<Tensor> {
    let _noted = profile::scope(Class::Gemm, x.device());
    let (matrix, dtype) = (weight.dequantised(weight.dtype())?, weight.dtype());
    let (bias, onto) = (like(bias, dtype)?, flat_like(onto, dtype)?);
    let end = End { bias: bias.as_ref(), onto: onto.as_ref(), then, ..End::plain(dtype) };
    unflat(&product(&flat(x)?.to_dtype(dtype)?, &matrix.t()?, end)?, x, matrix.dim(0)?)
}

/// dx = dy W, the gradient of the input of [`forward`], plus `onto` where one is given.
///
/// `dy` is [.., out], `weight` [out, in], `onto` [.., in]; the result is [.., in] in the weight's compute dtype.
pub fn backward_input(dy: &Tensor, weight: &Weight, onto: Option<&Tensor>) -> Result<Tensor> {
    let _noted = profile::scope(Class::Gemm, dy.device());
    let (matrix, dtype) = (weight.dequantised(weight.dtype())?, weight.dtype());
    let onto = flat_like(onto, dtype)?;
    let end = End { onto: onto.as_ref(), ..End::plain(dtype) };
    unflat(&product(&flat(dy)?.to_dtype(dtype)?, &matrix, end)?, dy, matrix.dim(1)?)
}

fn like(x: Option<&Tensor>, dtype: DType) -> Result<Option<Tensor>> {
    x.map(|x| x.to_dtype(dtype)).transpose()
}

/// `x` [.., width] as a matrix in `dtype`.
pub(crate) fn flat_like(x: Option<&Tensor>, dtype: DType) -> Result<Option<Tensor>> {
    x.map(|x| flat(x)?.to_dtype(dtype)).transpose()
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
