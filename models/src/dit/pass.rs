//! The parameters of a pass through the blocks: adapters, dropout, gradients.

use std::collections::BTreeMap;

use kernels::Tensor;
use kernels::random::Key;

use super::linear::Linear;
use crate::Result;
use crate::delta::Adapters;

/// The default number of tokens that go through a feed-forward layer at once: enough rows for a product to run at full
/// speed, and for the 14B 0.2 GiB for each tensor of the inner width in bf16.
pub const FFN_TOKENS: usize = 8192;

/// Is shown what goes through the frozen linear layers in a backward: for measuring, it changes nothing.
pub trait LayerWatch: std::fmt::Debug + Send + Sync {
    /// `layer` has the input `x` [b, l, in], and `dy` [b, l, out] is the gradient of its output.
    ///
    /// # Errors
    /// What stops the pass.
    fn seen(&self, layer: &Linear, x: &Tensor, dy: &Tensor) -> Result<()>;
}

/// The parameters of a pass through the blocks besides the frozen weights.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    /// The adapters on this device.
    pub adapters: &'a Adapters,
    /// Dropout on the adapters' input; `None` when sampling or evaluating.
    pub dropout: Option<&'a Dropout>,
    /// The most tokens of a sample that go through a feed-forward layer at once. More are faster up to a few thousand,
    /// and take more memory; the result is the same up to the order of sums.
    pub ffn_tokens: usize,
    /// Who is shown what goes through the layers.
    pub watch: Option<&'a dyn LayerWatch>,
    /// The index in its sample of the first token.
    first_token: usize,
}

/// Dropout of the adapters' input, a pure function of its keys: a replay drops what the forward dropped.
#[derive(Debug, Clone)]
pub struct Dropout {
    /// Fraction of the elements that is dropped, in 0..1.
    pub p: f64,
    /// One key per sample of the batch.
    pub keys: Vec<Key>,
}

impl<'a> Pass<'a> {
    /// A pass of whole samples with these adapters, and [`FFN_TOKENS`].
    pub fn new(adapters: &'a Adapters, dropout: Option<&'a Dropout>) -> Self {
        Self { adapters, dropout, ffn_tokens: FFN_TOKENS, watch: None, first_token: 0 }
    }

    /// The same pass with another bound on the tokens of a feed-forward layer.
    pub fn with_ffn_tokens(self, ffn_tokens: usize) -> Self {
        Self { ffn_tokens, ..self }
    }

    /// The same pass, shown to `watch`.
    pub fn watched(self, watch: Option<&'a dyn LayerWatch>) -> Self {
        Self { watch, ..self }
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

/// Gradients of adapter tensors, f32, by official tensor name (`blocks.0.self_attn.q.lora_A.weight`).
#[derive(Debug, Default)]
pub struct Gradients {
    by_name: BTreeMap<String, Tensor>,
}

impl Gradients {
    /// Adds `gradient` to the one of the tensor `name`.
    pub fn add(&mut self, name: String, gradient: Tensor) -> Result<()> {
        let sum = match self.by_name.remove(&name) {
            Some(sum) => (sum + gradient)?,
            None => gradient,
        };
        sum.relabel("gradients");
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

    /// Adds the gradients of another stage. Stages have different blocks, so no name is in both.
    pub fn extend(&mut self, other: Gradients) {
        self.by_name.extend(other.by_name);
    }
}
