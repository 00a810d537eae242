//! What goes along with every pass through the blocks: adapters, dropout, conditioning, gradients.

use std::collections::BTreeMap;

use candle_core::Tensor;
use kernels::random::Key;

use super::config::{DitConfig, PATCH};
use super::rope;
use crate::Result;
use crate::adapter::Adapters;

/// Tokens that go through a feed-forward layer at once where nobody says otherwise: enough rows for a product to run at
/// full speed, and for the 14B 0.2 GiB for each tensor of the inner width in bf16.
pub const FFN_TOKENS: usize = 8192;

/// What a pass through the blocks uses besides the frozen weights.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    /// The adapters on this device.
    pub adapters: &'a Adapters,
    /// Dropout on the adapters' input; `None` when sampling or evaluating.
    pub dropout: Option<&'a Dropout>,
    /// The most tokens of a sample that go through a feed-forward layer at once. More are faster up to a few thousand,
    /// and take more memory; the result is the same up to the order of sums.
    pub ffn_tokens: usize,
    /// The place in its sample of the first token that goes through.
    first_token: usize,
}

/// Dropout of the adapters' input, a pure function of its keys: a replay drops what the forward dropped.
#[derive(Debug, Clone)]
pub struct Dropout {
    /// Share of the elements that is dropped, in 0..1.
    pub p: f64,
    /// One key per sample of the batch.
    pub keys: Vec<Key>,
}

impl<'a> Pass<'a> {
    /// A pass of whole samples with these adapters, and [`FFN_TOKENS`].
    pub fn new(adapters: &'a Adapters, dropout: Option<&'a Dropout>) -> Self {
        Self { adapters, dropout, ffn_tokens: FFN_TOKENS, first_token: 0 }
    }

    /// The same pass with another bound on the tokens of a feed-forward layer.
    pub fn with_ffn_tokens(self, ffn_tokens: usize) -> Self {
        Self { ffn_tokens, ..self }
    }

    /// The pass of the tokens of each sample from `first_token` on.
    pub(super) fn starting_at(self, first_token: usize) -> Self {
        Self { first_token, ..self }
    }

    /// `x` [b, l, in] with the dropout of the module `name` applied.
    pub(super) fn dropped(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        match self.dropout {
            None => Ok(x.clone()),
            Some(dropout) => {
                let keys: Vec<Key> = dropout.keys.iter().map(|key| key.child(name, 0)).collect();
                Ok(kernels::dropout::apply(x, dropout.p, &keys, self.first_token)?)
            }
        }
    }
}

/// The frozen conditioning of one micro-batch, the same for every block. Made once, placed on every stage once.
#[derive(Debug, Clone)]
pub struct Conditioning {
    /// Time embedding e [b, g, d] f32, which the head modulates by; g groups of tokens share a timestep.
    pub time_bgd: Tensor,
    /// Projected time embedding e0 [b, g, 6, d] f32, which the blocks modulate by.
    pub time_bg6d: Tensor,
    /// Text after its embedding, [b, text_len, d].
    pub text_bsd: Tensor,
    /// The picture after its embedding, [b, s, d]; of models with an image branch.
    pub picture_bsd: Option<Tensor>,
    /// Cosines of the rotary angles, [l, h/2] f32.
    pub cos_lp: Tensor,
    /// Sines of the rotary angles, [l, h/2] f32.
    pub sin_lp: Tensor,
}

impl Conditioning {
    /// The conditioning of these three, with the rotary tables for latents of `grid` = (frames, height, width) made on
    /// their device: making them costs less than sending them.
    pub fn new(
        time_bgd: Tensor,
        time_bg6d: Tensor,
        text_bsd: Tensor,
        config: &DitConfig,
        grid: (usize, usize, usize),
    ) -> Result<Self> {
        let tokens = (grid.0, grid.1 / PATCH, grid.2 / PATCH);
        let (cos_lp, sin_lp) = rope::table(config.head_size(), tokens, time_bgd.device())?;
        Ok(Self { time_bgd, time_bg6d, text_bsd, picture_bsd: None, cos_lp, sin_lp })
    }

    /// The same with a picture, as [`super::Embedder::picture`] gives it.
    pub fn with_picture(self, picture_bsd: Option<Tensor>) -> Self {
        Self { picture_bsd, ..self }
    }
}

/// Gradients of adapter tensors, f32, by official tensor name (`blocks.0.self_attn.q.lora_A.weight`).
#[derive(Debug, Default)]
pub struct Gradients {
    by_name: BTreeMap<String, Tensor>,
}

impl Gradients {
    /// Adds `gradient` to what is there under `name`.
    pub fn add(&mut self, name: String, gradient: Tensor) -> Result<()> {
        let sum = match self.by_name.remove(&name) {
            Some(sum) => (sum + gradient)?,
            None => gradient,
        };
        self.by_name.insert(name, sum);
        Ok(())
    }

    /// The gradient of the tensor `name`.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name)
    }

    /// All gradients, ordered by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.by_name.iter().map(|(name, gradient)| (name.as_str(), gradient))
    }

    /// Takes in the gradients of another stage. Stages hold different blocks, so no name is in both.
    pub fn extend(&mut self, other: Gradients) {
        self.by_name.extend(other.by_name);
    }
}
