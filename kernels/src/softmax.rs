//! Softmax over rows of scores, with the log-sum-exp of each row: part of attention in chunks.

use crate::Tensor;
use candle_core::{D, DType};
use rayon::prelude::*;

use crate::Result;
use crate::cpu::{computed, is_cpu_f32};
use crate::gpu::{File, Gpu, Launch, fits, suffix};

/// softmax(scale * `scores`) over the last axis in the dtype of `scores`, computed in f32; and log(sum(exp(scale * scores))),
/// f32, with a last axis of one.
pub(crate) fn softmax(scores: &Tensor, scale: f64) -> Result<(Tensor, Tensor)> {
    on_gpu!(scores, |gpu| gpu.softmax(scores, scale)?);
    let scaled = (scores.to_dtype(DType::F32)? * scale)?;
    let top = scaled.max_keepdim(D::Minus1)?;
    let weights = scaled.broadcast_sub(&top)?.exp()?;
    let total = weights.sum_keepdim(D::Minus1)?;
    Ok((weights.broadcast_div(&total)?.to_dtype(scores.dtype())?, (top + total.log()?)?))
}

/// The softmax over the last axis, in the dtype of `scores`: forward only, without the sums.
pub fn rows(scores: &Tensor) -> Result<Tensor> {
    let width = scores.dim(D::Minus1)?;
    if !(is_cpu_f32(scores) && width > 0) {
        return Ok(softmax(scores, 1.0)?.0);
    }
    computed([scores], scores.shape(), |[scores]| {
        let mut weights = scores.to_vec();
        weights.par_chunks_mut(width).for_each(|row| {
            let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            row.iter_mut().for_each(|score| *score = (*score - top).exp());
            let total: f32 = row.iter().sum();
            row.iter_mut().for_each(|weight| *weight /= total);
        });
        weights
    })
}

impl Gpu {
    fn softmax(&self, scores: &Tensor, scale: f64) -> Result<Option<(Tensor, Tensor)>> {
        const THREADS: usize = 256;
        let width = scores.dim(D::Minus1)?;
        let Some(suffix) = suffix(scores.dtype()).filter(|_| width % 4 == 0) else { return Ok(None) };
        if scores.elem_count() == 0 || !fits(&[scores])? {
            return Ok(None);
        }
        let mut row = scores.dims().to_vec();
        if let Some(last) = row.last_mut() {
            *last = 1;
        }
        let (y, lse) = (self.empty(scores.shape(), scores.dtype())?, self.empty(row, DType::F32)?);
        let launch = Launch::new(self, File::Softmax, &format!("softmax_{suffix}"))?;
        let launch = launch.tensor(scores)?.tensor(&y)?.tensor(&lse)?.int(width).float(scale);
        launch.rows(scores.elem_count() / width, THREADS)?;
        Ok(Some((y, lse)))
    }
}
