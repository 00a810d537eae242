//! The recipe: what the user wrote. Unknown keys are refused, and nothing is decided here; [`crate::plan`] does that.

use std::fs;
use std::path::{Path, PathBuf};

use data::DataConfig;
use models::adapter::LoraConfig;
use models::adapter::files::{Precision, Style};
use serde::{Deserialize, Serialize};

use crate::base::ModelConfig;
use crate::devices::DevicesConfig;
use crate::error::{Error, Result};
use crate::like::{Like, Taken};
use crate::memory::MemoryConfig;
use crate::noise::TimestepConfig;
use crate::optim::OptimizerConfig;
use crate::sample::SampleConfig;

/// A recipe. `[model]` and `[data]` are needed; all else has defaults.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Where the run lies, and its seed.
    #[serde(default)]
    pub run: RunConfig,
    /// The base model.
    pub model: ModelConfig,
    /// What to train on.
    pub data: DataConfig,
    /// The adapter.
    #[serde(default)]
    pub adapter: LoraConfig,
    /// How long and on what noise.
    #[serde(default)]
    pub train: TrainConfig,
    /// AdamW and its learning rate.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// Stages of the pipeline.
    #[serde(default)]
    pub devices: DevicesConfig,
    /// What a training step keeps, and where.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// When the state is saved.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// Clips made while training.
    #[serde(default)]
    pub sample: SampleConfig,
    /// The adapter files.
    #[serde(default)]
    pub export: ExportConfig,
    /// The defaults that `train.like` put in.
    #[serde(skip)]
    pub taken: Vec<Taken>,
}

/// Where a run lies, and its seed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// Name of the run and its files. Default: the name of the recipe file.
    pub name: Option<String>,
    /// Folder of the run, from the recipe's folder. Default: `runs/<name>` below the current folder, with a number behind
    /// it where a run lies there already.
    pub folder: Option<PathBuf>,
    /// Folder of cached latents and text states. Default: `runs/cache` below the current folder.
    pub cache: Option<PathBuf>,
    /// Seed of everything random. Default 42.
    pub seed: Option<u64>,
}

/// How long training goes on and what each step sees.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Another trainer, whose defaults stand for whatever the recipe does not say of alpha, caption dropout, noise levels and
    /// the optimiser: `musubi-tuner`, `diffusion-pipe`, `ai-toolkit`, `diffsynth-studio`. Default: none, Tandem's own.
    pub like: Option<Like>,
    /// Optimiser steps. Default 1000.
    pub steps: u64,
    /// Samples of a micro-batch. Default 1.
    pub batch: usize,
    /// Micro-batches of a step; with 2 or more, all stages work at once. Default 1.
    pub accumulate: usize,
    /// Share of the samples whose caption is replaced by the empty prompt, 0 to 1. Default 0.1.
    pub caption_dropout: f64,
    /// Share of the samples that are shown their first frame and learn to go on from it, 0 to 1; TI2V-5B alone. Default 0.2.
    pub picture_share: Option<f64>,
    /// Where both experts of a model are trained, the share of the micro-batches that goes to the one for high noise, 0 to
    /// 1. Default: the share of the drawn sigmas that it makes.
    pub high_share: Option<f64>,
    /// How noise levels are drawn and weighted.
    pub timesteps: TimestepConfig,
    /// Steps between two measurements of the held-out loss; 0 for none but the first and last. Default 0.
    pub eval_every: u64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            like: None,
            steps: 1000,
            batch: 1,
            accumulate: 1,
            caption_dropout: 0.1,
            picture_share: None,
            high_share: None,
            timesteps: TimestepConfig::default(),
            eval_every: 0,
        }
    }
}

/// When the state of a run is saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Steps between two checkpoints, each with an adapter file; 0 for none. Default 250.
    pub every_steps: u64,
    /// Minutes between two checkpoints, so that a crash costs no more; 0 for none. Default 30.
    pub every_minutes: u64,
    /// Checkpoints that are kept; older ones are deleted, adapter files never. Default 3.
    pub keep_last: usize,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every_steps: 250, every_minutes: 30, keep_last: 3 }
    }
}

/// The adapter files of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExportConfig {
    /// `comfy`, `comfy-alpha`, `diffusers`, `peft`, `kohya`, `diffsynth`, `videox-fun`, any of them. Default `["comfy"]`.
    pub formats: Vec<Style>,
    /// `bfloat16`, `float16` or `float32`. Default `bfloat16`.
    pub precision: Precision,
}

impl Default for ExportConfig {
    fn default() -> Self {
        Self { formats: vec![Style::Comfy], precision: Precision::Bfloat16 }
    }
}

impl Recipe {
    /// Reads a recipe.
    ///
    /// # Errors
    /// A file that cannot be read or is no TOML; unknown keys, with the nearest one that there is.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|source| Error::Io {
            action: "read the recipe",
            path: path.to_owned(),
            source,
        })?;
        let refuse = |error: toml::de::Error| Error::Recipe {
            path: path.to_owned(),
            why: match nearest_key(error.message()) {
                Some(nearest) => format!("{error}did you mean `{nearest}`?"),
                None => error.to_string(),
            },
        };
        let written: Self = toml::from_str(&text).map_err(refuse)?;
        let Some(like) = written.train.like else { return Ok(written) };
        let mut table: toml::Table = toml::from_str(&text).map_err(refuse)?;
        let taken = like.fill(&mut table);
        Ok(Self { taken, ..table.try_into().map_err(refuse)? })
    }
}

/// What `key` names with `path`, in a recipe of the folder `from`.
///
/// # Errors
/// [`Error::NotThere`].
pub fn existing(key: &str, from: &Path, path: &Path) -> Result<PathBuf> {
    let path = from.join(path);
    match path.exists() {
        true => Ok(path),
        false => Err(Error::NotThere { key: key.to_owned(), path }),
    }
}

/// The valid key nearest to an unknown one, out of the parser's message ("unknown field `x`, expected one of `a`, `b`").
fn nearest_key(message: &str) -> Option<&str> {
    let mut quoted = message.strip_prefix("unknown field ")?.split('`').skip(1).step_by(2);
    let unknown = quoted.next()?;
    quoted.max_by(|a, b| {
        let similarity = |key: &str| strsim::jaro_winkler(unknown, key);
        similarity(a).total_cmp(&similarity(b))
    })
}
