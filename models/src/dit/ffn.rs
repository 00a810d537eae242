//! The feed-forward layer of a block: Linear, GELU (tanh), Linear.

use candle_core::{Device, Tensor};
use kernels::gelu;

use super::linear::Linear;
use super::pass::{Gradients, Pass};
use crate::Result;
use crate::weights::{Frozen, Weights};

/// The two layers `ffn.0` and `ffn.2`.
#[derive(Debug)]
pub struct FeedForward {
    up: Linear,
    down: Linear,
}

impl FeedForward {
    /// Reads `<prefix>.0` and `<prefix>.2`.
    pub fn load(weights: &Weights, prefix: &str, frozen: Frozen, device: &Device) -> Result<Self> {
        Ok(Self {
            up: Linear::load(weights, format!("{prefix}.0"), frozen, device)?,
            down: Linear::load(weights, format!("{prefix}.2"), frozen, device)?,
        })
    }

    /// Up, then down.
    pub fn linears(&self) -> [&Linear; 2] {
        [&self.up, &self.down]
    }

    /// `x` [b, l, d] -> [b, l, d]. Nothing is saved: its inner width is the largest of the block.
    pub fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.down.forward(&gelu::forward(&self.up.forward(x, pass)?)?, pass)
    }

    /// The gradient of `x`; the inner layer is made again.
    pub fn backward(
        &self,
        x: &Tensor,
        dy: &Tensor,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let inner = self.up.forward(x, pass)?;
        let d_active = self.down.backward(&gelu::forward(&inner)?, dy, pass, gradients)?;
        self.up.backward(x, &gelu::backward(&inner, &d_active)?, pass, gradients)
    }
}
