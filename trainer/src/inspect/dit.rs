//! Diffusion transformers.

use std::path::Path;

use models::names;
use models::weights::Checkpoint;
use serde_json::{Value, json};

use super::Report;
use crate::base::DitFiles;

/// Sizes that tell the published models apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sizes {
    width: usize,
    blocks: usize,
    ffn: usize,
    channels_in: usize,
    channels_out: usize,
}

/// The published models: width, channels in, image branch, name.
const PUBLISHED: &[(usize, usize, bool, &str)] = &[
    (1536, 16, false, "Wan 2.1 T2V-1.3B"),
    (5120, 16, false, "Wan 2.1 T2V-14B, or an expert of Wan 2.2 T2V-A14B (same sizes)"),
    (5120, 36, true, "Wan 2.1 I2V-14B"),
    (5120, 36, false, "an expert of Wan 2.2 I2V-A14B"),
    (3072, 48, false, "Wan 2.2 TI2V-5B"),
];

/// Of every published model.
const HEAD_SIZE: usize = 128;

/// The models of a width, for adapters, which do not show the input's channels.
pub(super) fn model_of_width(width: usize, has_image_branch: bool) -> Option<&'static str> {
    match (width, has_image_branch) {
        (5120, false) => Some("Wan 2.1 14B and the experts of Wan 2.2 A14B"),
        _ => PUBLISHED.iter().find(|row| row.0 == width && row.2 == has_image_branch).map(|row| row.3),
    }
}

/// What stands before the names of a DiT; `None` where the file holds none.
pub(super) fn prefix(file: &Checkpoint) -> Option<&'static str> {
    let prefixes = ["", "model.diffusion_model.", "diffusion_model."];
    prefixes.into_iter().find(|prefix| {
        let has = |name: &str| file.contains(&format!("{prefix}{name}"));
        has("patch_embedding.weight")
            && (has("blocks.0.ffn.0.weight") || has("blocks.0.ffn.net.0.proj.weight"))
    })
}

/// Which model, in which layout.
pub(super) fn report(path: &Path, file: &Checkpoint) -> Report {
    let prefix = prefix(file).unwrap_or("");
    let is_diffusers = file.contains(&format!("{prefix}condition_embedder.time_proj.weight"));
    let file_name = |official: &str| match is_diffusers {
        true => names::tensor_to_diffusers(official).unwrap_or_else(|| official.to_owned()),
        false => official.to_owned(),
    };
    let shape = |official: &str| file.shape(&format!("{prefix}{}", file_name(official)));
    let axis = |official: &str, axis: usize| shape(official).and_then(|s| s.get(axis).copied()).unwrap_or(0);
    let sizes = Sizes {
        width: axis("patch_embedding.weight", 0),
        blocks: (0..).take_while(|n| shape(&format!("blocks.{n}.ffn.0.weight")).is_some()).count(),
        ffn: axis("blocks.0.ffn.0.weight", 0),
        channels_in: axis("patch_embedding.weight", 1),
        channels_out: axis("head.head.weight", 0) / 4,
    };
    let layout = match (is_diffusers, prefix) {
        (true, _) => "diffusers".to_owned(),
        (false, "") => "official".to_owned(),
        (false, prefix) => format!("single file with {prefix} before official names (ComfyUI)"),
    };
    let has_image_branch = shape("img_emb.proj.0.weight").is_some();
    let is_vace = file.names().any(|name| name.contains("vace_"));
    let report = Report::new("Wan DiT")
        .with("model", name(&sizes, has_image_branch, is_vace, shape("img_emb.emb_pos").is_some()))
        .with("layout", layout)
        .with("width", sizes.width)
        .with("feed-forward", sizes.ffn)
        .with("blocks", sizes.blocks)
        .with("heads", heads(path, sizes.width))
        .with("channels", json!({ "in": sizes.channels_in, "out": sizes.channels_out }))
        .with("image branch", has_image_branch);
    let scales =
        file.names().filter(|name| name.ends_with("scale_weight") || name.ends_with("weight_scale")).count();
    let report =
        if scales > 0 { report.with("quantisation", format!("8-bit with {scales} scales")) } else { report };
    report.with_metadata(file)
}

fn name(sizes: &Sizes, has_image_branch: bool, is_vace: bool, has_two_pictures: bool) -> &'static str {
    match (is_vace, has_two_pictures) {
        (true, _) => "a Wan VACE model, which Tandem does not train",
        (_, true) => "Wan 2.1 FLF2V-14B (first and last frame), which Tandem does not train",
        _ => PUBLISHED
            .iter()
            .find(|row| (row.0, row.1, row.2) == (sizes.width, sizes.channels_in, has_image_branch))
            .map_or("no published Wan model has these sizes", |row| row.3),
    }
}

/// Heads are in the config alone; all published models have heads of 128.
fn heads(path: &Path, width: usize) -> Value {
    let config = DitFiles::at(path, None).ok().and_then(|files| std::fs::read(files.config?).ok());
    let config: Option<Value> = config.and_then(|text| serde_json::from_slice(&text).ok());
    let known = config.and_then(|config| {
        config.get("num_heads").or(config.get("num_attention_heads")).and_then(Value::as_u64)
    });
    match known {
        Some(heads) => heads.into(),
        None if width.is_multiple_of(HEAD_SIZE) => (width / HEAD_SIZE).into(),
        None => "only its config.json tells".into(),
    }
}
