//! The residual adds of a block: gated, x + gate * h, and plain, x + h.

use crate::Result;
#[cfg(feature = "cuda")]
use crate::cuda::{File, Gpu, Launch, fits, suffix};
use crate::norm::{by_group, from_group};
use crate::profile::{self, Class};
use candle_core::{DType, Tensor};

/// y = x + gate * h, in the dtype of the stream `x`.
///
/// `x`, `h` [b, l, d]; `gate_bg1d` [b, g, 1, d] f32, one row for each group of l/g tokens.
pub fn forward(x: &Tensor, h: &Tensor, gate_bg1d: &Tensor) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x.device());
    on_gpu!(x, |gpu| gpu.gated_add(x, h, gate_bg1d)?);
    let gated = by_group(&h.to_dtype(gate_bg1d.dtype())?, gate_bg1d)?.broadcast_mul(gate_bg1d)?;
    x + from_group(&gated, x)?.to_dtype(x.dtype())?
}

/// dh = gate * dy, made in f32 and rounded to `dtype`; the gradient of `x` is `dy` itself.
pub fn backward(dy: &Tensor, gate_bg1d: &Tensor, dtype: DType) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, dy.device());
    on_gpu!(dy, |gpu| gpu.gated(dy, gate_bg1d, dtype)?);
    let dh = by_group(&dy.to_dtype(gate_bg1d.dtype())?, gate_bg1d)?.broadcast_mul(gate_bg1d)?;
    from_group(&dh, dy)?.to_dtype(dtype)
}

/// y = x + h, in the dtype of the stream `x`.
pub fn add(x: &Tensor, h: &Tensor) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x.device());
    on_gpu!(x, |gpu| gpu.added(x, h)?);
    x + h.to_dtype(x.dtype())?
}

#[cfg(feature = "cuda")]
impl Gpu {
    fn gated_add(&self, x: &Tensor, h: &Tensor, gate: &Tensor) -> Result<Option<Tensor>> {
        let Some((launch, width)) = self.launch("gated_add", x, h, Some(gate))? else { return Ok(None) };
        let y = self.empty(x.shape(), x.dtype())?;
        let launch = launch.tensor(x)?.tensor(h)?.tensor(gate)?.tensor(&y)?;
        let (quads, per_group) = (x.elem_count() / 4, x.elem_count() / gate.elem_count());
        launch.size(quads).int(width).int(per_group).each(quads)?;
        Ok(Some(y))
    }

    fn added(&self, x: &Tensor, h: &Tensor) -> Result<Option<Tensor>> {
        let Some((launch, _)) = self.launch("add", x, h, None)? else { return Ok(None) };
        let (y, quads) = (self.empty(x.shape(), x.dtype())?, x.elem_count() / 4);
        launch.tensor(x)?.tensor(h)?.tensor(&y)?.size(quads).each(quads)?;
        Ok(Some(y))
    }

    fn gated(&self, dy: &Tensor, gate: &Tensor, dtype: DType) -> Result<Option<Tensor>> {
        let dh = self.empty(dy.shape(), dtype)?;
        let Some((launch, width)) = self.launch("gated", dy, &dh, Some(gate))? else { return Ok(None) };
        let launch = launch.tensor(dy)?.tensor(gate)?.tensor(&dh)?;
        let (quads, per_group) = (dy.elem_count() / 4, dy.elem_count() / gate.elem_count());
        launch.size(quads).int(width).int(per_group).each(quads)?;
        Ok(Some(dh))
    }

    /// The launch of `op` on a stream and what is added to it, and the width, where a kernel takes them.
    fn launch<'a>(
        &'a self,
        op: &str,
        x: &Tensor,
        h: &Tensor,
        gate: Option<&Tensor>,
    ) -> Result<Option<(Launch<'a>, usize)>> {
        let width = x.dim(candle_core::D::Minus1)?;
        let is_gate_fit: Result<bool> =
            gate.map_or(Ok(true), |gate| Ok(gate.dtype() == DType::F32 && fits(&[gate])?));
        let is_pair = x.dtype() == h.dtype() || x.dtype() == DType::F32 || h.dtype() == DType::F32;
        let is_counted = u32::try_from(x.elem_count() / 4).is_ok();
        if !(width % 4 == 0
            && is_counted
            && x.shape() == h.shape()
            && is_pair
            && is_gate_fit?
            && fits(&[x, h])?)
        {
            return Ok(None);
        }
        let (Some(of_x), Some(of_h)) = (suffix(x.dtype()), suffix(h.dtype())) else { return Ok(None) };
        Ok(Some((Launch::new(self, File::Elementwise, &format!("{op}_{of_x}_{of_h}"))?, width)))
    }
}
