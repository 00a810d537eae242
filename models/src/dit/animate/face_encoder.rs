//! The face encoder: motion vectors of frames to tokens of latent frames.
//!
//! Source: Wan-Video/Wan2.2 wan/modules/animate/face_blocks.py `FaceEncoder`.

use kernels::Tensor;
use kernels::weight::Weight;

use super::super::causal::{CausalConv, activated, heads_apart, heads_together, with_padding_token};
use super::super::reader::Reader;
use super::FACE_HEADS;
use crate::Result;

/// Three causal convolutions, each head alone after the first, and an output layer.
#[derive(Debug, Clone)]
pub struct FaceEncoder {
    first: CausalConv,
    second: CausalConv,
    third: CausalConv,
    out: (Weight, Tensor),
    padding: Tensor,
}

impl FaceEncoder {
    pub fn load(read: &Reader) -> Result<Self> {
        Ok(Self {
            first: CausalConv::load(read, "face_encoder.conv1_local.conv")?,
            second: CausalConv::load(read, "face_encoder.conv2.conv")?,
            third: CausalConv::load(read, "face_encoder.conv3.conv")?,
            out: read.dense("face_encoder.out_proj")?,
            padding: read.tensor("face_encoder.padding_tokens", "")?,
        })
    }

    /// Tokens [b, 1 + n, 5, d] of motion vectors [b, 4 (n - 1) + 1, width], zeros in the first frame, which is the reference's.
    pub fn forward(&self, vectors: &Tensor) -> Result<Tensor> {
        let x = vectors.to_device(self.padding.device())?.to_dtype(self.padding.dtype())?;
        let x = activated(&heads_apart(&self.first.forward(&x, 1)?, FACE_HEADS)?)?;
        let x = activated(&self.second.forward(&x, 2)?)?;
        let x = activated(&self.third.forward(&x, 2)?)?;
        let x = kernels::linear::forward(&x, &self.out.0, Some(&self.out.1), None)?;
        let tokens = with_padding_token(&heads_together(&x, FACE_HEADS)?, &self.padding)?;
        Ok(tokens.pad_with_zeros(1, 1, 0)?)
    }

    pub fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let Self { first, second, third, out: (weight, bias), padding } = self;
        let convs = [first, second, third].into_iter().flat_map(CausalConv::tensors_mut);
        convs.chain(weight.tensors_mut()).chain([bias, padding]).collect()
    }
}
