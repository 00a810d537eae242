//! The frozen model: how its weights are held, and what they take.

use std::ops::Range;

use kernels::DType;

use super::config::DitConfig;
use super::layer_id::LayerId;
use crate::weights::{Frozen, TensorSpec};

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
        let ends = config.global_tensors().into_iter().filter(|spec| match spec.name.starts_with("head.") {
            true => range.end == config.layers,
            false => range.start == 0,
        });
        let blocks = range.clone().flat_map(|n| config.block_tensors(LayerId::block(n)));
        ends.chain(blocks).map(|spec| self.bytes_of(&spec)).sum()
    }

    /// Of [`Self::bytes`] those of the matrices of the linear layers, which can be out of the device while the model rests.
    pub fn matrix_bytes(self, config: &DitConfig, range: &Range<usize>) -> u64 {
        range.clone().flat_map(|n| self.matrices(config, n)).sum()
    }

    /// Bytes of each of those matrices of block `n`: they leave one by one. The scales of codes stay.
    pub fn matrices(self, config: &DitConfig, n: usize) -> impl Iterator<Item = u64> {
        config.block_tensors(LayerId::block(n)).into_iter().filter_map(move |spec| {
            match spec.shape.as_slice() {
                &[out, input] => Some(self.frozen.stored_bytes(out, input)),
                _ => None,
            }
        })
    }

    /// Bytes of one tensor of the model.
    fn bytes_of(self, spec: &TensorSpec) -> u64 {
        let numbers: usize = spec.shape.iter().product();
        let is_block = spec.name.starts_with("blocks.");
        let stays_f32 =
            ["head.", "time_", "norm", "modulation", "img_emb.proj.0.", "img_emb.proj.4.", "img_emb.emb_pos"]
                .iter()
                .any(|part| spec.name.contains(part));
        match (spec.shape.as_slice(), stays_f32) {
            (_, true) => numbers as u64 * DType::F32.size_in_bytes() as u64,
            (&[out, input], false) if is_block => self.frozen.bytes(out, input),
            _ => numbers as u64 * self.frozen.compute.size_in_bytes() as u64,
        }
    }
}
