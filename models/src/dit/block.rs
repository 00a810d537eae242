//! One block of the DiT: modulated self-attention, cross-attention, modulated feed-forward, each added to the stream.
//!
//! Source of the formula: Wan-Video/Wan2.1 wan/modules/model.py `WanAttentionBlock.forward`.

use candle_core::{DType, Device, Tensor};
use kernels::{norm, residual};

use super::attention::{CrossAttention, Projections, Saved as SavedAttention, SelfAttention};
use super::config::DitConfig;
use super::ffn::FeedForward;
use super::pass::{Conditioning, Gradients, Pass};
use crate::Result;
use crate::weights::Weights;

/// A frozen block.
#[derive(Debug)]
pub struct Block {
    modulation: Tensor,
    self_attention: SelfAttention,
    norm3_weight: Tensor,
    norm3_bias: Tensor,
    cross_attention: CrossAttention,
    ffn: FeedForward,
    dtype: DType,
    eps: f64,
}

/// What the backward reuses of the forward: the inputs of the three parts and the attentions' insides.
#[derive(Debug)]
pub struct Saved {
    x: Tensor,
    self_in: Tensor,
    self_saved: SavedAttention,
    x_after_self: Tensor,
    cross_in: Tensor,
    cross_saved: SavedAttention,
    x_after_cross: Tensor,
    ffn_in: Tensor,
}

/// The six modulation rows of a block, each [b, g, 1, d] f32.
struct Modulation {
    shift_self: Tensor,
    scale_self: Tensor,
    gate_self: Tensor,
    shift_ffn: Tensor,
    scale_ffn: Tensor,
    gate_ffn: Tensor,
}

impl Block {
    /// Reads block `n`; its linear layers in `dtype`, norms and modulation in f32.
    pub fn load(
        weights: &Weights,
        config: &DitConfig,
        n: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let name = |part: &str| format!("blocks.{n}.{part}");
        let small = |part: &str| weights.tensor(&name(part), DType::F32, device);
        let projections =
            |part: &str| Projections::load(weights, &name(part), config.heads, config.eps, dtype, device);
        Ok(Self {
            modulation: small("modulation")?,
            self_attention: SelfAttention(projections("self_attn")?),
            norm3_weight: small("norm3.weight")?,
            norm3_bias: small("norm3.bias")?,
            cross_attention: CrossAttention(projections("cross_attn")?),
            ffn: FeedForward::load(weights, &name("ffn"), dtype, device)?,
            dtype,
            eps: config.eps,
        })
    }

    /// `x` [b, l, d] -> [b, l, d], and what [`Block::backward`] wants back.
    pub fn forward(&self, x: &Tensor, cond: &Conditioning, pass: &Pass) -> Result<(Tensor, Saved)> {
        let m = self.modulation(cond)?;
        let self_in = norm::modulated_layer_norm(x, &m.shift_self, &m.scale_self, self.eps, self.dtype)?;
        let (attended, self_saved) = self.self_attention.forward(&self_in, cond, pass)?;
        let x_after_self = residual::forward(x, &attended, &m.gate_self)?;

        let cross_in = norm::affine_layer_norm(
            &x_after_self,
            &self.norm3_weight,
            &self.norm3_bias,
            self.eps,
            self.dtype,
        )?;
        let (attended, cross_saved) = self.cross_attention.forward(&cross_in, cond, pass)?;
        let x_after_cross = residual::add(&x_after_self, &attended)?;

        let ffn_in =
            norm::modulated_layer_norm(&x_after_cross, &m.shift_ffn, &m.scale_ffn, self.eps, self.dtype)?;
        let fed = self.ffn.forward(&ffn_in, pass)?;
        let y = residual::forward(&x_after_cross, &fed, &m.gate_ffn)?;

        let x = x.clone();
        Ok((y, Saved { x, self_in, self_saved, x_after_self, cross_in, cross_saved, x_after_cross, ffn_in }))
    }

    /// The gradient of the input of [`Block::forward`], in the dtype of the stream; `dy` [b, l, d].
    pub fn backward(
        &self,
        saved: Saved,
        dy: &Tensor,
        cond: &Conditioning,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let m = self.modulation(cond)?;
        let d_fed = residual::backward(dy, &m.gate_ffn, self.dtype)?;
        let d_in = self.ffn.backward(&saved.ffn_in, &d_fed, pass, gradients)?;
        let dx =
            norm::modulated_layer_norm_backward(&saved.x_after_cross, &d_in, &m.scale_ffn, self.eps, dy)?;

        let d_in =
            self.cross_attention.backward(&saved.cross_in, &saved.cross_saved, &dx, cond, pass, gradients)?;
        let dx =
            norm::affine_layer_norm_backward(&saved.x_after_self, &d_in, &self.norm3_weight, self.eps, &dx)?;

        let d_attended = residual::backward(&dx, &m.gate_self, self.dtype)?;
        let d_in = self.self_attention.backward(
            &saved.self_in,
            &saved.self_saved,
            &d_attended,
            cond,
            pass,
            gradients,
        )?;
        Ok(norm::modulated_layer_norm_backward(&saved.x, &d_in, &m.scale_self, self.eps, &dx)?)
    }

    /// The block's own modulation plus the projected time embedding, in its six rows.
    fn modulation(&self, cond: &Conditioning) -> Result<Modulation> {
        let rows = cond.time_bg6d.broadcast_add(&self.modulation.unsqueeze(1)?)?;
        let row = |i: usize| rows.narrow(2, i, 1)?.contiguous();
        Ok(Modulation {
            shift_self: row(0)?,
            scale_self: row(1)?,
            gate_self: row(2)?,
            shift_ffn: row(3)?,
            scale_ffn: row(4)?,
            gate_ffn: row(5)?,
        })
    }
}
