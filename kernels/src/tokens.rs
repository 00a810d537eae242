//! Runs of tokens within a tensor, and groups of them.

use std::ops::Range;

use crate::Result;
use crate::Tensor;
use crate::profile::{self, Class};

/// Where an op writes its result: over the tokens of `whole` [b, l, d] from `start` on, in place.
#[derive(Debug, Clone, Copy)]
pub struct Destination<'a> {
    /// All tokens of each sample.
    pub whole: &'a Tensor,
    /// The first token that is written.
    pub start: usize,
}

impl Destination<'_> {
    /// Writes `part` [b, n, d] there.
    pub fn put(&self, part: &Tensor) -> Result<()> {
        let _noted = profile::scope(Class::Elementwise, self.whole.device());
        self.whole.slice_set(&part.to_dtype(self.whole.dtype())?.contiguous()?, 1, self.start)
    }

    /// A view of the memory of a result like `part`, if it is contiguous.
    pub(crate) fn run(&self, part: &Tensor) -> Result<Option<Tensor>> {
        let run = self.whole.narrow(1, self.start, part.dim(1)?)?;
        let is_fit = run.dtype() == part.dtype() && run.shape() == part.shape();
        Ok((is_fit && crate::gpu::fits(&[&run])?).then_some(run))
    }
}

/// The rows of `x` [b, l, ..] in `tokens`, or of [b, g, ..] those of some groups: a view if possible.
pub fn run(x: &Tensor, tokens: &Range<usize>) -> Result<Tensor> {
    x.narrow(1, tokens.start, tokens.len())?.contiguous()
}

/// An uninitialised tensor like `x`, all of which is to be written through a [`Destination`].
pub fn unwritten(x: &Tensor) -> Result<Tensor> {
    on_gpu!(x, |gpu| Some(gpu.empty(x.shape(), x.dtype())?));
    x.zeros_like()
}

/// [b, l, d] viewed as [b, g, l/g, d] for the groups of a modulation row [b, g, 1, d].
pub(crate) fn by_group(x: &Tensor, row_bg1d: &Tensor) -> Result<Tensor> {
    let (batch, tokens, width) = x.dims3()?;
    let groups = row_bg1d.dim(1)?;
    x.contiguous()?.reshape((batch, groups, tokens / groups, width))
}

/// The inverse of [`by_group`]: back to the shape of `like`.
pub(crate) fn from_group(x: &Tensor, like: &Tensor) -> Result<Tensor> {
    x.reshape(like.shape())
}
