//! What a clip is made from: a run, with the settings of its plan, or a model of the server's folders.

use std::path::{Path, PathBuf};

use models::adapter::files::{self, Style};
use models::dit::DitConfig;
use models::expert::Expert;
use models::published::Defaults;

use super::job::Chosen;
use crate::base::{BaseModel, ModelConfig};
use crate::encode::prompt::ClipRequest;
use crate::error::{Error, Result};
use crate::machine::devices::DevicesConfig;
use crate::plan::Plan;
use crate::sample::{ClipLayout, SampleConfig};
use crate::serve::Server;
use crate::serve::reply::Refusal;
use crate::train::{checkpoint, export, kept};

/// Model, devices and defaults of a clip.
#[derive(Debug)]
pub(super) struct Basis {
    /// The run that they are of.
    pub run: Option<String>,
    pub model: BaseModel,
    pub dit: DitConfig,
    pub defaults: Defaults,
    /// Settled.
    pub devices: DevicesConfig,
    pub layout: ClipLayout,
    /// A clip without a prompt.
    pub request: ClipRequest,
    pub fps: f64,
    pub cache: PathBuf,
    /// Adapters that the run applies to its clips besides its own.
    pub for_clips: Vec<Chosen>,
}

/// A run or a model by its name, with the step behind an `@`.
pub(super) fn split_name(name: &str) -> (&str, Option<&str>) {
    match name.rsplit_once('@') {
        Some((name, step)) => (name, Some(step)),
        None => (name, None),
    }
}

impl Basis {
    /// What the run or model `name` of `server` gives.
    ///
    /// # Errors
    /// 404 where there is none; what cannot be read, or is outside of the folders.
    pub fn of(server: &Server, name: &str) -> std::result::Result<Self, Refusal> {
        let folder = server.places.run(name).filter(|folder| folder.join("plan.toml").is_file());
        match folder {
            Some(folder) => Self::of_run(server, name, &folder),
            None => match server.models().into_iter().find(|model| model.name == name) {
                Some(model) => Ok(Self::of_model(server, &model.folder)?),
                None => Err(Refusal::field(
                    "model",
                    format!("there is no run and no model {name}; /v1/models lists them"),
                )),
            },
        }
    }

    fn of_run(server: &Server, name: &str, folder: &Path) -> std::result::Result<Self, Refusal> {
        let plan = Plan::read(&folder.join("plan.toml"))?;
        for part in [serde_json::json!(plan.model), serde_json::json!(plan.sample)] {
            if let Some((_, path)) = server.places.stray(&part, Path::new("")) {
                let why = format!(
                    "{name} uses {path}, which is outside of the folders of this server; start it with --models for that folder"
                );
                return Err(Refusal::field("model", why));
            }
        }
        let (dit, _) = plan.model.dits.of(Expert::High).open()?;
        let defaults = *dit.defaults(plan.model.dits.networks());
        let frames = plan.data.frames.iter().copied().max().unwrap_or(defaults.frames);
        let size = plan.data.sizes.first().copied().unwrap_or(defaults.size);
        let request = match plan.sample.clips.first() {
            Some(clip) => {
                ClipRequest { prompt: String::new(), image: None, last_image: None, ..clip.clone() }
            }
            None => SampleConfig::default().request(&defaults, size, frames, plan.run.seed),
        };
        let mut for_clips = Vec::new();
        for expert in [None, Some(Expert::High), Some(Expert::Low)] {
            let own = match expert {
                None => &plan.sample.adapter,
                Some(Expert::High) => &plan.sample.adapter_high,
                Some(Expert::Low) => &plan.sample.adapter_low,
            };
            for_clips.extend(own.iter().map(|own| Chosen {
                name: own.path.display().to_string(),
                path: own.path.clone(),
                strength: own.strength,
                expert,
            }));
        }
        Ok(Self {
            run: Some(name.to_owned()),
            model: plan.model.clone(),
            dit,
            defaults,
            devices: plan.devices.clone(),
            layout: plan.sample.layout,
            request,
            fps: plan.data.fps.unwrap_or(defaults.fps),
            cache: server.places.runs.join("cache"),
            for_clips,
        })
    }

    fn of_model(server: &Server, folder: &Path) -> Result<Self> {
        let devices = DevicesConfig::default();
        let config = ModelConfig { folder: Some(folder.to_owned()), ..ModelConfig::default() };
        let model = config.settle(Path::new(""), devices.processor())?;
        let (dit, _) = model.dits.of(Expert::High).open()?;
        let defaults = *dit.defaults(model.dits.networks());
        Ok(Self {
            run: None,
            devices: devices.settle(dit.layers)?,
            layout: ClipLayout::Auto,
            request: SampleConfig::default().request(&defaults, defaults.size, defaults.frames, 42),
            fps: defaults.fps,
            cache: server.places.runs.join("cache"),
            for_clips: Vec::new(),
            model,
            dit,
            defaults,
        })
    }
}

/// The adapters that the run `name` had after `step`, a number, or the last ones; none for `base`.
///
/// # Errors
/// A run without such a step.
pub(super) fn adapters_of_run(
    server: &Server,
    (name, step): (&str, Option<&str>),
    strength: f64,
) -> std::result::Result<Vec<Chosen>, Refusal> {
    let missing = || Refusal::field("lora", format!("there is no run {name}"));
    let folder =
        server.places.run(name).filter(|folder| folder.join("plan.toml").is_file()).ok_or_else(missing)?;
    if step == Some("base") {
        return Ok(Vec::new());
    }
    let plan = Plan::read(&folder.join("plan.toml"))?;
    let ranges = plan.trained_ranges();
    let mut chosen = Vec::new();
    for expert in ranges.iter().map(|range| range.expert()) {
        let steps = kept::steps(&plan, &folder, expert)?;
        let found = match step {
            Some(text) => {
                let step = text.parse().ok().filter(|step| steps.contains(step));
                let known: Vec<String> = steps.iter().map(u64::to_string).collect();
                let why = || {
                    Refusal::field(
                        "model",
                        format!("{name} has no step {text}; there are {}", known.join(", ")),
                    )
                };
                (Some(step.ok_or_else(why)?), kept::written(&plan, &folder, step, expert))
            }
            None => match kept::written(&plan, &folder, None, expert) {
                Some(path) => (None, Some(path)),
                None => {
                    let why = || {
                        Refusal::field(
                            "model",
                            format!("{name} has no adapter yet; {name}@base is its model alone"),
                        )
                    };
                    let step = steps.last().copied().ok_or_else(why)?;
                    (Some(step), kept::written(&plan, &folder, Some(step), expert))
                }
            },
        };
        let path = match found {
            (_, Some(path)) => path,
            (step, None) => of_checkpoint(server, (name, &folder), step.unwrap_or_default(), expert)?,
        };
        let name = found_name(name, found.0);
        // A run of one network of two trains the one that its file is for.
        chosen.push(Chosen { name, path, strength, expert });
    }
    Ok(chosen)
}

fn found_name(run: &str, step: Option<u64>) -> String {
    step.map_or_else(|| run.to_owned(), |step| format!("{run}@{step}"))
}

/// The adapter of a checkpoint that has no adapter file, as a file of the server's own.
fn of_checkpoint(
    server: &Server,
    (name, folder): (&str, &Path),
    step: u64,
    expert: Option<Expert>,
) -> Result<PathBuf> {
    let checkpoint = checkpoint::path(&folder.join("checkpoints"), step);
    let own = server.places.state.join("adapters");
    let io = |source| Error::Io { action: "create the folder", path: own.clone(), source };
    std::fs::create_dir_all(&own).map_err(io)?;
    let mark = expert.map(Expert::suffix).unwrap_or_default();
    let modified = std::fs::metadata(&checkpoint).and_then(|metadata| metadata.modified()).ok();
    let since = modified.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok()).unwrap_or_default();
    // A run that began anew has other steps of the same number.
    let path = own.join(format!("{name}-{step:06}-{}{mark}.safetensors", since.as_millis()));
    if !path.is_file() {
        let file = export::of_checkpoint(&checkpoint, expert, Style::Comfy)?;
        files::write(&path, &file, Style::Comfy, files::Precision::Float32)?;
    }
    Ok(path)
}
