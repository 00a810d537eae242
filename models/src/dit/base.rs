//! The storage and the dtypes of a frozen model.

use kernels::DType;

use super::streaming::Streamed;
use crate::weights::Frozen;

/// How a frozen DiT is stored, and in which dtypes it computes.
///
/// Norms, modulation, the time embedding and the head are always in f32. Only the matrices of the linear layers inside
/// blocks can be quantised. Source of the rule: the official code under autocast to bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Base {
    /// The linear layers of the blocks, and the dtype of products, attention, patch and text embedding.
    pub frozen: Frozen,
    /// The dtype of the residual stream: f32, or bf16, which halves what is kept of each block and crosses each
    /// boundary, and rounds three times a block. Gradients of the stream are f32 with either.
    pub stream: DType,
    /// The blocks whose matrices stay in host memory. No number depends on it.
    pub streamed: Streamed,
}

impl Base {
    /// Everything in f32.
    pub const F32: Self = Self::new(Frozen::F32);

    /// These weights, and a stream in f32.
    pub const fn new(frozen: Frozen) -> Self {
        Self { frozen, stream: DType::F32, streamed: Streamed::NONE }
    }
}
