//! One table of module names: official (the original checkpoints and ComfyUI), diffusers, kohya.
//!
//! It serves reading and writing, for weights and for adapters. Source: the key names of Wan-Video/Wan2.1
//! `wan/modules/model.py` and of diffusers `transformer_wan.py` with its checkpoint converter.

use crate::dit::LayerId;

/// Modules outside the blocks: (official, diffusers).
const GLOBAL: &[(&str, &str)] = &[
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
];

/// Modules inside `blocks.N.`: (official, diffusers). The affine norm before cross-attention is official
/// `norm3` and diffusers `norm2`: the trap of this table.
const BLOCK: &[(&str, &str)] = &[
    ("modulation", "scale_shift_table"),
    ("self_attn.q", "attn1.to_q"),
    ("self_attn.k", "attn1.to_k"),
    ("self_attn.v", "attn1.to_v"),
    ("self_attn.o", "attn1.to_out.0"),
    ("self_attn.norm_q", "attn1.norm_q"),
    ("self_attn.norm_k", "attn1.norm_k"),
    ("cross_attn.q", "attn2.to_q"),
    ("cross_attn.k", "attn2.to_k"),
    ("cross_attn.v", "attn2.to_v"),
    ("cross_attn.o", "attn2.to_out.0"),
    ("cross_attn.norm_q", "attn2.norm_q"),
    ("cross_attn.norm_k", "attn2.norm_k"),
    ("cross_attn.k_img", "attn2.add_k_proj"),
    ("cross_attn.v_img", "attn2.add_v_proj"),
    ("cross_attn.norm_k_img", "attn2.norm_added_k"),
    ("norm3", "norm2"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
];

/// Splits `blocks.7.self_attn.q` into (layer 7 of the blocks, `self_attn.q`); `None` outside the layers.
pub fn split_layer(name: &str) -> Option<(LayerId, &str)> {
    let (index, module) = name.strip_prefix(LayerId::BLOCKS)?.strip_prefix('.')?.split_once('.')?;
    Some((LayerId::block(index.parse().ok()?), module))
}

/// The diffusers name of an official DiT module (`blocks.0.self_attn.q` -> `blocks.0.attn1.to_q`).
pub fn module_to_diffusers(official: &str) -> Option<String> {
    match split_layer(official) {
        Some((layer, module)) => find(BLOCK, |r| r.0 == module).map(|r| format!("{layer}.{}", r.1)),
        None => find(GLOBAL, |r| r.0 == official).map(|r| r.1.to_owned()),
    }
}

/// The official name of a diffusers DiT module; the inverse of [`module_to_diffusers`].
pub fn module_from_diffusers(diffusers: &str) -> Option<String> {
    match split_layer(diffusers) {
        Some((layer, module)) => find(BLOCK, |r| r.1 == module).map(|r| format!("{layer}.{}", r.0)),
        None => find(GLOBAL, |r| r.1 == diffusers).map(|r| r.0.to_owned()),
    }
}

/// The diffusers name of an official DiT tensor: a module name, or one with `.weight` / `.bias` behind it.
pub fn tensor_to_diffusers(official: &str) -> Option<String> {
    with_suffix(official, module_to_diffusers)
}

/// The official name of a diffusers DiT tensor; the inverse of [`tensor_to_diffusers`].
pub fn tensor_from_diffusers(diffusers: &str) -> Option<String> {
    with_suffix(diffusers, module_from_diffusers)
}

/// The kohya form of an official module name: dots become underscores.
pub fn module_to_kohya(official: &str) -> String {
    official.replace('.', "_")
}

/// The official name of a kohya DiT module; the inverse of [`module_to_kohya`]. The names themselves contain
/// underscores, so it is looked up, not replaced.
pub fn module_from_kohya(kohya: &str) -> Option<String> {
    let spelt = |row: &&(&str, &str), name: &str| module_to_kohya(row.0) == name;
    match kohya.strip_prefix("blocks_").and_then(|rest| rest.split_once('_')) {
        Some((index, module)) => {
            let n: usize = index.parse().ok()?;
            BLOCK.iter().find(|row| spelt(row, module)).map(|row| format!("blocks.{n}.{}", row.0))
        }
        None => GLOBAL.iter().find(|row| spelt(row, kohya)).map(|row| row.0.to_owned()),
    }
}

fn with_suffix(name: &str, map: impl Fn(&str) -> Option<String>) -> Option<String> {
    for suffix in [".weight", ".bias"] {
        if let Some(module) = name.strip_suffix(suffix) {
            return map(module).map(|m| m + suffix);
        }
    }
    map(name)
}

fn find(
    table: &'static [(&str, &str)],
    hit: impl Fn(&(&str, &str)) -> bool,
) -> Option<&'static (&'static str, &'static str)> {
    table.iter().find(|row| hit(row))
}
