//! Diffusion transformers.

use std::path::Path;

use models::contents::dit_prefix;
use models::names;
use models::published::{self, Facts, Published};
use models::weights::Checkpoint;
use serde_json::{Value, json};

use super::Report;
use crate::base::DitFiles;

/// Of every published model.
const HEAD_SIZE: usize = 128;

/// The models of a width, for adapters, which do not show the input's channels; `has_side_chain` where one changes a side chain.
pub(super) fn model_of_width(
    width: usize,
    has_image_branch: bool,
    has_side_chain: bool,
) -> Option<&'static str> {
    match (width, has_image_branch) {
        (1536, false) if has_side_chain => Some("Wan 2.1 VACE-1.3B"),
        (5120, false) if has_side_chain => Some("Wan 2.1 VACE-14B and the experts of Wan 2.2 VACE-Fun-A14B"),
        (1536, false) => Some("Wan 2.1 T2V-1.3B"),
        (5120, false) => Some("Wan 2.1 14B and the experts of Wan 2.2 A14B"),
        (5120, true) => Some("Wan 2.1 I2V-14B"),
        (3072, false) => Some("Wan 2.2 TI2V-5B and Fun-5B"),
        _ => None,
    }
}

/// Which model, in which layout.
pub(super) fn report(path: &Path, file: &Checkpoint) -> Report {
    let prefix = dit_prefix(file).unwrap_or("");
    let is_diffusers = file.contains(&format!("{prefix}condition_embedder.time_proj.weight"));
    let file_name = |official: &str| match is_diffusers {
        true => names::tensor_to_diffusers(official).unwrap_or_else(|| official.to_owned()),
        false => official.to_owned(),
    };
    let shape = |official: &str| file.shape(&format!("{prefix}{}", file_name(official)));
    let axis = |official: &str, axis: usize| shape(official).and_then(|s| s.get(axis).copied()).unwrap_or(0);
    let facts = Facts::read(|official| shape(official).map(<[usize]>::to_vec));
    let blocks = (0..).take_while(|n| shape(&format!("blocks.{n}.ffn.0.weight")).is_some()).count();
    let layout = match (is_diffusers, prefix) {
        (true, _) => "diffusers".to_owned(),
        (false, "") => "official".to_owned(),
        (false, prefix) => format!("single file with {prefix} before official names (ComfyUI)"),
    };
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let expert = DitFiles::at(&absolute, None).ok().and_then(|files| files.expert_by_name());
    let mut report =
        Report::new("Wan DiT").with("model", name(file, facts, &absolute)).with("layout", layout);
    if let Some(expert) = expert {
        report = report.with("expert", format!("for {expert} noise, by its name"));
    }
    report
        .with("width", facts.width)
        .with("feed-forward", axis("blocks.0.ffn.0.weight", 0))
        .with("blocks", blocks)
        .with("heads", heads(path, facts.width))
        .with("channels", json!({ "in": facts.channels_in, "out": facts.channels_out }))
        .with("image branch", facts.clip_pictures > 0)
        .with_metadata(file)
}

/// Its name.
fn name(file: &Checkpoint, facts: Facts, path: &Path) -> String {
    if let Some(kind) = published::refused(file) {
        return format!("{kind}, which Tandem does not train");
    }
    let found: Vec<String> = Published::at(facts, path).into_iter().map(Published::network).collect();
    match found.as_slice() {
        [] => "no published Wan model has these sizes".to_owned(),
        [one] => one.clone(),
        several => format!("{} (same sizes; only names distinguish them)", several.join(", or ")),
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
        None => "only in its config.json".into(),
    }
}
