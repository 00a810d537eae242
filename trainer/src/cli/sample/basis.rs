//! What `tandem sample` starts from: a model alone, a run, or a recipe.

use std::path::{Path, PathBuf};

use models::adapter::Source;
use models::adapter::files;
use models::dit::DitConfig;
use models::expert::Expert;
use models::published::Defaults;
use models::weights::Checkpoint;

use super::Sample;
use super::skips::TABLE;
use crate::adapters;
use crate::base::BaseModel;
use crate::cli::fetch::{fetched, fetched_for};
use crate::encode::prompt::ClipRequest;
use crate::error::{Error, Result};
use crate::machine::devices::DevicesConfig;
use crate::paths::existing;
use crate::plan::{ClipAdapterPlan, Plan, run_plan};
use crate::recipe::Recipe;
use crate::sample::magcache::CacheConfig;
use crate::sample::{ClipFormat, ClipLayout, SampleConfig};
use crate::train;
use crate::train::{checkpoint, export, kept};
use crate::watch::ui::Ui;

/// What clips are made with, before the options of the command line replace parts of it.
pub(in crate::cli) struct Basis {
    pub model: BaseModel,
    /// Sizes of the DiT, or of both experts.
    pub dit: DitConfig,
    pub defaults: Defaults,
    pub devices: DevicesConfig,
    /// The adapters of a run.
    pub loras: Loras,
    /// The settings of a clip without a prompt.
    pub request: ClipRequest,
    /// The clips of a run or a recipe.
    pub clips: Vec<ClipRequest>,
    pub formats: Vec<ClipFormat>,
    pub fps: f64,
    pub cache: PathBuf,
    /// MagCache's rule of a run or a recipe.
    pub magcache: Option<CacheConfig>,
    /// How clips go through the network on several devices.
    pub layout: ClipLayout,
    /// The table for it that the recipe names, or that the run has measured.
    pub table: Option<PathBuf>,
}

/// Adapters by the networks that they are for.
#[derive(Default)]
pub(in crate::cli) struct Loras {
    /// For every network.
    pub all: Vec<Source>,
    /// For the expert for high noise.
    pub high: Vec<Source>,
    /// For the expert for low noise.
    pub low: Vec<Source>,
}

impl Loras {
    /// Those of one expert.
    pub fn of(&mut self, expert: Option<Expert>) -> &mut Vec<Source> {
        match expert {
            None => &mut self.all,
            Some(Expert::High) => &mut self.high,
            Some(Expert::Low) => &mut self.low,
        }
    }
}

impl Basis {
    /// What `sample` is to start from.
    ///
    /// # Errors
    /// A model, a run or a recipe that cannot be used.
    pub fn of(sample: &Sample, ui: &Ui) -> Result<Self> {
        let mut basis = match (&sample.source, &sample.model) {
            (Some(source), _) if source.join("plan.toml").is_file() => Self::of_run(sample, source, ui)?,
            (Some(source), _) if source.is_dir() => {
                let why = format!("{} is not the folder of a run: it has no plan.toml", source.display());
                return Err(Error::Setting { key: "RUN_OR_RECIPE".into(), why });
            }
            (Some(source), _) => Self::of_recipe(sample, source, ui)?,
            (None, Some(model)) => return Self::of_model(sample, model, ui),
            (None, None) => {
                let why = "is missing; name a model, or a run or a recipe".into();
                return Err(Error::Setting { key: "--model".into(), why });
            }
        };
        if let Some(model) = &sample.model {
            let folder = fetched(model, ui)?;
            let devices = sample.devices.over(&basis.devices);
            basis.model = sample.precision.model(&folder).settle("".as_ref(), devices.processor())?;
            basis.dit = basis.model.dits.of(Expert::High).open()?.0;
        }
        Ok(basis)
    }

    /// A model, with the settings that it was published with; sizes are those that an adapter tells that it was trained at.
    fn of_model(sample: &Sample, model: &Path, ui: &Ui) -> Result<Self> {
        let folder = fetched(model, ui)?;
        let devices = sample.devices.config();
        let model = sample.precision.model(&folder).settle("".as_ref(), devices.processor())?;
        let (dit, _) = model.dits.of(Expert::High).open()?;
        let mut defaults = *dit.defaults(model.dits.networks());
        let loras = [&sample.lora, &sample.lora_high, &sample.lora_low].into_iter().flatten();
        for lora in loras {
            let (path, _) = adapters::with_strength("--lora", lora)?;
            let Some((size, frames)) = trained_size(path)? else { continue };
            let [width, height] = size;
            ui.note(&format!(
                "{lora} was trained at {width}x{height}, {frames} frames: clips have that size where nothing else is said"
            ));
            (defaults.size, defaults.frames) = (size, frames);
            break;
        }
        let request = SampleConfig::default().request(
            &defaults,
            defaults.size,
            defaults.frames,
            sample.seed.unwrap_or(42),
        );
        Ok(Self {
            fps: defaults.fps,
            devices,
            loras: Loras::default(),
            request,
            clips: Vec::new(),
            formats: SampleConfig::default().formats,
            cache: PathBuf::from("runs/cache"),
            magcache: None,
            layout: ClipLayout::Auto,
            table: None,
            model,
            dit,
            defaults,
        })
    }

    /// Everything that the plan of the run in `folder` says.
    fn of_run(sample: &Sample, folder: &Path, ui: &Ui) -> Result<Self> {
        if let Some(setting) = sample.settings.first() {
            let why =
                "belongs to a recipe, and this is a run, whose plan is settled; use the options of `sample`";
            return Err(Error::Setting { key: format!("--set {}", setting.key), why: why.into() });
        }
        let plan = Plan::read(&folder.join("plan.toml"))?;
        let (dit, _) = plan.model.dits.of(Expert::High).open()?;
        let defaults = *dit.defaults(plan.model.dits.networks());
        let mut loras = Loras::default();
        if !sample.names_adapters() {
            own_adapters(&plan, folder, sample.checkpoint, &mut loras, ui)?;
        }
        for expert in [None, Some(Expert::High), Some(Expert::Low)] {
            let own = match expert {
                None => &plan.sample.adapter,
                Some(Expert::High) => &plan.sample.adapter_high,
                Some(Expert::Low) => &plan.sample.adapter_low,
            };
            if let Some(ClipAdapterPlan { path, strength }) = own {
                loras.of(expert).push(adapters::source(path, *strength, ui)?);
            }
        }
        let frames = plan.data.frames.iter().copied().max().unwrap_or(defaults.frames);
        let size = plan.data.sizes.first().copied().unwrap_or(defaults.size);
        let request = match plan.sample.clips.first() {
            Some(clip) => ClipRequest { prompt: String::new(), ..clip.clone() },
            None => SampleConfig::default().request(&defaults, size, frames, plan.run.seed),
        };
        Ok(Self {
            fps: plan.data.fps.unwrap_or(defaults.fps),
            devices: plan.devices,
            loras,
            request,
            clips: plan.sample.clips,
            formats: plan.sample.formats,
            cache: plan.run.cache,
            magcache: plan.sample.cache,
            layout: plan.sample.layout,
            table: plan.sample.cache_table.or_else(|| Some(folder.join(TABLE))),
            model: plan.model,
            dit,
            defaults,
        })
    }

    /// Model and clips as the recipe at `path` has them, and the adapter of its newest run, where there is one.
    fn of_recipe(sample: &Sample, path: &Path, ui: &Ui) -> Result<Self> {
        let mut recipe = Recipe::read_with(path, &sample.settings)?;
        let from = path.parent().unwrap_or(Path::new(""));
        if let Some(folder) = fetched_for(&recipe.model, from, ui)? {
            recipe.model.folder = Some(folder);
        }
        let devices = sample.devices.over(&recipe.devices);
        let model = recipe.model.settle(from, devices.processor())?;
        let (dit, _) = model.dits.of(Expert::High).open()?;
        let defaults = *dit.defaults(model.dits.networks());
        let seed = recipe.run.seed.unwrap_or(42);
        let run = run_plan(recipe.run, path, seed);
        let trained = train::newest(&run.folder);
        let mut loras = Loras::default();
        let mut data = recipe.data;
        if let Some(folder) = &trained {
            let plan = Plan::read(&folder.join("plan.toml"))?;
            if !sample.names_adapters() {
                own_adapters(&plan, folder, sample.checkpoint, &mut loras, ui)?;
            }
            // What an imported dataset file says is settled there.
            (data.sizes, data.frames) = (plan.data.sizes, plan.data.frames);
        } else if sample.checkpoint.is_some() {
            return Err(Error::NothingToResume { folder: run.folder });
        } else if !sample.names_adapters() {
            ui.note(&format!(
                "there is no run in {} yet: clips are those of the model alone",
                run.folder.display()
            ));
        }
        for (key, named, expert) in [
            ("sample.adapter", &recipe.sample.adapter, None),
            ("sample.adapter_high", &recipe.sample.adapter_high, Some(Expert::High)),
            ("sample.adapter_low", &recipe.sample.adapter_low, Some(Expert::Low)),
        ] {
            if let Some(named) = named {
                let path = existing(key, from, named)?;
                loras.of(expert).push(adapters::source(&path, recipe.sample.strength, ui)?);
            }
        }
        let frames = data.frames.iter().copied().max().unwrap_or(defaults.frames);
        let size = data.sizes.first().copied().unwrap_or(defaults.size);
        let request = recipe.sample.request(&defaults, size, frames, seed);
        Ok(Self {
            fps: data.fps.unwrap_or(defaults.fps),
            devices: recipe.devices,
            loras,
            clips: recipe.sample.requests(&request, from, &dit, &defaults)?,
            request,
            formats: recipe.sample.formats,
            cache: run.cache,
            table: recipe
                .sample
                .cache_table
                .map(|path| from.join(path))
                .or_else(|| Some(trained?.join(TABLE))),
            magcache: recipe.sample.cache,
            layout: recipe.sample.layout,
            model,
            dit,
            defaults,
        })
    }
}

/// The model that a run or a recipe names has to be settled anew where it is to run on something else.
///
/// # Errors
/// If the arguments' storage and arithmetic do not go together.
pub(super) fn resettled(basis: &BaseModel, sample: &Sample, devices: &DevicesConfig) -> Result<BaseModel> {
    let precision = sample.precision.over(basis.precision, devices.processor())?;
    let quantised = sample.precision.quantised_over(basis.quantised.as_ref());
    Ok(BaseModel { precision, quantised, ..basis.clone() })
}

/// The adapters that the run in `folder` has trained: at its end, or after the steps of `checkpoint`; of a run that has not
/// ended the newest.
fn own_adapters(plan: &Plan, folder: &Path, step: Option<u64>, loras: &mut Loras, ui: &Ui) -> Result<()> {
    let ranges = plan.trained_ranges();
    for expert in ranges.iter().map(|range| range.expert()) {
        let (name, file) = match step {
            Some(step) => after(plan, folder, step, expert)?,
            None => match kept::written(plan, folder, None, expert) {
                Some(path) => (path.display().to_string(), files::read(&path)?),
                None => match kept::steps(plan, folder, expert)?.last() {
                    Some(step) => after(plan, folder, *step, expert)?,
                    None => {
                        let why = format!("{} has no adapter yet; train it first", folder.display());
                        return Err(Error::Setting { key: "RUN_OR_RECIPE".into(), why });
                    }
                },
            },
        };
        ui.note(&format!("adapter: {name}"));
        // A run of one network of two trains the one that the file is for.
        loras.of(expert).push(Source { name, file, strength: 1.0 });
    }
    Ok(())
}

/// The adapter after `step` steps: its file, else what the checkpoint holds.
fn after(
    plan: &Plan,
    folder: &Path,
    step: u64,
    expert: Option<Expert>,
) -> Result<(String, files::AdapterFile)> {
    if let Some(path) = kept::written(plan, folder, Some(step), expert) {
        return Ok((path.display().to_string(), files::read(&path)?));
    }
    let path = checkpoint::path(&folder.join("checkpoints"), step);
    if path.is_file() {
        let style = files::Style::Comfy;
        return Ok((path.display().to_string(), export::of_checkpoint(&path, expert, style)?));
    }
    let steps: Vec<String> = kept::steps(plan, folder, expert)?.iter().map(u64::to_string).collect();
    let why = match steps.is_empty() {
        true => format!("{} has no checkpoint", folder.display()),
        false => format!("{} has none after {step} steps; there are {}", folder.display(), steps.join(", ")),
    };
    Err(Error::Setting { key: "--checkpoint".into(), why })
}

/// The size and the frames that the adapter at `path` was trained at, where its header tells.
fn trained_size(path: &Path) -> Result<Option<([u32; 2], u32)>> {
    let path = files::locate(path).map_err(models::Error::from)?;
    let file = Checkpoint::open(&path).map_err(models::Error::from)?;
    let Some(text) = file.metadata().get("tandem.resolution") else { return Ok(None) };
    let numbers: Vec<u32> = text.split('x').filter_map(|number| number.parse().ok()).collect();
    Ok(match numbers.as_slice() {
        [width, height, frames] => Some(([*width, *height], *frames)),
        _ => None,
    })
}
