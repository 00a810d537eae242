//! The encoder of audio: states of the speech encoder to tokens of latent frames.
//!
//! Source: Wan-Video/Wan2.2 wan/modules/s2v/audio_utils.py `CausalAudioEncoder`, auxi_blocks.py `MotionEncoder_tc`.

use kernels::weight::Weight;
use kernels::{DType, Tensor};

use super::super::causal::{CausalConv, activated, heads_apart, heads_together, with_padding_token};
use super::super::reader::Reader;
use super::{COLUMNS_BEFORE, PAST_FRAMES, STATE_WEIGHTS};
use crate::Result;

/// Tokens of a frame besides the padding token.
const HEADS: usize = 4;

/// A weighted mean of states, and causal convolutions: four heads of a frame's own tokens, and one that all share.
#[derive(Debug, Clone)]
pub struct AudioEncoder {
    weights: Tensor,
    local: CausalConv,
    global: CausalConv,
    second: CausalConv,
    third: CausalConv,
    last: (Weight, Tensor),
    padding: Tensor,
}

/// What the encoder makes of the audio of a clip.
pub struct AudioTokens {
    /// [b, t, 5, d].
    pub local: Tensor,
    /// [b, t, d].
    pub global: Tensor,
}

impl AudioEncoder {
    pub fn load(read: &Reader) -> Result<Self> {
        let conv = |name: &str| CausalConv::load(read, &format!("casual_audio_encoder.encoder.{name}.conv"));
        Ok(Self {
            weights: read.undescribed(STATE_WEIGHTS, DType::F32)?,
            local: conv("conv1_local")?,
            global: conv("conv1_global")?,
            second: conv("conv2")?,
            third: conv("conv3")?,
            last: read.dense("casual_audio_encoder.encoder.final_linear")?,
            padding: read.tensor("casual_audio_encoder.encoder.padding_tokens", "")?,
        })
    }

    /// The tokens of states [b, n, width, 4 t].
    pub fn forward(&self, states: &Tensor) -> Result<AudioTokens> {
        let states = states.to_device(self.weights.device())?.to_dtype(DType::F32)?;
        let weights = self.weights.silu()?;
        let mean =
            states.broadcast_mul(&weights)?.sum(1)?.broadcast_div(&weights.sum_all()?.reshape((1, 1, 1))?)?;
        let own = mean.transpose(1, 2)?.contiguous()?;
        let (batch, _, width) = own.dims3()?;
        let before = own.narrow(1, 0, 1)?.broadcast_as((batch, COLUMNS_BEFORE, width))?.contiguous()?;
        let x = Tensor::cat(&[&before, &own], 1)?.to_dtype(self.padding.dtype())?;
        let rest = |x: &Tensor| -> Result<Tensor> {
            let x = activated(&self.second.forward(&activated(x)?, 2)?)?;
            activated(&self.third.forward(&x, 2)?)
        };
        let local = heads_together(&rest(&heads_apart(&self.local.forward(&x, 1)?, HEADS)?)?, HEADS)?;
        let local = with_padding_token(&local, &self.padding)?;
        let global = rest(&self.global.forward(&x, 1)?)?;
        let global = kernels::linear::forward(&global, &self.last.0, Some(&self.last.1), None)?;
        let frames = global.dim(1)? - PAST_FRAMES;
        Ok(AudioTokens {
            local: local.narrow(1, PAST_FRAMES, frames)?.contiguous()?,
            global: global.narrow(1, PAST_FRAMES, frames)?.contiguous()?,
        })
    }

    pub fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let Self { weights, local, global, second, third, last: (weight, bias), padding } = self;
        let convs = [local, global, second, third].into_iter().flat_map(CausalConv::tensors_mut);
        convs.chain(weight.tensors_mut()).chain([weights, bias, padding]).collect()
    }
}
