//! The recipe as the user wrote it. Unknown keys are refused; everything is resolved by [`crate::plan`].

mod assignment;
mod bounds;
pub mod draft;
pub mod like;
mod words;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use data::{DataConfig, Dataset};
use models::adapter::LoraConfig;
use models::adapter::files::{Precision, Style};
use models::published::KindFacts;
use serde::{Deserialize, Serialize};

use crate::base::ModelConfig;
use crate::error::{Error, Result};
use crate::learning::ema::EmaConfig;
use crate::learning::loss::LossConfig;
use crate::learning::noise::TimestepConfig;
use crate::learning::optim::OptimizerConfig;
use crate::learning::prior::PriorConfig;
use crate::learning::slider::SliderConfig;
use crate::learning::step_size::MeanOver;
use crate::machine::devices::DevicesConfig;
use crate::machine::memory::MemoryConfig;
use crate::recipe::like::{Like, Taken};
use crate::sample::SampleConfig;

pub use assignment::Assignment;
pub use bounds::check as check_bounds;
pub use words::{WORDS, defaults};

/// A recipe. `[model]` and `[data]` are required; all else has defaults.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The run's folders, and its seed.
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
    /// The optimiser and its learning rate.
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
    /// The defaults that `train.like` set.
    #[serde(skip)]
    pub taken: Vec<Taken>,
}

/// The folders of a run, and its seed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// Name of the run and its files. Default: the name of the recipe file.
    pub name: Option<String>,
    /// Folder of the run, relative to the recipe's. Default: `runs/<name>` below the current folder, with a number appended if
    /// that has a run already.
    pub folder: Option<PathBuf>,
    /// Folder of cached latents and text states. Default: `runs/cache` below the current folder.
    pub cache: Option<PathBuf>,
    /// Seed of everything random. Default 42.
    pub seed: Option<u64>,
}

/// The length of training and the samples of each step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Another trainer, whose defaults are used for alpha, caption dropout, noise levels and the optimiser where the recipe does
    /// not set them: `musubi-tuner`, `diffusion-pipe`, `ai-toolkit`, `diffsynth-studio`. Default: none, Tandem's own.
    pub like: Option<Like>,
    /// Optimiser steps. Default 1000.
    pub steps: u64,
    /// Epochs, in place of `steps`: the plan converts them to steps. Default: none.
    pub epochs: Option<u64>,
    /// Samples of a micro-batch. Default 1.
    pub batch: usize,
    /// Micro-batches of a step, those of all replicas together; with 2 or more of a replica's own, all its stages work at once.
    /// Default 1.
    pub accumulate: usize,
    /// Tokens of a step, in place of `accumulate`: it ends with the micro-batch that brings its clips to so many. Default: none.
    pub tokens_per_step: Option<u64>,
    /// What the loss of a step is a mean over: its `samples`, or their `tokens`, so that a clip counts by its size and length.
    /// Default `samples`; with `tokens_per_step` `tokens`.
    pub mean_over: Option<MeanOver>,
    /// Fraction of the samples whose caption is replaced by the empty prompt, 0 to 1. Default 0.1.
    pub caption_dropout: f64,
    /// Fraction of the samples whose first frame is given clean, to learn its continuation, 0 to 1; TI2V-5B only. Default 0.2.
    pub picture_share: Option<f64>,
    /// Fractions of the samples of a control model that are shown without each of its conditions.
    pub drop: ConditionDropout,
    /// If both experts of a model are trained, the fraction of the micro-batches for the one for high noise, 0 to 1. Default: the
    /// fraction of the drawn sigmas in its range.
    pub high_share: Option<f64>,
    /// How noise levels are drawn and weighted.
    pub timesteps: TimestepConfig,
    /// What an error counts for.
    pub loss: LossConfig,
    /// Training on the base's own predictions besides.
    pub prior: PriorConfig,
    /// Directions between prompts, which are trained in place of the clips and their captions. Default: none.
    pub sliders: Vec<SliderConfig>,
    /// An average of the adapters.
    pub ema: EmaConfig,
    /// Steps between two measurements of the held-out loss; 0 for none but the first and last. Default 0.
    pub eval_every: u64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            like: None,
            steps: 1000,
            epochs: None,
            batch: 1,
            accumulate: 1,
            tokens_per_step: None,
            mean_over: None,
            caption_dropout: 0.1,
            picture_share: None,
            drop: ConditionDropout::default(),
            high_share: None,
            timesteps: TimestepConfig::default(),
            loss: LossConfig::default(),
            prior: PriorConfig::default(),
            sliders: Vec::new(),
            ema: EmaConfig::default(),
            eval_every: 0,
        }
    }
}

impl TrainConfig {
    /// What the loss of a step is a mean over, settled.
    pub fn mean_over(&self) -> MeanOver {
        let default = if self.tokens_per_step.is_some() { MeanOver::Tokens } else { MeanOver::Samples };
        self.mean_over.unwrap_or(default)
    }

    /// Every text that is trained besides the captions of `dataset`: those of priors and sliders.
    pub fn texts(&self, dataset: &Dataset) -> BTreeSet<String> {
        let mut texts = self.prior.texts(dataset);
        texts.extend(self.sliders.iter().flat_map(SliderConfig::prompts).map(str::to_owned));
        texts
    }

    /// Checks how long a step is.
    ///
    /// # Errors
    /// Lengths that are 0, and keys that contradict each other.
    pub fn check_length(&self) -> Result<()> {
        let refuse = |key: &str, why: &str| Err(Error::Setting { key: key.into(), why: why.into() });
        if self.batch == 0 || self.accumulate == 0 || self.steps == 0 {
            return refuse("train.steps, train.batch, train.accumulate", "must each be at least 1");
        }
        match self.tokens_per_step {
            None => Ok(()),
            Some(0) => refuse("train.tokens_per_step", "must be at least 1"),
            Some(_) if self.accumulate > 1 => {
                let why = "says how many micro-batches a step has, and so does train.tokens_per_step: leave out one of the two";
                refuse("train.accumulate", why)
            }
            Some(_) if self.epochs.is_some() => {
                let why =
                    "with train.tokens_per_step an epoch has no fixed number of steps: give train.steps";
                refuse("train.epochs", why)
            }
            Some(_) => Ok(()),
        }
    }
}

/// Which fraction of the samples of a control model is shown without a condition, 0 to 1; each is drawn by itself. Default: what
/// VideoX-Fun trains with; for Animate, of which no trainer is published, as it is sampled.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConditionDropout {
    /// The control clip, or the pose clip of S2V. Default 0.1; the pose clip of Animate: 0.
    pub control: Option<f64>,
    /// The start picture. Default 0.1; of Animate, the last frame of the clip before, which is the clip's own first frame in training: 0.5.
    pub start: Option<f64>,
    /// The reference picture. Default 0.1; Animate and S2V always have one.
    pub reference: Option<f64>,
    /// CLIP's view of a picture. Default 0.1; of Animate 0.
    pub clip: Option<f64>,
    /// The face clip of Animate: its frames are without a face. Default 0.1.
    pub faces: Option<f64>,
    /// The sound of S2V, as it is beside the negative prompt. Default 0.1.
    pub audio: Option<f64>,
}

/// The published fraction of Fun's conditions, and that of Animate's faces and of S2V's sound.
const DROP: f64 = 0.1;
/// Every second sample of Animate begins a clip, the others continue one.
const DROP_CONTINUED: f64 = 0.5;

impl ConditionDropout {
    /// Each with its key.
    pub fn each(&self) -> [(&'static str, Option<f64>); 6] {
        let Self { control, start, reference, clip, faces, audio } = *self;
        [
            ("train.drop.control", control),
            ("train.drop.start", start),
            ("train.drop.reference", reference),
            ("train.drop.clip", clip),
            ("train.drop.faces", faces),
            ("train.drop.audio", audio),
        ]
    }

    /// Each fraction, settled for a model with these `facts`.
    ///
    /// # Errors
    /// One of a condition that the model does not have, or always has.
    pub fn settled(&self, facts: &KindFacts) -> Result<Self> {
        let refuse = |key: &str, why: &str| Err(Error::Setting { key: key.into(), why: why.into() });
        let Self { control, start, reference, clip, faces, audio } = *self;
        let is_set = |share: Option<f64>| share.is_some_and(|share| share > 0.0);
        if facts.faces && is_set(reference) {
            let why = "Animate always has a reference picture, as its first latent frame; leave it out";
            return refuse("train.drop.reference", why);
        }
        if facts.speech && is_set(reference) {
            return refuse("train.drop.reference", "S2V always has a reference picture; leave it out");
        }
        if facts.speech && (is_set(start) || is_set(clip)) {
            return refuse(
                "train.drop.start, train.drop.clip",
                "S2V has no start picture, and no CLIP looks at one; leave them out",
            );
        }
        if !facts.faces && is_set(faces) {
            return refuse("train.drop.faces", "this model reads no faces; leave it out");
        }
        if !facts.speech && is_set(audio) {
            return refuse("train.drop.audio", "this model hears no speech; leave it out");
        }
        let or = |asked: Option<f64>, [of_animate, of_speech, of_others]: [f64; 3]| {
            let own = if facts.faces { of_animate } else { of_others };
            Some(asked.unwrap_or(if facts.speech { of_speech } else { own }))
        };
        Ok(Self {
            control: or(control, [0.0, DROP, DROP]),
            start: or(start, [DROP_CONTINUED, 0.0, DROP]),
            reference: or(reference, [0.0, 0.0, DROP]),
            clip: or(clip, [0.0, 0.0, DROP]),
            faces: or(faces, [DROP, 0.0, 0.0]),
            // Plans of models without sound are as they were.
            audio: facts.speech.then(|| audio.unwrap_or(DROP)),
        })
    }
}

/// When the state of a run is saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Steps between two checkpoints, each with an adapter file; 0 for none. Default 250.
    pub every_steps: u64,
    /// Minutes between two checkpoints, so that a crash loses no more; 0 for none. Default 30.
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
    /// As [`Self::read_with`].
    pub fn read(path: &Path) -> Result<Self> {
        Self::read_with(path, &[])
    }

    /// Reads a recipe and overrides its settings by `settings` of a command line.
    ///
    /// # Errors
    /// If the file cannot be read or is not TOML, has unknown keys (with the nearest known one), or both steps and epochs.
    pub fn read_with(path: &Path, settings: &[Assignment]) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|source| Error::Io {
            action: "read the recipe",
            path: path.to_owned(),
            source,
        })?;
        let mut table = parsed(path, &text)?;
        // From the text, so that the message shows the line.
        let written: Self = toml::from_str(&text).map_err(|error| refusal(path, &error))?;
        if table_at(&table, "train").is_some_and(|t| t.contains_key("steps") && t.contains_key("epochs")) {
            let why = "give either train.steps or train.epochs, not both".to_owned();
            return Err(Error::Recipe { path: path.to_owned(), why });
        }
        settings.iter().try_for_each(|setting| setting.apply(&mut table))?;
        let like = match settings {
            [] => written.train.like,
            _ => from_table(path, &table, settings)?.train.like,
        };
        let taken = like.map(|like| like.fill(&mut table)).unwrap_or_default();
        if settings.is_empty() && taken.is_empty() {
            return Ok(written);
        }
        Ok(Self { taken, ..from_table(path, &table, settings)? })
    }
}

/// The tables of the recipe at `path`.
///
/// # Errors
/// If it is not TOML, is a file of another trainer, or has Windows paths whose backslashes are escapes.
fn parsed(path: &Path, text: &str) -> Result<toml::Table> {
    let refuse = |why: String| Error::Recipe { path: path.to_owned(), why };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let table = toml::from_str::<toml::Table>(text).map_err(|error| {
        let why = words::windows_path(text).or_else(|| words::foreign_ending(&name));
        refuse(why.unwrap_or_else(|| error.to_string()))
    })?;
    // A backslash that is a valid escape of TOML turns into a tab or a line break in the path.
    if words::has_broken_path(&table)
        && let Some(why) = words::windows_path(text)
    {
        return Err(refuse(why));
    }
    match words::foreign_file(&name, &table) {
        Some(why) => Err(refuse(why)),
        None => Ok(table),
    }
}

fn table_at<'a>(table: &'a toml::Table, section: &str) -> Option<&'a toml::Table> {
    table.get(section)?.as_table()
}

/// The recipe that `table` is, after `settings` were put into it.
fn from_table(path: &Path, table: &toml::Table, settings: &[Assignment]) -> Result<Recipe> {
    table.clone().try_into().map_err(|error: toml::de::Error| {
        let set: Vec<&str> = settings.iter().map(|setting| setting.key.as_str()).collect();
        match refusal(path, &error) {
            Error::Recipe { path, why } if !set.is_empty() => {
                Error::Recipe { path, why: format!("with --set {}: {}", set.join(", "), why.trim_end()) }
            }
            other => other,
        }
    })
}

/// The parser's message, with a suggestion for an unknown key.
fn refusal(path: &Path, error: &toml::de::Error) -> Error {
    let why = match words::meant(error.message()) {
        Some(meant) => format!("{}\n{meant}", error.to_string().trim_end()),
        None => error.to_string(),
    };
    Error::Recipe { path: path.to_owned(), why }
}
