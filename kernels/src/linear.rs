//! The frozen linear layer: forward, and backward to its input only. A frozen weight has no gradient to compute.

use crate::Result;
use crate::Tensor;
use crate::int8::{self, Rows};
use crate::product::{End, Then, product};
use crate::profile::{self, Class};
use crate::weight::{Format, Quantised, Weight};
use candle_core::{D, DType};

/// The input of linear layers: `x` [.., in], and its rows as codes where they are known.
#[derive(Debug, Clone)]
pub struct Input {
    x: Tensor,
    rows: Option<Rows>,
}

impl From<&Tensor> for Input {
    fn from(x: &Tensor) -> Self {
        Self { x: x.clone(), rows: None }
    }
}

impl From<&Self> for Input {
    fn from(input: &Self) -> Self {
        input.clone()
    }
}

impl Input {
    /// `x` for several layers with weights like `weight`: if they multiply integers, it is quantised once for all.
    pub fn shared(x: &Tensor, weight: &Weight) -> Result<Self> {
        let rows = match integers(weight, x)? {
            Some(_) => Some(Rows::rotated(&flat(x)?.to_dtype(weight.dtype())?)?),
            None => None,
        };
        Ok(Self { x: x.clone(), rows })
    }
}

/// `weight`, if a product of `x` with it is one of integers.
fn integers<'a>(weight: &'a Weight, x: &Tensor) -> Result<Option<&'a Quantised>> {
    let rows = x.elem_count() / x.dim(D::Minus1)?.max(1);
    Ok(match weight {
        Weight::Quantised(quantised) if quantised.format == Format::RotatedInt8 => {
            Some(quantised).filter(|_| rows > int8::FEW_ROWS)
        }
        _ => None,
    })
}

/// y = x W^T + b, plus `onto` where one is given.
///
/// `x` is [.., in], `weight` [out, in], `bias` `[out]`, `onto` [.., out]; the result is [.., out] in the weight's compute
/// dtype, to which `x` is cast first (bf16 weights: bf16 GEMM with f32 accumulation).
pub fn forward(
    x: impl Into<Input>,
    weight: &Weight,
    bias: Option<&Tensor>,
    onto: Option<&Tensor>,
) -> Result<Tensor> {
    forward_then(x.into(), weight, bias, onto, Then::Stay)
}

/// GELU (tanh) of [`forward`], in the same pass where a GPU can.
pub fn forward_gelu(
    x: impl Into<Input>,
    weight: &Weight,
    bias: Option<&Tensor>,
    onto: Option<&Tensor>,
) -> Result<Tensor> {
    forward_then(x.into(), weight, bias, onto, Then::Gelu)
}

fn forward_then(
    Input { x, rows }: Input,
    weight: &Weight,
    bias: Option<&Tensor>,
    onto: Option<&Tensor>,
    then: Then,
) -> Result<Tensor> {
    let _noted = profile::scope(Class::Gemm, x.device());
    let dtype = weight.dtype();
    let (bias, onto) = (like(bias, dtype)?, flat_like(onto, dtype)?);
    let end = End { bias: bias.as_ref(), onto: onto.as_ref(), then, ..End::plain(dtype) };
    let (out, _) = weight.dims()?;
    let y = match integers(weight, &x)? {
        Some(quantised) => {
            let rows = rows.map_or_else(|| Rows::rotated(&flat(&x)?.to_dtype(dtype)?), Ok)?;
            int8::forward(&rows, quantised.matrix(), end)?
        }
        None => product(&flat(&x)?.to_dtype(dtype)?, &weight.dequantised(dtype)?.t()?, end)?,
    };
    unflat(&y, &x, out)
}

/// dx = dy W, the gradient of the input of [`forward`], plus `onto` where one is given.
///
/// `dy` is [.., out], `weight` [out, in], `onto` [.., in]; the result is [.., in] in the weight's compute dtype.
pub fn backward_input(dy: &Tensor, weight: &Weight, onto: Option<&Tensor>) -> Result<Tensor> {
    let _noted = profile::scope(Class::Gemm, dy.device());
    let (dtype, (_, input)) = (weight.dtype(), weight.dims()?);
    let (dy_flat, onto) = (flat(dy)?.to_dtype(dtype)?, flat_like(onto, dtype)?);
    let dx = match integers(weight, dy)? {
        Some(quantised) => int8::backward(&dy_flat, quantised.matrix(), onto.as_ref(), dtype)?,
        None => {
            let end = End { onto: onto.as_ref(), ..End::plain(dtype) };
            product(&dy_flat, &weight.dequantised(dtype)?, end)?
        }
    };
    unflat(&dx, dy, input)
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
