//! What queries and keys of the self-attention go through: RMSNorm over the model width, then rotary positions.

use crate::Result;
use crate::Tensor;
use crate::gpu::{File, Gpu, Launch, fits, suffix};
use crate::profile::{self, Class};
use crate::{norm, rope};
use candle_core::DType;

/// The rotated heads [b, l, n, h] of `x` [b, l, d], in the dtype of `x`.
///
/// [`norm::rms_norm`] over d with `weight` `[d]`, then [`rope::forward`] by `cos_lp`, `sin_lp` [l, h/2] f32, all in f32
/// but for the norm's own rounding, and rounded once at the end.
pub fn forward(
    x_bld: &Tensor,
    weight: &Tensor,
    cos_lp: &Tensor,
    sin_lp: &Tensor,
    heads: usize,
    eps: f64,
) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x_bld.device());
    on_gpu!(x_bld, |gpu| gpu.norm_rope(x_bld, weight, [cos_lp, sin_lp], heads, eps)?);
    let (batch, tokens, width) = x_bld.dims3()?;
    let y = norm::rms_norm(x_bld, weight, eps, DType::F32)?.reshape((batch, tokens, heads, width / heads))?;
    rope::forward(&y, cos_lp, sin_lp)?.to_dtype(x_bld.dtype())
}

/// The gradient of the input of [`forward`], [b, l, d] in the dtype of `x_bld`; `dy_blnh` [b, l, n, h].
pub fn backward(
    x_bld: &Tensor,
    dy_blnh: &Tensor,
    weight: &Tensor,
    cos_lp: &Tensor,
    sin_lp: &Tensor,
    eps: f64,
) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x_bld.device());
    on_gpu!(x_bld, |gpu| gpu.norm_rope_backward(x_bld, dy_blnh, weight, [cos_lp, sin_lp], eps)?);
    let dy = rope::backward(&dy_blnh.to_dtype(DType::F32)?, cos_lp, sin_lp)?;
    norm::rms_norm_backward(x_bld, &dy.reshape(x_bld.shape())?, weight, eps)
}

impl Gpu {
    fn norm_rope(
        &self,
        x: &Tensor,
        weight: &Tensor,
        [cos, sin]: [&Tensor; 2],
        heads: usize,
        eps: f64,
    ) -> Result<Option<Tensor>> {
        let (batch, tokens, width) = x.dims3()?;
        let Some((rows, _)) = fit(x, weight, [cos, sin], width / heads)? else { return Ok(None) };
        let Some(suffix) = suffix(x.dtype()) else { return Ok(None) };
        let y = self.empty((batch, tokens, heads, width / heads), x.dtype())?;
        let launch =
            Launch::new(self, File::Norm, &format!("norm_rope_{suffix}"))?.tensor(x)?.tensor(weight)?;
        let launch = launch.tensor(cos)?.tensor(sin)?.tensor(&y)?;
        let launch = launch.int(width).int(width / heads).int(tokens).float(eps);
        launch.rows(rows, norm::row_threads(width))?;
        Ok(Some(y))
    }

    fn norm_rope_backward(
        &self,
        x: &Tensor,
        dy: &Tensor,
        weight: &Tensor,
        [cos, sin]: [&Tensor; 2],
        eps: f64,
    ) -> Result<Option<Tensor>> {
        let (_, tokens, width) = x.dims3()?;
        let head = dy.dim(3)?;
        let dy = dy.to_dtype(x.dtype())?;
        let Some((rows, _)) = fit(x, weight, [cos, sin], head)? else { return Ok(None) };
        let Some(suffix) = suffix(x.dtype()) else { return Ok(None) };
        if !fits(&[&dy])? {
            return Ok(None);
        }
        let dx = self.empty(x.shape(), x.dtype())?;
        let launch = Launch::new(self, File::Norm, &format!("norm_rope_backward_{suffix}"))?;
        let launch = launch.tensor(x)?.tensor(&dy)?.tensor(weight)?.tensor(cos)?.tensor(sin)?.tensor(&dx)?;
        let launch = launch.int(width).int(head).int(tokens).float(eps);
        launch.rows(rows, norm::row_threads(width))?;
        Ok(Some(dx))
    }
}

/// [`norm::rows_of`] for heads of a size that is a multiple of four and angles in f32.
fn fit(x: &Tensor, weight: &Tensor, angles: [&Tensor; 2], head: usize) -> Result<Option<(usize, usize)>> {
    let is_fit =
        head.is_multiple_of(4) && angles.iter().all(|angles| angles.dtype() == DType::F32) && fits(&angles)?;
    if is_fit { norm::rows_of(&[x], &[weight]) } else { Ok(None) }
}
