//! A whole short run at real size, from files that are made for it: every phase with the time that it took.

use std::fs;
use std::path::{Path, PathBuf};

use data::Film;
use models::dit::{DitConfig, Pictures};
use models::expert::Networks;
use models::published::Published;
use models::vae::Generation;
use serde_json::{Value, json};

use super::checkpoint::Made;
use super::model::{dit_preset, dit_presets, umt5_preset, vae_preset};
use super::{ClipSize, rounded};
use crate::error::{Error, Result};
use crate::machine::devices::DevicesConfig;
use crate::machine::precision::{Arithmetic, WeightFormat};
use crate::plan::Plan;
use crate::sample::magcache::CacheConfig;
use crate::train::{self, Ending, RunFolder};
use crate::watch::interrupt::Interrupt;
use crate::watch::ui::Ui;

/// Names for [`whole`]: of the published models whose files it can generate, and `tiny`.
pub fn run_presets() -> Vec<&'static str> {
    dit_presets().into_iter().filter(|name| Published::named(name).is_none_or(can_be_made)).collect()
}

/// Whether a model is one network that needs no CLIP tower and no conditions besides text and pictures.
fn can_be_made(model: &Published) -> bool {
    let facts = model.kind.facts();
    let needs_more = facts.clip_pictures > 0 || facts.pictures == Pictures::Condition;
    model.networks == Networks::Whole && !needs_more
}

/// A whole run that is measured.
#[derive(Debug, Clone)]
pub struct RunBench<'a> {
    /// Sizes by name: one of [`run_presets`].
    pub model: &'a str,
    /// Temporary folder of files, run and cache.
    pub scratch: &'a Path,
    /// Stages.
    pub devices: DevicesConfig,
    /// Storage of the DiT; `None` for bf16.
    pub base: Option<WeightFormat>,
    /// What products with the DiT's matrices are computed in.
    pub arithmetic: Option<Arithmetic>,
    /// Of the clips that are trained and of those that are sampled.
    pub size: ClipSize,
    /// Optimiser steps. There is a checkpoint in the middle and one at the end.
    pub steps: u64,
    /// Micro-batches of a step.
    pub accumulate: usize,
    /// Rank of the adapter.
    pub rank: usize,
    /// Solver steps of the clips before and after training.
    pub solver_steps: usize,
    /// MagCache's rule for the clips after training; those before measure its table.
    pub cache: Option<&'a CacheConfig>,
}

/// Frames a second of the clips that are made, which is also the model's own where that is lower.
const FPS: f64 = 24.0;
/// Clips that are trained on.
const CLIPS: usize = 2;

/// Writes a checkpoint of random weights and two clips, plans a run on them, and trains: phases and rows of the log are
/// reported to `ui`, and everything is returned as one object.
///
/// # Errors
/// An unknown model, what the plan refuses, what stops the run, and files that cannot be written.
pub fn whole(bench: &RunBench, interrupt: &Interrupt, ui: &Ui) -> Result<Value> {
    let begun = std::time::Instant::now();
    let (_made, recipe) = prepared(bench, ui)?;
    let mut planned = ui.phase("planning", || Plan::make(&recipe, &mut |_, _| {}))?;
    let folder = RunFolder::begin(&mut planned.plan)?;
    match train::train(&planned, &folder, interrupt, ui)? {
        Ending::Finished => {}
        Ending::Interrupted => return Err(Error::Interrupted),
    }
    let seconds = step_seconds(&folder.metrics())?;
    let (first, mut later) = (seconds.first().copied(), seconds.get(1..).unwrap_or_default().to_vec());
    later.sort_by(f64::total_cmp);
    Ok(json!({
        "what": "run", "model": bench.model, "stages": planned.plan.devices.stages,
        "weights": planned.plan.model.precision.base.name(),
        "arithmetic": planned.plan.model.precision.arithmetic.name(), "size": bench.size.label(),
        "frames": bench.size.frames, "rank": bench.rank, "accumulate": bench.accumulate, "steps": bench.steps,
        "first_step_s": first.map(|s| rounded(s, 3)),
        "s_per_step": later.get(later.len() / 2).map(|s| rounded(*s, 3)),
        "phases": phases(ui), "s": rounded(begun.elapsed().as_secs_f64(), 2),
    }))
}

/// Writes the files of a run, and its recipe beside them; they are gone with the first of the two.
pub(super) fn prepared(bench: &RunBench, ui: &Ui) -> Result<(Made, PathBuf)> {
    let parts = Parts::of(bench.model)?;
    let made = ui.phase("writing random weights", || {
        let made = Made::new(&parts.dit, bench.scratch)?;
        made.add_encoders(&vae_preset(parts.vae)?, &umt5_preset(parts.text)?)?;
        Ok::<_, Error>(made)
    })?;
    let recipe = made.folder().join("bench.toml");
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Io { action: "write", path, source }
    };
    write_clips(bench.size, made.folder())?;
    fs::write(&recipe, self::recipe(bench)?).map_err(io(&recipe))?;
    Ok((made, recipe))
}

/// The presets that a model consists of.
struct Parts {
    dit: DitConfig,
    vae: &'static str,
    text: &'static str,
}

impl Parts {
    fn of(model: &str) -> Result<Self> {
        let vae = |published: &Published| match published.kind.facts().vae {
            Generation::Wan21 => "wan2.1",
            Generation::Wan22 => "wan2.2",
        };
        let (vae, text) = match Published::named(model) {
            Some(published) if can_be_made(published) => (vae(published), "umt5-xxl"),
            None if run_presets().contains(&model) => ("tiny", "tiny"),
            _ => {
                let known = run_presets().join(", ");
                let why = format!("\"{model}\" is not known to `bench run`; known are {known}");
                return Err(Error::Setting { key: "--model".into(), why });
            }
        };
        Ok(Self { dit: dit_preset(model)?, vae, text })
    }
}

/// The recipe of the run, with its files in the same folder.
fn recipe(bench: &RunBench) -> Result<String> {
    let RunBench { size: ClipSize { width, height, frames }, steps, .. } = *bench;
    let mut recipe = json!({
        "run": { "name": "bench", "folder": "run", "cache": "cache" },
        "model": {
            "dit": "diffusion_pytorch_model.safetensors", "dit_config": "config.json", "vae": "vae.safetensors",
            "text_encoder": "umt5.safetensors", "tokenizer": "tokenizer.json",
        },
        "data": { "folder": "clips", "sizes": [[width, height]], "frames": [frames] },
        "adapter": { "rank": bench.rank },
        "train": { "steps": steps, "accumulate": bench.accumulate },
        "devices": bench.devices,
        "checkpoint": { "every_steps": (steps / 2).max(1), "every_minutes": 0 },
        "sample": { "prompts": ["a bench on a hill"], "steps": bench.solver_steps },
    });
    if let Some(cache) = bench.cache {
        recipe["sample"]["cache"] = json!(cache);
    }
    if let Some(base) = bench.base {
        recipe["model"]["base"] = base.name().into();
    }
    if let Some(arithmetic) = bench.arithmetic {
        recipe["model"]["arithmetic"] = arithmetic.name().into();
    }
    without_nulls(&mut recipe);
    toml::to_string(&recipe).map_err(|error| Error::PlanText { why: error.to_string() })
}

/// TOML has no null.
fn without_nulls(value: &mut Value) {
    if let Some(table) = value.as_object_mut() {
        table.retain(|_, value| !value.is_null());
        table.values_mut().for_each(without_nulls);
    }
}

/// Clips that drift, a little longer than is needed, with captions.
fn write_clips(ClipSize { width, height, frames }: ClipSize, below: &Path) -> Result<()> {
    let folder = below.join("clips");
    fs::create_dir_all(&folder).map_err(|source| Error::Io {
        action: "create",
        path: folder.clone(),
        source,
    })?;
    // At 24 frames a second they last as long as the frames do at the model's own 16 or 24.
    let count = frames * 3 / 2 + 2;
    for clip in 0..CLIPS {
        let pixel = |i: usize| {
            let (frame, at) = (i / (width * height * 3), i / 3 % (width * height));
            ((at % width + at / width + frame * (clip + 2)) * (i % 3 + 1) / 4 % 256) as u8
        };
        let rgb = (0..count * width * height * 3).map(pixel).collect();
        let film = Film::new(width as u32, height as u32, rgb);
        let path = folder.join(format!("clip{clip}.mp4"));
        let film = film.ok_or_else(|| data::DataError::unreadable(&path, "a clip without pixels"))?;
        data::write_mp4(&path, &film, FPS)?;
        let caption = path.with_extension("txt");
        fs::write(&caption, format!("clip number {clip}")).map_err(|source| Error::Io {
            action: "write",
            path: caption,
            source,
        })?;
    }
    Ok(())
}

/// Seconds of each step, from the log at `path`.
pub(super) fn step_seconds(path: &Path) -> Result<Vec<f64>> {
    let io = |source| Error::Io { action: "read", path: path.to_owned(), source };
    let text = fs::read_to_string(path).map_err(io)?;
    let rows = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(rows.filter_map(|row| row["seconds"].as_f64()).collect())
}

/// The phases by name, in the order in which each was first done, with how often and how long in all.
fn phases(ui: &Ui) -> Vec<Value> {
    let mut report: Vec<(&str, usize, f64)> = Vec::new();
    for done in ui.phases() {
        match report.iter_mut().find(|(label, ..)| *label == done.label) {
            Some((_, times, seconds)) => {
                *times += 1;
                *seconds += done.seconds;
            }
            None => report.push((done.label, 1, done.seconds)),
        }
    }
    let row = |(label, times, seconds)| json!({ "phase": label, "times": times, "s": rounded(seconds, 3) });
    report.into_iter().map(row).collect()
}
