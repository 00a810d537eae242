//! The flow-matching loss in f32, with its gradient: a penalty of each element's error, weighted and averaged.

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

/// What an error `e` of an element counts for, without the factor of its sample. `c` is the scale of the
/// sample's errors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Penalty {
    /// `e^2`.
    #[default]
    Squared,
    /// `|e|`.
    Absolute,
    /// `(e/c)^2 / 2` up to `|e| = c`, and `|e/c| - 1/2` beyond. Times `c^2` it is torch's Huber loss, times `c` its smooth L1 loss.
    Huber,
    /// `sqrt(1 + (e/c)^2) - 1`. Times `c` it is the pseudo-Huber loss.
    PseudoHuber,
}

impl Penalty {
    /// Whether it has a scale.
    pub fn has_scale(self) -> bool {
        matches!(self, Self::Huber | Self::PseudoHuber)
    }
}

/// How the weighted penalties of a batch become one number. With `w` the weight of an element and `s` that of its sample:
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Reduction {
    /// `sum(s w l) / count`: what has little weight makes the loss smaller.
    #[default]
    Elements,
    /// The mean over the samples of `s sum(w l) / sum(w)`: each sample counts alike, whatever its weights. A sample whose weights
    /// are all 0 has the loss 0, and is one of them.
    Samples,
    /// `sum(s w l) / sum(w)` over the batch; 0 where all weights are 0.
    Batch,
}

/// What a loss is made of besides prediction and target.
#[derive(Debug, Clone, Copy)]
pub struct Terms<'a> {
    /// What the error of each element counts for.
    pub penalty: Penalty,
    /// The scale of the errors of each sample, `[b]` f32, where the penalty has one.
    pub scale: Option<&'a Tensor>,
    /// Factor of each sample, `[b]` f32. It changes no denominator.
    pub samples: &'a Tensor,
    /// 1 for what counts and 0 for what is left out, of the mean too; it broadcasts to the prediction.
    pub counted: Option<&'a Tensor>,
    /// Weights of elements, at least 0, which broadcast to the prediction: [b, 1, t, h, w] of all channels.
    pub weights: Option<&'a Tensor>,
    /// How it becomes one number.
    pub reduction: Reduction,
}

impl<'a> Terms<'a> {
    /// The mean square error of what is `counted`, or of all.
    pub fn squares(samples: &'a Tensor, counted: Option<&'a Tensor>) -> Self {
        let (penalty, reduction) = (Penalty::Squared, Reduction::Elements);
        Self { penalty, scale: None, samples, counted, weights: None, reduction }
    }
}

/// Less than any sum of weights that is not 0.
const NOTHING: f64 = 1e-30;

/// The loss of `prediction` and `target` [b, c, t, h, w] by `terms`. Weights of ones give the bits of no weights.
///
/// # Errors
/// Shapes that do not broadcast, and a penalty without its scale.
pub fn loss(prediction: &Tensor, target: &Tensor, terms: &Terms) -> Result<Loss> {
    let _noted = profile::scope(Class::Elementwise, prediction.device());
    let error = (prediction.to_dtype(DType::F32)? - target.to_dtype(DType::F32)?)?;
    let (weights, count) = weights_and_count(&error, terms)?;
    // Each product is summed before the next one is made: they are as large as the prediction.
    let (sum, d_prediction) = match terms.penalty {
        Penalty::Squared => {
            let weighted = (&error * weights)?;
            ((&weighted * &error)?.sum_all()?, (weighted * 2.0)?)
        }
        Penalty::Absolute => ((error.abs()? * &weights)?.sum_all()?, (sign(&error)? * weights)?),
        Penalty::Huber | Penalty::PseudoHuber => scaled(error, weights, terms)?,
    };
    Ok(Loss { value: sum.div(&count)?, d_prediction: d_prediction.broadcast_div(&count)? })
}

/// The weight of each element, and the scalar that the sum over all of them is divided by.
fn weights_and_count(error: &Tensor, terms: &Terms) -> Result<(Tensor, Tensor)> {
    let Terms { samples, counted, weights, reduction, .. } = *terms;
    let (batch, elements) = (error.dim(0)?, error.elem_count());
    let samples = samples.reshape((batch, 1, 1, 1, 1))?;
    let number = |number: usize| Tensor::new(number as f32, error.device());
    let mask = match (counted, weights) {
        (Some(counted), Some(weights)) => {
            Some(counted.to_dtype(DType::F32)?.broadcast_mul(&weights.to_dtype(DType::F32)?)?)
        }
        (Some(mask), None) | (None, Some(mask)) => Some(mask.to_dtype(DType::F32)?),
        (None, None) => None,
    };
    let each = match &mask {
        Some(mask) => mask.broadcast_as(error.shape())?.contiguous()?.broadcast_mul(&samples)?,
        None => samples.broadcast_as(error.shape())?.contiguous()?,
    };
    // The sum over all elements of what is given for some: the other axes repeat it.
    let sum = |mask: &Tensor| mask.sum_all()? * (elements / mask.elem_count()) as f64;
    let (of_elements, all) = (counted.map(|counted| counted.to_dtype(DType::F32)), &mask);
    match (reduction, of_elements, all) {
        (Reduction::Elements, Some(counted), _) => Ok((each, sum(&counted?)?)),
        (Reduction::Batch, _, Some(all)) => Ok((each, sum(all)?.maximum(NOTHING)?)),
        (Reduction::Elements, None, _) | (Reduction::Batch, _, None) => Ok((each, number(elements)?)),
        (Reduction::Samples, _, all) => {
            let of_sample = elements / batch;
            let sums = match all {
                Some(all) => {
                    let repeated = of_sample * all.dim(0)? / all.elem_count();
                    (all.sum_keepdim((1, 2, 3, 4))? * repeated as f64)?.maximum(NOTHING)?
                }
                None => Tensor::full(of_sample as f32, (batch, 1, 1, 1, 1), error.device())?,
            };
            Ok((each.broadcast_div(&sums)?, number(batch)?))
        }
    }
}

/// The sum of the penalties that have a scale, and their slopes, where the error is `error`.
fn scaled(error: Tensor, weights: Tensor, terms: &Terms) -> Result<(Tensor, Tensor)> {
    let missing = || candle_core::Error::Msg("this penalty has a scale for each sample".to_owned());
    let scale = terms.scale.ok_or_else(missing)?.reshape((error.dim(0)?, 1, 1, 1, 1))?;
    let x = error.broadcast_div(&scale)?;
    drop(error);
    let (value, slope) = match terms.penalty {
        Penalty::PseudoHuber => {
            let root = (x.sqr()? + 1.0)?.sqrt()?;
            // sqrt(1 + x^2) - 1 without its cancellation.
            ((x.sqr()? / (&root + 1.0)?)?, (x / root)?)
        }
        _ => {
            let slope = x.clamp(-1.0, 1.0)?;
            ((&slope * (x - (&slope * 0.5)?)?)?, slope)
        }
    };
    let sum = (value * &weights)?.sum_all()?;
    Ok((sum, (slope * weights.broadcast_div(&scale)?)?))
}

/// -1, 0 or 1 by the sign of each element of `x`.
fn sign(x: &Tensor) -> Result<Tensor> {
    x.gt(0.0)?.to_dtype(DType::F32)? - x.neg()?.gt(0.0)?.to_dtype(DType::F32)?
}
