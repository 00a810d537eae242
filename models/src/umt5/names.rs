//! Names and sizes of UMT5's tensors, official and as HF transformers has them.
//!
//! Source: Wan-Video/Wan2.1 `wan/modules/t5.py`, transformers `modeling_umt5.py`.

use crate::weights::{Checkpoint, TensorSpec};
use crate::{Contents, Result};

/// Tensors outside the layers: (official, HF).
const GLOBAL: [(&str, &str); 2] =
    [("token_embedding.weight", "shared.weight"), ("norm.weight", "encoder.final_layer_norm.weight")];

/// The HF name of the same embedding in files that have it in addition to `shared.weight`, or instead of it.
pub(super) const TIED_EMBEDDING: &str = "encoder.embed_tokens.weight";

/// Tensors of a layer: (official, after `blocks.N.`; HF, after `encoder.block.N.`).
const LAYER: [(&str, &str); 10] = [
    ("norm1.weight", "layer.0.layer_norm.weight"),
    ("attn.q.weight", "layer.0.SelfAttention.q.weight"),
    ("attn.k.weight", "layer.0.SelfAttention.k.weight"),
    ("attn.v.weight", "layer.0.SelfAttention.v.weight"),
    ("attn.o.weight", "layer.0.SelfAttention.o.weight"),
    ("pos_embedding.embedding.weight", "layer.0.SelfAttention.relative_attention_bias.weight"),
    ("norm2.weight", "layer.1.layer_norm.weight"),
    ("ffn.gate.0.weight", "layer.1.DenseReluDense.wi_0.weight"),
    ("ffn.fc1.weight", "layer.1.DenseReluDense.wi_1.weight"),
    ("ffn.fc2.weight", "layer.1.DenseReluDense.wo.weight"),
];

/// How a file spells the names of its tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Spelling {
    is_official: bool,
    /// Whether the file has the embedding as `shared.weight`.
    pub has_shared: bool,
}

impl Spelling {
    /// That of `checkpoint`.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        Self {
            is_official: checkpoint.contains("token_embedding.weight"),
            has_shared: checkpoint.contains("shared.weight"),
        }
    }

    /// The file's name of an official tensor name, if it differs.
    pub fn in_file(self, official: &str) -> Option<String> {
        match (self.is_official, official) {
            (true, _) => None,
            (false, "token_embedding.weight") if !self.has_shared => Some(TIED_EMBEDDING.to_owned()),
            (false, _) => to_hf(official),
        }
    }
}

/// The HF name of an official tensor name.
pub(super) fn to_hf(official: &str) -> Option<String> {
    if let Some((_, hf)) = GLOBAL.iter().find(|(name, _)| *name == official) {
        return Some((*hf).to_owned());
    }
    let (index, tail) = official.strip_prefix("blocks.")?.split_once('.')?;
    let (_, hf) = LAYER.iter().find(|(name, _)| *name == tail)?;
    Some(format!("encoder.block.{index}.{hf}"))
}

/// The sizes of a UMT5 encoder, read from the shapes of its tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Umt5Sizes {
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Width of the states.
    pub width: usize,
    /// Layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of all heads together; not always that of the states.
    pub inner: usize,
    /// Width inside the feed-forward part.
    pub feed_forward: usize,
    /// Rows of a table of relative positions.
    pub buckets: usize,
}

impl Umt5Sizes {
    /// Those of UMT5-XXL, which every Wan model was published with.
    pub const PUBLISHED: Self = Self {
        vocabulary: 256_384,
        width: 4096,
        layers: 24,
        heads: 64,
        inner: 4096,
        feed_forward: 10_240,
        buckets: 32,
    };

    /// Reads the sizes, with `file_name` giving a tensor's name in the file.
    pub(super) fn detect(checkpoint: &Checkpoint, file_name: impl Fn(&str) -> String) -> Result<Self> {
        let axis = |official: &str, axis: usize| {
            let name = file_name(official);
            let found = checkpoint.shape(&name).and_then(|s| s.get(axis).copied()).filter(|n| *n > 0);
            found.ok_or_else(|| Contents::TextEncoder.refusal(checkpoint, &name))
        };
        let layers =
            (0..).take_while(|n| checkpoint.contains(&file_name(&format!("blocks.{n}.norm1.weight"))));
        Ok(Self {
            vocabulary: axis("token_embedding.weight", 0)?,
            width: axis("token_embedding.weight", 1)?,
            layers: layers.count(),
            heads: axis("blocks.0.pos_embedding.embedding.weight", 1)?,
            inner: axis("blocks.0.attn.q.weight", 0)?,
            feed_forward: axis("blocks.0.ffn.gate.0.weight", 0)?,
            buckets: axis("blocks.0.pos_embedding.embedding.weight", 0)?,
        })
    }

    /// Every tensor, by official name.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let (d, inner, ff) = (self.width, self.inner, self.feed_forward);
        let mut specs = vec![
            TensorSpec::new("token_embedding.weight", [self.vocabulary, d]),
            TensorSpec::new("norm.weight", [d]),
        ];
        for n in 0..self.layers {
            specs.extend(LAYER.iter().map(|(tail, _)| {
                let shape = match *tail {
                    "norm1.weight" | "norm2.weight" => vec![d],
                    "attn.o.weight" => vec![d, inner],
                    "pos_embedding.embedding.weight" => vec![self.buckets, self.heads],
                    "ffn.gate.0.weight" | "ffn.fc1.weight" => vec![ff, d],
                    "ffn.fc2.weight" => vec![d, ff],
                    _ => vec![inner, d],
                };
                TensorSpec::new(format!("blocks.{n}.{tail}"), shape)
            }));
        }
        specs
    }
}
