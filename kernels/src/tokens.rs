//! Runs of tokens within a tensor.

use crate::Result;
use crate::profile::{self, Class};
use candle_core::Tensor;

/// Writes `part` [b, n, d] over the tokens of `whole` [b, l, d] from `start` on, in the memory that `whole` lies in.
pub fn put(whole: &Tensor, part: &Tensor, start: usize) -> Result<()> {
    let _noted = profile::scope(Class::Elementwise, whole.device());
    whole.slice_set(&part.to_dtype(whole.dtype())?.contiguous()?, 1, start)
}
