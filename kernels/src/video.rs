//! The memory layout of videos `[B,C,T,H,W]`, and ops that keep it.
//!
//! On the CPU each channel is a plane of its own. On a GPU the channels of a pixel lie side by side, `[B,T,H,W,C]` in
//! memory: that is what its convolutions read and write. Shapes and values never depend on the order; an op that
//! needs planes makes them, at the cost of a copy.

use crate::{Device, Tensor};
use candle_core::Result;

use crate::gpu::{File, Gpu, Launch, suffix};
use crate::profile::{self, Class};
use crate::residual;

/// `x` [B,C,..] viewed as [B,..,C]: contiguous if the layout is channels-last.
pub(crate) fn pixels(x: &Tensor) -> Result<Tensor> {
    let order: Vec<usize> = [0].into_iter().chain(2..x.rank()).chain([1]).collect();
    x.permute(order)
}

/// The inverse of [`pixels`]: `rows` [B,..,C] seen as [B,C,..].
pub(crate) fn planes(rows: &Tensor) -> Result<Tensor> {
    let last = rows.rank() - 1;
    let order: Vec<usize> = [0, last].into_iter().chain(1..last).collect();
    rows.permute(order)
}

/// `x` as [`pixels`] if its layout is channels-last.
fn side_by_side(x: &Tensor) -> Result<Option<Tensor>> {
    let rows = pixels(x)?;
    Ok((rows.is_contiguous() && !x.is_contiguous()).then_some(rows))
}

/// The kernels of a convolution `[O,I,kt,kh,kw]`, or anything else of `[B,C,..]`, in the order that its device likes best.
pub fn arranged(x: &Tensor) -> Result<Tensor> {
    match x.device() {
        Device::Cpu => x.contiguous(),
        _ => planes(&pixels(x)?.contiguous()?),
    }
}

/// `x + y`, of one shape.
pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    match (side_by_side(x)?, side_by_side(y)?) {
        (Some(x), Some(y)) => planes(&residual::add(&x, &y)?),
        _ => residual::add(x, y),
    }
}

/// `x / (1 + exp(-x))`.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x.device());
    match side_by_side(x)? {
        Some(x) => planes(&x.silu()?),
        None => x.silu(),
    }
}

/// The larger of `x` and 0.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x.device());
    match side_by_side(x)? {
        Some(x) => planes(&x.relu()?),
        None => x.relu(),
    }
}

/// The frames of `earlier` `[B,C,P,H,W]`, then those of `later` `[B,C,T,H,W]`.
pub fn join_frames(earlier: &Tensor, later: &Tensor) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, later.device());
    match (side_by_side(earlier)?, side_by_side(later)?) {
        (Some(earlier), Some(later)) => planes(&Tensor::cat(&[earlier, later], 1)?),
        _ => Tensor::cat(&[earlier, later], 2),
    }
}

/// The first or the last row of each frame of `x` `[B,C,T,H,W]` in memory of its own, the channels of a pixel side by side:
/// `[B,T,1,W,C]`.
pub fn edge_row(x: &Tensor, edge: Edge) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x.device());
    let at = if edge == Edge::Top { 0 } else { x.dim(3)?.saturating_sub(1) };
    pixels(x)?.narrow(2, at, 1)?.force_contiguous()
}

/// The frames of `x` `[B,C,T,H,W]` with rows of others around them, as [`edge_row`] has them.
pub fn with_rows(above: Option<&Tensor>, x: &Tensor, below: Option<&Tensor>) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x.device());
    match side_by_side(x)? {
        Some(rows) => {
            let parts: Vec<&Tensor> = above.into_iter().chain([&rows]).chain(below).collect();
            planes(&Tensor::cat(&parts, 2)?)
        }
        None => {
            let [above, below] =
                [above, below].map(|row| row.map(|row| planes(row)?.contiguous()).transpose());
            let (above, below) = (above?, below?);
            let parts: Vec<&Tensor> = above.iter().chain([x]).chain(&below).collect();
            Tensor::cat(&parts, 3)
        }
    }
}

/// A horizontal edge of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edge {
    /// The first row.
    Top,
    /// The last row.
    Bottom,
}

/// The last `frames` of `x` `[B,C,T,H,W]`, or all where there are fewer, in memory of their own.
pub fn last_frames(x: &Tensor, frames: usize) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x.device());
    let n = frames.min(x.dim(2)?);
    let first = x.dim(2)? - n;
    match side_by_side(x)? {
        Some(rows) => planes(&rows.narrow(1, first, n)?.force_contiguous()?),
        None => x.narrow(2, first, n)?.force_contiguous(),
    }
}

impl Gpu {
    /// `x` [B,C,..] as [B,..,C'] without gaps and on a boundary of 16 bytes; zeros fill C up to a multiple of
    /// `multiple`. A copy only where it has to be. Nothing for dtypes without kernels.
    pub(crate) fn pixels(&self, x: &Tensor, multiple: usize) -> Result<Option<Tensor>> {
        let Some(suffix) = suffix(x.dtype()).filter(|_| x.elem_count() > 0) else { return Ok(None) };
        let (batch, channels) = (x.dim(0)?, x.dim(1)?);
        let rows = pixels(x)?;
        let is_ready = channels % multiple == 0 && rows.is_contiguous();
        if is_ready && crate::gpu::address(&rows)? % 16 == 0 {
            return Ok(Some(rows));
        }
        let (x, padded) = (x.contiguous()?, channels.next_multiple_of(multiple));
        let mut shape = rows.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = padded;
        }
        let (y, n) = (self.empty(shape, x.dtype())?, x.elem_count() / (batch * channels));
        let launch = Launch::new(self, File::Volume, &format!("to_rows_{suffix}"))?.tensor(&x)?.tensor(&y)?;
        let tiles = batch * n.div_ceil(32) * padded.div_ceil(32);
        launch.int(channels).int(padded).size(n).rows(tiles, 256)?;
        Ok(Some(y))
    }
}
