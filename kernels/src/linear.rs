//! The frozen linear layer: forward, and backward to its input only. A frozen weight has no gradient to compute.

use crate::Result;
use candle_core::{D, Tensor};

/// y = x W^T + b.
///
/// `x` is [.., in], `weight` [out, in], `bias` `[out]`; the result is [.., out] in the weight's dtype, to which `x`
/// is cast first (bf16 weights: bf16 GEMM with f32 accumulation).
pub fn forward(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let out_width = weight.dim(0)?;
    let y = flat(x)?.to_dtype(weight.dtype())?.matmul(&weight.t()?)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    };
    unflat(&y, x, out_width)
}

/// dx = dy W, the gradient of the input of [`forward`].
///
/// `dy` is [.., out], `weight` [out, in]; the result is [.., in] in the weight's dtype.
pub fn backward_input(dy: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let in_width = weight.dim(1)?;
    let dx = flat(dy)?.to_dtype(weight.dtype())?.matmul(weight)?;
    unflat(&dx, dy, in_width)
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
