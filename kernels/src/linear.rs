//! The frozen linear layer: forward, and backward to its input only. A frozen weight has no gradient to compute.

use crate::Result;
use candle_core::{D, Tensor};

/// y = x W^T + b, plus `onto` where one is given.
///
/// `x` is [.., in], `weight` [out, in], `bias` `[out]`, `onto` [.., out]; the result is [.., out] in the weight's dtype,
/// to which `x` is cast first (bf16 weights: bf16 GEMM with f32 accumulation).
pub fn forward(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, onto: Option<&Tensor>) -> Result<Tensor> {
    let out_width = weight.dim(0)?;
    let y = flat(x)?.to_dtype(weight.dtype())?.matmul(&weight.t()?)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    };
    plus(unflat(&y, x, out_width)?, onto)
}

/// dx = dy W, the gradient of the input of [`forward`], plus `onto` where one is given.
///
/// `dy` is [.., out], `weight` [out, in], `onto` [.., in]; the result is [.., in] in the weight's dtype.
pub fn backward_input(dy: &Tensor, weight: &Tensor, onto: Option<&Tensor>) -> Result<Tensor> {
    let in_width = weight.dim(1)?;
    let dx = flat(dy)?.to_dtype(weight.dtype())?.matmul(weight)?;
    plus(unflat(&dx, dy, in_width)?, onto)
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
