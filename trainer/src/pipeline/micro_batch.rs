//! What goes into the pipeline.

use candle_core::Tensor;
use models::dit::Dropout;

use crate::error::Result;

/// One call of the network: noisy latents, their timesteps, the text, and of some models a picture.
#[derive(Debug, Clone)]
pub struct NetworkInput {
    /// Noisy latents [b, c, t, h, w]; behind them the channels of a picture where the model takes it so.
    pub x_bcthw: Tensor,
    /// 1000 * sigma, `[b]` or `[b, tokens]`, on the host: the embedding reads it there.
    pub timestep: Tensor,
    /// Text states [b, s, text_dim], zero rows behind the shorter ones.
    pub text_bsd: Tensor,
    /// CLIP's states [b, s, width] of each sample's picture, for models with an image branch.
    pub picture_bsd: Option<Tensor>,
}

impl NetworkInput {
    /// (frames, height, width) of the latents.
    pub fn grid(&self) -> Result<(usize, usize, usize)> {
        let (_, _, frames, height, width) = self.x_bcthw.dims5()?;
        Ok((frames, height, width))
    }
}

/// A micro-batch to train on.
#[derive(Debug, Clone)]
pub struct MicroBatch {
    /// What the network sees.
    pub input: NetworkInput,
    /// The velocity noise - x0, [b, c, t, h, w] f32.
    pub target: Tensor,
    /// What each sample's error counts for in the mean over the micro-batch, `[b]`. A step's losses are summed, so these
    /// hold the micro-batch's share of the step too.
    pub weights: Vec<f32>,
    /// What counts in the mean, broadcast over the latents; `None` for all.
    pub mask: Option<Tensor>,
    /// Dropout of the adapters' input.
    pub dropout: Option<Dropout>,
}
