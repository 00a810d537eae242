//! The feed-forward layer of a block: Linear, GELU (tanh), Linear. Its inner width is the largest of the block, so
//! callers send a few thousand tokens through at a time.

use std::ops::Range;

use kernels::{Tensor, gelu};

use super::linear::Linear;
use super::pass::{Gradients, Pass};
use super::reader::Reader;
use crate::Result;
use crate::weights::{Frozen, Weights};

/// The two layers `ffn.0` and `ffn.2`.
#[derive(Debug, Clone)]
pub struct FeedForward {
    up: Linear,
    down: Linear,
}

impl FeedForward {
    /// Loads the feed-forward layer of a block.
    pub fn load(read: &Reader) -> Result<Self> {
        Ok(Self { up: read.linear("ffn.0")?, down: read.linear("ffn.2")? })
    }

    /// Reloads from `weights` the tensors that `changed` has patches for.
    pub(super) fn reload(&mut self, weights: &Weights, changed: &Weights, frozen: Frozen) -> Result<()> {
        self.up.reload(weights, changed, frozen)?;
        self.down.reload(weights, changed, frozen)
    }

    /// Up, then down.
    pub fn linears(&self) -> [&Linear; 2] {
        [&self.up, &self.down]
    }

    /// [`Self::linears`], to change.
    pub(super) fn linears_mut(&mut self) -> [&mut Linear; 2] {
        [&mut self.up, &mut self.down]
    }

    /// The layer with its weights dequantised once for all chunks.
    pub(super) fn decoded(&self) -> Result<Self> {
        Ok(Self { up: self.up.decoded()?, down: self.down.decoded()? })
    }

    /// `x` [b, l, d] -> [b, l, d].
    pub fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.down.forward(&self.up.forward_gelu(x, pass)?, pass)
    }

    /// The gradient of `x`; the inner layer is recomputed.
    pub fn backward(
        &self,
        x: &Tensor,
        dy: &Tensor,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let inner = self.up.forward(x, pass)?;
        let d_active = self.down.backward(&gelu::forward(&inner)?, dy, pass, gradients)?;
        let d_inner = gelu::backward(&inner, &d_active)?;
        drop((inner, d_active));
        self.up.backward(x, &d_inner, pass, gradients)
    }
}

/// Tokens that go through the feed-forward layer together, with the groups of timesteps that they belong to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Of the tokens of a sample.
    pub tokens: Range<usize>,
    /// Of the groups of tokens that share a timestep.
    pub groups: Range<usize>,
}

/// `tokens` tokens in `groups` groups, split into chunks of similar size and at most `most` tokens.
///
/// A chunk is within one group, or consists of whole ones.
pub fn chunks(tokens: usize, groups: usize, most: usize) -> Vec<Chunk> {
    let (size, most) = (tokens / groups.max(1), most.max(1));
    if size > most {
        let of_group = |group: usize| {
            even(size, most).into_iter().map(move |part| Chunk {
                tokens: group * size + part.start..group * size + part.end,
                groups: group..group + 1,
            })
        };
        return (0..groups).flat_map(of_group).collect();
    }
    let parts = even(groups, most / size.max(1));
    parts.into_iter().map(|part| Chunk { tokens: part.start * size..part.end * size, groups: part }).collect()
}

/// 0..`count` in parts of similar size, each at most `most`.
fn even(count: usize, most: usize) -> Vec<Range<usize>> {
    let parts = count.div_ceil(most.max(1));
    (0..parts).map(|i| i * count / parts..(i + 1) * count / parts).collect()
}
