//! The flow-matching loss: weighted mean squared error in f32, with its gradient.

use crate::Result;
use crate::Tensor;
use crate::profile::{self, Class};
use candle_core::DType;

/// The loss and its gradient with respect to the prediction.
#[derive(Debug, Clone)]
pub struct Loss {
    /// Scalar f32, on the device: reading it back is the one synchronisation of a logged step.
    pub value: Tensor,
    /// [b, c, t, h, w] f32.
    pub d_prediction: Tensor,
}

/// sum(w (p - y)^2) / sum(m), where w = `sample_weights` * m, and m is `mask` or all ones.
///
/// `prediction`, `target` [b, c, t, h, w]; `sample_weights` `[b]` f32 multiplies each sample's error without changing
/// the denominator; `mask` broadcasts to the prediction, and what it leaves out is left out of the mean too.
pub fn mse(
    prediction: &Tensor,
    target: &Tensor,
    sample_weights: &Tensor,
    mask: Option<&Tensor>,
) -> Result<Loss> {
    let _noted = profile::scope(Class::Elementwise, prediction.device());
    let batch = prediction.dim(0)?;
    let error = (prediction.to_dtype(DType::F32)? - target.to_dtype(DType::F32)?)?;
    let weights = sample_weights.reshape((batch, 1, 1, 1, 1))?;
    let (weights, count) = match mask {
        Some(mask) => {
            let mask = mask.to_dtype(DType::F32)?.broadcast_as(error.shape())?.contiguous()?;
            let count = mask.sum_all()?;
            (mask.broadcast_mul(&weights)?, count)
        }
        None => {
            let count = Tensor::new(error.elem_count() as f32, error.device())?;
            (weights.broadcast_as(error.shape())?.contiguous()?, count)
        }
    };
    let weighted = (&error * weights)?;
    let value = (&weighted * &error)?.sum_all()?.div(&count)?;
    let d_prediction = (weighted * 2.0)?.broadcast_div(&count)?;
    Ok(Loss { value, d_prediction })
}
