//! The frozen linear layer: forward, and backward to its input only. A frozen weight has no gradient to compute.

use crate::Result;
use crate::weight::Weight;
use candle_core::{D, Tensor};

/// y = x W^T + b.
///
/// `x` is [.., in], `weight` [out, in], `bias` `[out]`; the result is [.., out] in the weight's compute dtype, to which
/// `x` is cast first (bf16 weights: bf16 GEMM with f32 accumulation).
pub fn forward(x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = product(x, &weight.dequantised(weight.dtype())?)?;
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

/// dx = dy W, the gradient of the input of [`forward`].
///
/// `dy` is [.., out], `weight` [out, in]; the result is [.., in] in the weight's compute dtype.
pub fn backward_input(dy: &Tensor, weight: &Weight) -> Result<Tensor> {
    let (_, in_width) = weight.dims()?;
    let matrix = weight.dequantised(weight.dtype())?;
    let dx = flat(dy)?.to_dtype(matrix.dtype())?.matmul(&matrix)?;
    unflat(&dx, dy, in_width)
}

/// x W^T of `x` [.., in] and the matrix W [out, in], in the dtype of W.
pub(crate) fn product(x: &Tensor, matrix: &Tensor) -> Result<Tensor> {
    let y = flat(x)?.to_dtype(matrix.dtype())?.matmul(&matrix.t()?)?;
    unflat(&y, x, matrix.dim(0)?)
}

/// [.., width] as a matrix [rows, width], contiguous: anything else makes the GEMM copy or refuse.
pub(crate) fn flat(x: &Tensor) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    x.contiguous()?.reshape(((), width))
}

/// The matrix `y` [rows, width] in the leading shape of `like`.
fn unflat(y: &Tensor, like: &Tensor, width: usize) -> Result<Tensor> {
    let mut shape = like.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = width;
    }
    y.reshape(shape)
}
