//! Names and sizes of the tower's tensors: official, and as HF transformers has them.
//!
//! Source: Wan-Video/Wan2.1 `wan/modules/clip.py`, transformers `modeling_clip.py`.

use crate::weights::{Checkpoint, TensorSpec};
use crate::{Contents, Error, Result};

/// Size of a head of the published tower.
const HEAD: usize = 80;

/// Tensors outside the layers: (official, after `visual.`; HF, after `vision_model.`).
const GLOBAL: [(&str, &str); 5] = [
    ("cls_embedding", "embeddings.class_embedding"),
    ("pos_embedding", "embeddings.position_embedding.weight"),
    ("patch_embedding.weight", "embeddings.patch_embedding.weight"),
    ("pre_norm.weight", "pre_layrnorm.weight"),
    ("pre_norm.bias", "pre_layrnorm.bias"),
];

/// Modules of a layer, each with weight and bias: (official, after `visual.transformer.N.`; HF, after
/// `vision_model.encoder.layers.N.`). HF has separate queries, keys and values, which the official code stacks.
const LAYER: [(&str, &str); 9] = [
    ("norm1", "layer_norm1"),
    ("attn.q", "self_attn.q_proj"),
    ("attn.k", "self_attn.k_proj"),
    ("attn.v", "self_attn.v_proj"),
    ("attn.to_qkv", ""),
    ("attn.proj", "self_attn.out_proj"),
    ("norm2", "layer_norm2"),
    ("mlp.0", "mlp.fc1"),
    ("mlp.2", "mlp.fc2"),
];

/// Who named the tensors of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// Wan's own code.
    Official,
    /// HF transformers, and ComfyUI.
    Hf,
}

/// The sizes of a tower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClipSizes {
    /// Width of the states.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Layers, of which the last is not run.
    pub layers: usize,
    /// Width inside the feed-forward part.
    pub feed_forward: usize,
    /// Height and width of a patch in pixels.
    pub patch: usize,
    /// Rows of states: patches and the class.
    pub rows: usize,
}

impl ClipSizes {
    /// The tower that Wan's models were published with.
    pub const PUBLISHED: Self =
        Self { width: 1280, heads: 16, layers: 32, feed_forward: 5120, patch: 14, rows: 257 };

    /// Reads the sizes; `heads` from a config, else heads are of the published tower's size.
    pub(super) fn detect(checkpoint: &Checkpoint, heads: Option<usize>) -> Result<(Self, Naming)> {
        let naming = match checkpoint.contains("visual.cls_embedding") {
            true => Naming::Official,
            false => Naming::Hf,
        };
        let shape = |name: &str| {
            let name = in_file(name, naming);
            let found = checkpoint.shape(&name).filter(|shape| !shape.contains(&0));
            found.ok_or_else(|| Contents::Clip.refusal(checkpoint, &name))
        };
        let axis = |name: &str, from_end: usize| -> Result<usize> {
            let shape = shape(name)?;
            Ok(shape.len().checked_sub(from_end).map_or(0, |axis| shape[axis]))
        };
        let width = axis("patch_embedding.weight", 4)?;
        let layers = (0..)
            .take_while(|n| checkpoint.contains(&in_file(&format!("transformer.{n}.norm1.weight"), naming)))
            .count();
        let heads = heads.unwrap_or(width / HEAD);
        let sizes = Self {
            width,
            heads,
            layers,
            feed_forward: axis("transformer.0.mlp.0.bias", 1)?,
            patch: axis("patch_embedding.weight", 1)?,
            rows: axis("pos_embedding", 2)?,
        };
        if heads == 0 || !width.is_multiple_of(heads) || sizes.image().is_none() || layers < 2 {
            let path = checkpoint.path().display();
            return Err(Error::Mismatch(format!(
                "{path}: {sizes:?} is not a CLIP picture tower; if it is one, its config.json (num_attention_heads) must \
                 lie beside it"
            )));
        }
        Ok((sizes, naming))
    }

    /// Height and width of the picture in pixels, where its patches make a square.
    pub(super) fn image(&self) -> Option<usize> {
        let side = (self.rows.checked_sub(1)?).isqrt();
        (side * side + 1 == self.rows && side > 0).then_some(side * self.patch)
    }

    /// Every tensor that is read, by official name without `visual.`; where `naming` has queries, keys and values apart,
    /// as `attn.q`, `attn.k`, `attn.v`.
    pub fn tensors(&self, naming: Naming) -> Vec<TensorSpec> {
        let (w, f) = (self.width, self.feed_forward);
        let (class, positions) = match naming {
            Naming::Official => (vec![1, 1, w], vec![1, self.rows, w]),
            Naming::Hf => (vec![w], vec![self.rows, w]),
        };
        let mut specs = vec![
            TensorSpec::new("cls_embedding", class),
            TensorSpec::new("pos_embedding", positions),
            TensorSpec::new("patch_embedding.weight", [w, 3, self.patch, self.patch]),
            TensorSpec::new("pre_norm.weight", [w]),
            TensorSpec::new("pre_norm.bias", [w]),
        ];
        let has = |module: &str| match naming {
            Naming::Official => !matches!(module, "attn.q" | "attn.k" | "attn.v"),
            Naming::Hf => module != "attn.to_qkv",
        };
        for n in 0..self.layers {
            for (module, _) in LAYER.into_iter().filter(|(module, _)| has(module)) {
                let weight = match module {
                    "norm1" | "norm2" => vec![w],
                    "attn.to_qkv" => vec![3 * w, w],
                    "mlp.0" => vec![f, w],
                    "mlp.2" => vec![w, f],
                    _ => vec![w, w],
                };
                let bias = [weight[0]];
                specs.push(TensorSpec::new(format!("transformer.{n}.{module}.weight"), weight));
                specs.push(TensorSpec::new(format!("transformer.{n}.{module}.bias"), bias));
            }
        }
        specs
    }
}

/// The name in a file of one of [`ClipSizes::tensors`].
pub(super) fn in_file(name: &str, naming: Naming) -> String {
    if naming == Naming::Official {
        return format!("visual.{name}");
    }
    if let Some((_, hf)) = GLOBAL.iter().find(|(official, _)| *official == name) {
        return format!("vision_model.{hf}");
    }
    let parts = name.strip_prefix("transformer.").and_then(|rest| rest.split_once('.'));
    let layer = parts.and_then(|(n, rest)| Some((n, rest.rsplit_once('.')?)));
    let found = layer.and_then(|(n, (module, suffix))| {
        let (_, hf) = LAYER.iter().find(|(official, _)| *official == module)?;
        Some(format!("vision_model.encoder.layers.{n}.{hf}.{suffix}"))
    });
    found.unwrap_or_else(|| name.to_owned())
}

/// Whether a file's tensor is not used: the text side, the norm and the projection after the last layer, and buffers that
/// transformers writes.
pub(super) fn is_unused(name: &str) -> bool {
    let starts = [
        "textual.",
        "text_model.",
        "text_projection",
        "visual.post_norm.",
        "vision_model.post_layernorm.",
        "visual_projection.",
    ];
    starts.iter().any(|start| name.starts_with(start))
        || ["log_scale", "logit_scale", "visual.head", "vision_model.embeddings.position_ids"].contains(&name)
}
