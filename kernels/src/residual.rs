//! The residual stream of a block, and what is added to it: gated, x + gate * h, and plain, x + h.
//!
//! Writing a sum that the next op reads again costs two passes over the largest tensors of a block. So the ops that read
//! the stream take it as a [`Stream`], a sum that is not computed yet, and add its parts as they load them, in the order and
//! with the rounding of the separate sums.

use std::ops::Range;

use crate::Result;
use crate::Tensor;
use crate::gpu::{File, Gpu, Launch, fits, suffix};
use crate::profile::{self, Class};
use crate::tokens::{Destination, by_group, from_group, run};
use candle_core::DType;

/// x + gate * gated + plain, as far as there are such parts: `x` [b, l, d] in the dtype of the stream.
#[derive(Debug, Clone)]
pub struct Stream {
    pub(crate) x: Tensor,
    pub(crate) gated: Option<Gated>,
    pub(crate) plain: Option<Tensor>,
}

/// gate * h: `h` [b, l, d], `gate_bg1d` [b, g, 1, d] f32, one row for each group of l/g tokens.
#[derive(Debug, Clone)]
pub(crate) struct Gated {
    pub h: Tensor,
    pub gate_bg1d: Tensor,
}

impl From<&Tensor> for Stream {
    /// A stream that is summed already.
    fn from(x: &Tensor) -> Self {
        Self { x: x.clone(), gated: None, plain: None }
    }
}

impl From<&Self> for Stream {
    fn from(stream: &Self) -> Self {
        stream.clone()
    }
}

impl Stream {
    /// Adds gate * `h`, after `x` and before the plain part.
    #[must_use]
    pub fn gated(self, h: &Tensor, gate_bg1d: &Tensor) -> Self {
        Self { gated: Some(Gated { h: h.clone(), gate_bg1d: gate_bg1d.clone() }), ..self }
    }

    /// Adds `h` [b, l, d] last.
    #[must_use]
    pub fn plus(self, h: &Tensor) -> Self {
        Self { plain: Some(h.clone()), ..self }
    }

    /// The first term of the sum.
    pub fn first(&self) -> &Tensor {
        &self.x
    }

    /// A run of each sample's `tokens`, which are those of `groups`.
    pub fn part(&self, tokens: &Range<usize>, groups: &Range<usize>) -> Result<Self> {
        let gated = self.gated.as_ref().map(|Gated { h, gate_bg1d }| -> Result<_> {
            Ok(Gated { h: run(h, tokens)?, gate_bg1d: run(gate_bg1d, groups)? })
        });
        Ok(Self {
            x: run(&self.x, tokens)?,
            gated: gated.transpose()?,
            plain: self.plain.as_ref().map(|h| run(h, tokens)).transpose()?,
        })
    }

    /// The sum.
    pub fn whole(&self) -> Result<Tensor> {
        let gated = match &self.gated {
            Some(Gated { h, gate_bg1d }) => forward(&self.x, h, gate_bg1d)?,
            None => self.x.clone(),
        };
        match &self.plain {
            Some(h) => add(&gated, h),
            None => Ok(gated),
        }
    }
}

/// y = x + gate * h, in the dtype of the stream `x`.
///
/// `x`, `h` [b, l, d]; `gate_bg1d` [b, g, 1, d] f32, one row for each group of l/g tokens.
pub fn forward(x: impl Into<Stream>, h: &Tensor, gate_bg1d: &Tensor) -> Result<Tensor> {
    let x = x.into();
    let _noted = profile::scope(Class::Elementwise, h.device());
    on_gpu!(h, |gpu| {
        let y = gpu.empty(x.x.shape(), x.x.dtype())?;
        gpu.gated_add(&x, h, gate_bg1d, &y)?.then_some(y)
    });
    let x = &x.whole()?;
    let gated = by_group(&h.to_dtype(gate_bg1d.dtype())?, gate_bg1d)?.broadcast_mul(gate_bg1d)?;
    x + from_group(&gated, x)?.to_dtype(x.dtype())?
}

/// [`forward`], with y written to `to`.
pub fn forward_at(to: Destination, x: impl Into<Stream>, h: &Tensor, gate_bg1d: &Tensor) -> Result<()> {
    let x = x.into();
    on_gpu!(h, |gpu| {
        let _noted = profile::scope(Class::Elementwise, h.device());
        match to.run(&x.x)? {
            Some(y) => gpu.gated_add(&x, h, gate_bg1d, &y)?.then_some(()),
            None => None,
        }
    });
    to.put(&forward(x, h, gate_bg1d)?)
}

/// dh = gate * dy, computed in f32 and rounded to `dtype`; the gradient of `x` is `dy` itself.
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

impl Gpu {
    /// Writes x + gate * h to `y`. Returns false and does nothing if no kernel supports them.
    fn gated_add(&self, x: &Stream, h: &Tensor, gate: &Tensor, y: &Tensor) -> Result<bool> {
        if !x.is_fit(h.dtype())? {
            return Ok(false);
        }
        let Some((launch, width)) = self.launch("gated_add", &x.x, h, Some(gate))? else { return Ok(false) };
        let launch = x.arguments(launch)?.tensor(h)?.tensor(gate)?.tensor(y)?;
        let (quads, per_group) = (h.elem_count() / 4, h.elem_count() / gate.elem_count());
        launch.size(quads).int(width).int(per_group).each(quads)?;
        Ok(true)
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

impl Stream {
    /// Whether the kernels can read it, with parts in `dtype`.
    pub(crate) fn is_fit(&self, dtype: DType) -> Result<bool> {
        let parts = [self.gated.as_ref().map(|gated| &gated.h), self.plain.as_ref()];
        let gate = self.gated.as_ref().map(|gated| &gated.gate_bg1d);
        let is_part = |h: &Tensor| h.dtype() == dtype && h.shape() == self.x.shape();
        Ok(parts.into_iter().flatten().all(is_part)
            && gate.is_none_or(|gate| gate.dtype() == DType::F32)
            && fits(&[Some(&self.x), parts[0], parts[1], gate].into_iter().flatten().collect::<Vec<_>>())?)
    }

    /// x, h, gate, plain, and the rows of x that share a row of the gate.
    pub(crate) fn arguments<'a>(&self, launch: Launch<'a>) -> Result<Launch<'a>> {
        let (h, gate) = match &self.gated {
            Some(Gated { h, gate_bg1d }) => (Some(h), Some(gate_bg1d)),
            None => (None, None),
        };
        let rows = gate.map_or(1, |gate| self.x.elem_count() / gate.elem_count());
        let launch = launch.tensor(&self.x)?.maybe(h)?.maybe(gate)?.maybe(self.plain.as_ref())?;
        Ok(launch.int(rows))
    }
}
