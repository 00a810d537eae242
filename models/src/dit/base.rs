//! The frozen model: how its weights are held, and what they take.

use std::ops::Range;

use kernels::DType;

use super::config::DitConfig;
use super::layer_id::LayerId;
use super::modules::{self, Module};
use crate::weights::{Frozen, TensorClass, TensorSpec};

/// How a frozen DiT is held and computed.
///
/// Whatever is chosen, these stay in f32: norms, modulation, the time embedding and the head. Only the matrices of the
/// linear layers inside blocks are ever coded. Source of the rule: the official code under autocast to bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Base {
    /// The linear layers of the blocks, and the dtype of products, attention, patch and text embedding.
    pub frozen: Frozen,
    /// The dtype of the residual stream: f32, or bf16, which halves what is kept of each block and crosses each
    /// boundary, and rounds three times a block. Gradients of the stream are f32 with either.
    pub stream: DType,
}

impl Base {
    /// Everything in f32.
    pub const F32: Self = Self::new(Frozen::F32);

    /// These weights, and a stream in f32.
    pub const fn new(frozen: Frozen) -> Self {
        Self { frozen, stream: DType::F32 }
    }

    /// Bytes of the weights of the blocks `range`, with the embeddings where it starts at the first block and the head
    /// where it ends at the last.
    pub fn bytes(self, config: &DitConfig, range: &Range<usize>) -> u64 {
        let is_here = |module: &&Module| match module.is_head() {
            true => range.end == config.layers,
            false => range.start == 0,
        };
        let ends = modules::OUTSIDE.iter().filter(is_here).flat_map(|module| module.tensors(config, ""));
        let blocks = range.clone().flat_map(|n| config.block_tensors(LayerId::block(n)));
        ends.chain(blocks).map(|spec| self.bytes_of(&spec)).sum()
    }

    /// Of [`Self::bytes`] those of the matrices of the linear layers, which can be out of the device while the model rests.
    pub fn matrix_bytes(self, config: &DitConfig, range: &Range<usize>) -> u64 {
        range.clone().flat_map(|n| self.matrices(config, n)).sum()
    }

    /// Bytes of each of those matrices of block `n`: they leave one by one. The scales of codes stay.
    pub fn matrices(self, config: &DitConfig, n: usize) -> impl Iterator<Item = u64> {
        let matrices =
            config.block_tensors(LayerId::block(n)).into_iter().filter_map(|spec| spec.adaptable());
        matrices.map(move |(_, out, input)| self.frozen.stored_bytes(out, input))
    }

    /// Bytes of one tensor of the model.
    fn bytes_of(self, spec: &TensorSpec) -> u64 {
        let numbers = spec.shape.iter().product::<usize>() as u64;
        match (spec.class, spec.shape.as_slice()) {
            (TensorClass::Matrix, &[out, input]) => self.frozen.bytes(out, input),
            (TensorClass::Full, _) => numbers * DType::F32.size_in_bytes() as u64,
            _ => numbers * self.frozen.compute.size_in_bytes() as u64,
        }
    }
}
