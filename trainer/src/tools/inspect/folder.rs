//! Folders: base models and runs.

use std::path::Path;

use super::{Report, checkpoint};
use crate::base::comfy;
use crate::error::Result;
use crate::plan::Plan;
use crate::train::checkpoint as run_checkpoint;

/// Parts of a base model: where they may be, and their names.
const OFFICIAL: &[&str] = &[
    "high_noise_model",
    "low_noise_model",
    "Wan2.1_VAE.pth",
    "Wan2.1_VAE.safetensors",
    "Wan2.2_VAE.pth",
    "models_t5_umt5-xxl-enc-bf16.pth",
    "models_t5_umt5-xxl-enc-bf16.safetensors",
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "google/umt5-xxl/tokenizer.json",
];
const DIFFUSERS: &[&str] =
    &["transformer", "transformer_2", "vae", "text_encoder", "image_encoder", "tokenizer/tokenizer.json"];

/// What the folder is; `None` if it only has weights, or is not recognised.
///
/// # Errors
/// A run whose plan cannot be read.
pub(super) fn report(path: &Path) -> Result<Option<Report>> {
    if path.join("plan.toml").is_file() {
        return run(path).map(Some);
    }
    if let Some(root) = comfy::root(path) {
        return Ok(Some(comfy_report(path, &root)));
    }
    let (layout, places) = match path.join("model_index.json").is_file() {
        true => ("diffusers", DIFFUSERS),
        false => ("official", OFFICIAL),
    };
    let there: Vec<&str> = places.iter().copied().filter(|place| path.join(place).exists()).collect();
    if there.is_empty() {
        return Ok(None);
    }
    let mut report = Report::new("Wan model folder").with("layout", layout);
    let mut parts = Vec::new();
    if layout == "official" && !path.join("high_noise_model").exists() {
        parts.push((".".to_owned(), part(path)));
    }
    parts.extend(there.iter().map(|place| ((*place).to_owned(), part(&path.join(place)))));
    let missing = missing(layout, &there);
    if !missing.is_empty() {
        report = report.with("missing", missing);
    }
    report.parts = parts;
    Ok(Some(report))
}

/// Every file of weights in ComfyUI's folder of models, whether it belongs to Wan or not.
fn comfy_report(path: &Path, root: &Path) -> Report {
    let below = root.strip_prefix(path).unwrap_or(root);
    let name = |file: &Path| below.join(file).display().to_string();
    let parts = comfy::files(root).into_iter().map(|(_, file)| (name(&file), part(&root.join(&file))));
    Report { parts: parts.collect(), ..Report::new("ComfyUI's folder of models") }
}

/// A part that cannot be read is reported as such: the others are still of interest.
fn part(path: &Path) -> Report {
    match path.extension().is_some_and(|extension| extension == "json") {
        true => Report::new("tokenizer"),
        false => checkpoint(path)
            .unwrap_or_else(|error| Report::new("cannot be used").with("note", error.to_string())),
    }
}

fn missing(layout: &str, there: &[&str]) -> Vec<&'static str> {
    let needed: &[(&str, &str)] = match layout {
        "diffusers" => &[
            ("transformer", "transformer"),
            ("vae", "vae"),
            ("text_encoder", "text_encoder"),
            ("tokenizer", "tokenizer"),
        ],
        _ => &[("VAE", "VAE"), ("models_t5", "text encoder"), ("google", "tokenizer")],
    };
    let is_there = |mark: &str| there.iter().any(|place| place.contains(mark));
    needed.iter().filter(|(mark, _)| !is_there(mark)).map(|(_, name)| *name).collect()
}

fn run(path: &Path) -> Result<Report> {
    let plan = Plan::read(&path.join("plan.toml"))?;
    let newest = run_checkpoint::newest(&path.join("checkpoints"))?;
    let mut report = Report::new("folder of a Tandem run")
        .with("name", plan.run.name)
        .with("base model", plan.model.name)
        .with("steps planned", plan.train.steps)
        .with("rank", plan.adapter.rank())
        .with("clips", plan.dataset.clips);
    if let Some(newest) = newest {
        let name = newest.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        report.parts.push((format!("checkpoints/{name}"), part(&newest)));
    }
    Ok(report)
}
