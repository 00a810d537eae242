//! Attention of one head over the positions of a frame, forward only: that of the VAEs.
//!
//! Both of its products are convolutions with kernels of one pixel, whose sums have an order that depends on channels and keys
//! alone: a query's result is the same to the bit however many queries are computed with it. A library's matrix product, which takes
//! another algorithm for other sizes, does not promise that.

use crate::Tensor;
use candle_core::{Result, bail};

use crate::conv3d::{Conv3dGeometry, Padding, conv3d};
use crate::profile::{self, Class};
use crate::softmax::softmax;
use crate::video::{pixels, planes};

/// The largest block of scores that is computed at once, in elements: all of a frame of 480x832 pixels.
const MAX_SCORES: usize = 40 << 20;

/// softmax(q k^T / sqrt(C)) v for the pixels of a frame, or of a band of its rows: `q` `[1,C,1,h,w]`, `k` and `v` `[positions,C]` of
/// the whole frame; the result has the shape of `q`.
///
/// # Errors
/// Shapes that do not fit.
pub fn frame_attention(q_bcthw: &Tensor, k_lc: &Tensor, v_lc: &Tensor) -> Result<Tensor> {
    let _noted = profile::scope(Class::Attention, q_bcthw.device());
    let ((batch, channels, frames, height, width), (keys, of_k)) = (q_bcthw.dims5()?, k_lc.dims2()?);
    if (batch, frames, of_k) != (1, 1, channels) || v_lc.dims() != k_lc.dims() {
        bail!("frame_attention: {:?}, {:?}, {:?} do not fit", q_bcthw.dims(), k_lc.dims(), v_lc.dims());
    }
    let (scale, geometry) = (1.0 / (channels as f64).sqrt(), Conv3dGeometry::unit(Padding::default()));
    let k = k_lc.contiguous()?.reshape((keys, channels, 1, 1, 1))?;
    let v = v_lc.t()?.contiguous()?.reshape((channels, keys, 1, 1, 1))?;
    let rows = (MAX_SCORES / (keys * width).max(1)).clamp(1, height.max(1));
    let mut parts = Vec::new();
    for start in (0..height).step_by(rows) {
        let rows = rows.min(height - start);
        let scores = conv3d(&q_bcthw.narrow(3, start, rows)?, &k, None, geometry)?;
        let scores = pixels(&scores)?.contiguous()?.reshape((rows * width, keys))?;
        let (weights, _) = softmax(&scores, scale)?;
        drop(scores);
        let weights = planes(&weights.reshape((1, 1, rows, width, keys))?)?;
        parts.push(pixels(&conv3d(&weights, &v, None, geometry)?)?.contiguous()?);
    }
    planes(&Tensor::cat(&parts, 2)?)
}
