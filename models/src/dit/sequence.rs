//! Calls whose tokens are dealt out over several devices, each of which has all layers (sequence parallelism).
//!
//! Nearly all of a block works on single tokens. Around self-attention, which does not, each device exchanges its tokens with all
//! heads for all tokens with some of the heads, and back. Source: DeepSpeed-Ulysses (arXiv 2309.14509), section 3.

use std::fmt;
use std::ops::Range;

use kernels::Tensor;

use super::conditioning::{Conditioning, Embedded};
use super::input::Positions;
use super::role::Role;
use crate::{Error, Result};

/// The exchange of one device with the others, in one call.
pub trait Exchange: fmt::Debug + Send + Sync {
    /// From this device's tokens with all heads, [b, l, n, h], to all tokens with this device's heads. All devices call it in the
    /// same order.
    ///
    /// # Errors
    /// When another device stopped.
    fn to_heads(&self, x_blnh: &Tensor) -> Result<Tensor>;

    /// The inverse of [`Self::to_heads`].
    ///
    /// # Errors
    /// As there.
    fn to_tokens(&self, x_blnh: &Tensor) -> Result<Tensor>;
}

/// `count` things in `parts` consecutive runs, as even as they can be.
///
/// # Errors
/// Fewer things than parts.
pub fn runs(count: usize, parts: usize, what: &str) -> Result<Vec<Range<usize>>> {
    if count < parts || parts == 0 {
        return Err(Error::Mismatch(format!("{count} {what} cannot be dealt out to {parts} devices")));
    }
    Ok((0..parts).map(|part| count * part / parts..count * (part + 1) / parts).collect())
}

/// The tokens of each of `parts` devices, of `tokens` in all with the modulation of `cond`: where that differs between groups of
/// tokens (frames, in models whose first frame is given), whole groups.
///
/// # Errors
/// Fewer tokens, or groups, than devices.
pub fn dealt(tokens: usize, cond: &Conditioning<Embedded>, parts: usize) -> Result<Vec<Range<usize>>> {
    match cond.require(Role::MODULATION)?.dim(1)? {
        1 => runs(tokens, parts, "tokens"),
        groups => {
            let each = tokens / groups;
            let runs = runs(groups, parts, "frames")?.into_iter();
            Ok(runs.map(|groups| groups.start * each..groups.end * each).collect())
        }
    }
}

/// What the layers read of `cond` for the tokens of `own`, of `tokens` in all.
///
/// # Errors
/// When the tensor library fails.
pub fn conditioning_of(
    cond: Conditioning<Embedded>,
    own: &Range<usize>,
    tokens: usize,
) -> Result<Conditioning<Embedded>> {
    cond.try_map(|role, tensor| {
        let groups = if role == Role::MODULATION { tensor.dim(1)? } else { 1 };
        match groups {
            1 => Ok(tensor),
            groups => {
                let each = tokens / groups;
                Ok(tensor.narrow(1, own.start / each, own.len() / each)?.contiguous()?)
            }
        }
    })
}

/// `positions` of the tokens of `own`.
///
/// # Errors
/// Tokens in front of those of the latents.
pub fn positions_of(positions: &Positions, own: &Range<usize>) -> Result<Positions> {
    if positions.in_front > 0 {
        return Err(Error::Mismatch("tokens in front of the latents' are not dealt out to devices".into()));
    }
    let rows = |table: &Tensor| table.narrow(0, own.start, own.len())?.contiguous();
    let (cos_lp, sin_lp) = (rows(&positions.cos_lp)?, rows(&positions.sin_lp)?);
    Ok(Positions { grid: positions.grid, in_front: 0, cos_lp, sin_lp })
}
