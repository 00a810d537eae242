//! The plan: what a recipe means. Every default is settled here, once; it is printed, stored with the run, and after
//! that nothing reads the recipe, the environment or the clock to decide behaviour.

mod assumed;
mod attached;
mod clip_shapes;
mod clips;
pub mod common;
mod conditions;
mod difference;
mod found;
mod layout;
mod noise_levels;
mod on_host;
mod overrides;
mod parts;
mod preset;
mod required;
mod rest;
mod shapes;
mod time;
mod ways;
mod work;

use std::path::{Path, PathBuf};

use data::{DataConfig, DataError, Dataset, SizeMultiple, Takes, Watch};
use models::adapter::{LoraConfig, Target};
use models::dit::DitConfig;
use models::expert::Expert;
use models::published::Defaults;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::adapters;
use crate::base::BaseModel;
use crate::bytes::hex;
use crate::encode::prompt::ClipRequest;
use crate::error::{Error, Result};
use crate::learning::NoiseRange;
use crate::learning::optim::OptimizerConfig;
use crate::machine::devices::{DevicesConfig, Limits};
use crate::machine::memory::{Forecast, MemoryConfig, MemoryPlan};
use crate::paths::existing;
use crate::recipe::like::Taken;
use crate::recipe::{CheckpointConfig, ExportConfig, Recipe, RunConfig, TrainConfig, check_bounds};
use crate::sample::magcache::CacheConfig;
use crate::sample::{ClipFormat, ClipLayout, PreviewPlan};
pub(crate) use clip_shapes::in_group;
pub use clips::{ClipsFit, ClipsOf, clips_fit};
pub use conditions::caption_files;
pub use difference::Difference;
pub use found::{LongText, TextsToEncode, long_texts, texts_to_encode};
use layout::with_clip_share;
pub use layout::{Laid, laid};
pub use noise_levels::{NoiseLevels, noise_levels};
pub use on_host::bytes_to_listen;
pub use overrides::Overrides;
pub use rest::{BehindSampling, Rest, Split};
pub use ways::{Wording, checked};

use assumed::{missing_clips, no_data, settled_model};
use found::{former_digest, has_texts, long_captions, summary};
use parts::{
    networks, requests, sample_plan, settle_ranges, settle_steps, share_of_replica, targets, task,
    trained_ranges,
};
use work::Work;

/// A settled run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Version of the program that made the plan.
    pub tandem: String,
    /// Name, folders, seed.
    pub run: RunPlan,
    /// Files of the base model.
    pub model: BaseModel,
    /// What is trained on, with the frame rate settled.
    pub data: DataConfig,
    /// What the data came to.
    pub dataset: DatasetPlan,
    /// The adapter, alpha settled.
    pub adapter: LoraConfig,
    /// Length and noise, shift settled.
    pub train: TrainConfig,
    /// The optimiser.
    pub optimizer: OptimizerConfig,
    /// Stages with their blocks.
    pub devices: DevicesConfig,
    /// What a training step keeps, and where.
    pub memory: MemoryPlan,
    /// When the state is saved.
    pub checkpoint: CheckpointConfig,
    /// The clips.
    pub sample: SamplePlan,
    /// The adapter files.
    pub export: ExportConfig,
}

/// Name, folders and seed of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunPlan {
    /// Name of the run and of its adapter files.
    pub name: String,
    /// Folder of the run.
    pub folder: PathBuf,
    /// Folder of cached latents and text states.
    pub cache: PathBuf,
    /// Seed of everything random.
    pub seed: u64,
}

/// What the data came to when the plan was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetPlan {
    /// Clips found.
    pub clips: usize,
    /// Training items: windows of clips that are not held out.
    pub items: usize,
    /// Items of the held-out loss.
    pub held_out: usize,
    /// With `data.bad = "skip"`: each clip that was left out, with the reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped: Vec<String>,
    /// SHA-256 over names, captions, windows and buckets.
    pub digest: String,
}

/// The clips of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplePlan {
    /// Steps between two sets of clips; 0 for just the first and the last.
    pub every: u64,
    /// Files of a clip.
    pub formats: Vec<ClipFormat>,
    /// The clips, each with everything it is made from.
    pub clips: Vec<ClipRequest>,
    /// With a preset: steps between two sets that are made without it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub full_every: u64,
    /// The clips of such a set.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub full_clips: Vec<ClipRequest>,
    /// MagCache's rule for them, where steps may be skipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheConfig>,
    /// The table that it goes by; without one the first clip of the run measures it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_table: Option<PathBuf>,
    /// How they go through the network on several devices.
    #[serde(default, skip_serializing_if = "ClipLayout::is_auto")]
    pub layout: ClipLayout,
    /// Previews of them, where there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preview: Option<PreviewPlan>,
    /// The adapter that is applied for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<ClipAdapterPlan>,
    /// The one for the expert for high noise only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter_high: Option<ClipAdapterPlan>,
    /// The one for the expert for low noise only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter_low: Option<ClipAdapterPlan>,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl SamplePlan {
    /// The adapters that are applied to a network for clips only.
    pub fn adapters_of(&self, expert: Option<Expert>) -> impl Iterator<Item = &ClipAdapterPlan> {
        let own = match expert {
            None => &None,
            Some(Expert::High) => &self.adapter_high,
            Some(Expert::Low) => &self.adapter_low,
        };
        self.adapter.iter().chain(own)
    }
}

/// An adapter for clips alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClipAdapterPlan {
    /// Its file, or its PEFT folder.
    pub path: PathBuf,
    /// What its changes are multiplied by.
    pub strength: f64,
}

/// A plan with what was found out while making it.
#[derive(Debug)]
pub struct Planned {
    /// The plan.
    pub plan: Plan,
    /// Sizes of the DiT.
    pub dit: DitConfig,
    /// Modules that get an adapter.
    pub targets: Vec<Target>,
    /// Every clip, probed and cut into windows.
    pub dataset: Dataset,
    /// The memory of a step.
    pub forecast: Forecast,
    /// What tensors get of each GPU.
    pub limits: Limits,
    /// What the recipe leaves to the plan.
    pub open: Open,
    /// What the digest of the same data was in earlier versions, where those would see the same clips.
    pub former_digest: Option<String>,
    /// The defaults that came with `train.like`.
    pub taken: Vec<Taken>,
    /// What the recipe names without use, a line each.
    pub notes: Vec<String>,
}

/// What a recipe leaves open and a plan settles for the machine: a resumed run keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open {
    /// `devices.split`.
    pub split: bool,
    /// `memory.ffn_tokens`.
    pub ffn_tokens: bool,
}

impl Open {
    /// Of the sections `[devices]` and `[memory]`.
    fn of(devices: &DevicesConfig, memory: &MemoryConfig) -> Self {
        Self { split: devices.split.is_empty(), ffn_tokens: memory.ffn_tokens.is_none() }
    }
}

impl Planned {
    /// Takes over what `stored`, the plan of a resumed run, settled for the same devices and the same settings, each of
    /// what the recipe leaves open by itself: the machine may have more or less memory free today, and the run's numbers
    /// must not depend on that.
    pub fn keep_to(&mut self, stored: &Plan) {
        let plan = &mut self.plan;
        let without_split = |devices: &DevicesConfig| DevicesConfig { split: Vec::new(), ..devices.clone() };
        let asked = |memory: &MemoryPlan| (memory.keep, memory.offload, memory.host_memory);
        let is_same = without_split(&stored.devices) == without_split(&plan.devices)
            && asked(&stored.memory) == asked(&plan.memory);
        if is_same && (self.open.split || plan.devices.split == stored.devices.split) {
            plan.devices.split.clone_from(&stored.devices.split);
            let ffn_tokens =
                if self.open.ffn_tokens { stored.memory.ffn_tokens } else { plan.memory.ffn_tokens };
            // Plans of earlier versions do not say what may be pinned.
            let pinned = stored.memory.pinned.or(plan.memory.pinned);
            // It changes no number, and what fits beside the networks depends on what is free today.
            let MemoryPlan { decoding, bands, clip_groups, clip_sharing, .. } = plan.memory;
            let open = MemoryPlan { ffn_tokens, pinned, ..stored.memory.clone() };
            plan.memory = MemoryPlan { decoding, bands, clip_groups, clip_sharing, ..open };
            plan.model.precision.streamed = stored.model.precision.streamed;
        }
        if self.former_digest.as_ref() == Some(&stored.dataset.digest) {
            plan.dataset.digest.clone_from(&stored.dataset.digest);
        }
    }
}

impl Plan {
    /// Settles the recipe at `path` as it is written: [`Self::make_with`] without overrides.
    ///
    /// # Errors
    /// As [`Self::make_with`].
    pub fn make(path: &Path, progress: &mut dyn FnMut(usize, usize)) -> Result<Planned> {
        Self::make_with(path, &Overrides::default(), progress)
    }

    /// Settles the recipe at `path` with `overrides` on top. `progress(done, total)` follows the reading of the clips.
    ///
    /// # Errors
    /// Whatever is wrong with the recipe, the model's files or the clips.
    pub fn make_with(
        path: &Path,
        overrides: &Overrides,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Planned> {
        let mut recipe = Recipe::read_with(path, &overrides.settings)?;
        overrides.apply(&mut recipe);
        let from = path.parent().unwrap_or(Path::new(""));
        check_numbers(&recipe)?;
        let (mut model, dit, mut notes) = settled_model(&recipe, from, overrides)?;
        model.boundary = model.expert.map(|_| model.boundary_of(&dit));
        let defaults = *dit.defaults(model.dits.networks());
        let mut data = conditions::checked(recipe.data, &dit)?;
        let seed = recipe.run.seed.unwrap_or(42);
        let run = run_plan(recipe.run, path, seed);
        let watch =
            Watch { progress, is_stopped: &|| overrides.interrupt.is_asked(), cache: Some(&run.cache) };
        let missing = missing_clips(&data, from, overrides);
        let (dataset, found) = match missing.is_some() {
            true => no_data(&mut data, &defaults),
            false => read_data(&mut data, from, (&dit, &defaults), watch)?,
        };
        notes.extend(missing.into_iter().chain(long_captions(&dataset, &model)?));

        let adapter = adapters::settled(recipe.adapter, from)?;
        let targets = targets(&adapter, &recipe.optimizer, (&model, &dit))?;
        let mut train = recipe.train;
        notes.extend(settle_steps(&mut train, &recipe.optimizer, &dataset, seed)?);
        let ranges = settle_ranges(&mut train, &adapter, &targets, (&model, &dit))?;
        conditions::check_experts(&dataset, &ranges)?;
        let frames = data.frames.iter().copied().max().unwrap_or(1);
        let clips = requests(&recipe.sample, from, (&dit, &defaults), (data.sizes[0], frames, seed))?;
        let sample = sample_plan(recipe.sample, clips, (&model, &dit), from)?;
        let devices = overrides.devices(&recipe.devices, dit.layers)?;
        let share = share_of_replica(&train, devices.replicas.named())?;
        let (shapes, beyond) = shapes::settled((&data, &dataset), (&dit, &defaults), share.batch)?;
        let networks = (networks(&ranges, &model, &sample), devices.replicas.named());
        let work = Work::of(&share, (&dataset, &data, &defaults), devices.replicas.named())?;
        let (learning, of_clips) = ((&share, &recipe.optimizer, &work), (&shapes, data.loss_masks.as_ref()));
        let task = task((&model, &dit), (&adapter, &targets), learning, of_clips, networks);
        let (limits, machine) = overrides.machine(&devices, &task, recipe.memory.host_memory);
        let open = Open::of(&recipe.devices, &recipe.memory);
        let given = (!open.split).then_some(devices.split.as_slice());
        let rest =
            Rest::of_run((&model, &dit), &sample, (found.held_out, beyond), &shapes, overrides.assume)?;
        let has_texts = || has_texts(&run.cache, &model, (&dataset, &train), &sample.clips);
        let asked = (&recipe.memory, given, sample.layout);
        let settled = ways::settled(&task, &machine, asked, &shapes, &rest, has_texts)?;
        model.precision.streamed = settled.streamed;
        let settled = with_clip_share(settled, (&train, &sample), &work, (&task, &machine))?;
        notes.extend(on_host::notes(&model, (&dataset, &sample.clips), &task)?);
        notes.extend(time::notes(&settled.choice, &work, (&task, &machine), overrides.link));
        let plan = Plan {
            tandem: env!("CARGO_PKG_VERSION").to_owned(),
            run,
            devices: DevicesConfig { split: settled.choice.split.clone(), ..devices },
            model,
            data,
            dataset: found,
            adapter,
            train,
            optimizer: recipe.optimizer.settled(),
            memory: MemoryPlan::new(&recipe.memory, &settled),
            checkpoint: recipe.checkpoint,
            sample,
            export: recipe.export,
        };
        Ok(Planned {
            plan,
            dit,
            targets,
            former_digest: former_digest(&dataset),
            dataset,
            forecast: settled.forecast,
            limits,
            open,
            taken: recipe.taken,
            notes,
        })
    }

    /// The networks that are trained, each with the noise levels that it makes, in the order in which sampling goes through
    /// them. An expert that gets no micro-batch is none of them.
    pub fn trained_ranges(&self) -> Vec<NoiseRange> {
        trained_ranges(&self.model, self.train.high_share)
    }

    /// Micro-batches of clips of a step that a replica makes at most, where `train.accumulate` says how many there are.
    pub fn micro_batches_of_replica(&self) -> usize {
        self.train.accumulate.div_ceil(self.devices.replicas.named())
    }

    /// The most of them that may be under way at once, priors included.
    pub fn under_way(&self) -> usize {
        match self.train.tokens_per_step {
            Some(_) => usize::MAX,
            None => self.micro_batches_of_replica() * if self.train.prior.is_made() { 2 } else { 1 },
        }
    }

    /// The plan as TOML.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| Error::PlanText { why: error.to_string() })
    }

    /// A plan stored with a run.
    ///
    /// # Errors
    /// When the file is not a plan of this version.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Io {
            action: "read the plan",
            path: path.to_owned(),
            source,
        })?;
        toml::from_str(&text).map_err(|e| Error::PlanText { why: format!("{}: {e}", path.display()) })
    }

    /// SHA-256 of the plan, to tell what an adapter file was made by.
    pub fn hash(&self) -> Result<String> {
        Ok(hex(&Sha256::digest(self.to_toml()?)))
    }
}

fn check_numbers(recipe: &Recipe) -> Result<()> {
    let refuse = |key: &str, why: &str| Err(Error::Setting { key: key.into(), why: why.into() });
    let (adapter, train) = (&recipe.adapter, &recipe.train);
    check_bounds(recipe)?;
    if adapter.factor == Some(0) {
        return refuse("adapter.factor", "must be at least 1");
    }
    if adapter.rank == Some(0) {
        return refuse("adapter.rank", "must be at least 1");
    }
    if adapter.rank_by_module.values().any(|rank| *rank == 0) {
        return refuse("adapter.rank_by_module", "each rank must be at least 1");
    }
    if adapter.alpha_by_module.values().any(|alpha| !alpha.is_finite() || *alpha <= 0.0) {
        return refuse("adapter.alpha_by_module", "each alpha must be a positive number");
    }
    if adapter.targets.is_empty() {
        return refuse("adapter.targets", "names no module, so nothing would be trained");
    }
    if adapter.alpha.is_some_and(|alpha| !alpha.is_finite() || alpha <= 0.0) {
        return refuse("adapter.alpha", "must be a positive number");
    }
    if !(0.0..1.0).contains(&adapter.dropout) {
        return refuse("adapter.dropout", "must be at least 0 and below 1");
    }
    train.check_length()?;
    if !(0.0..=1.0).contains(&train.caption_dropout) {
        return refuse("train.caption_dropout", "must lie between 0 and 1");
    }
    let is_wrong = |share: Option<f64>| share.is_some_and(|share| !(0.0..=1.0).contains(&share));
    if let Some((key, _)) = train.drop.each().into_iter().find(|(_, share)| is_wrong(*share)) {
        return refuse(key, "must lie between 0 and 1");
    }
    if recipe.checkpoint.keep_last == 0 {
        return refuse("checkpoint.keep_last", "must be at least 1");
    }
    train.timesteps.check()?;
    train.loss.check()?;
    train.prior.check()?;
    train.ema.check()?;
    recipe.optimizer.check_average(&train.ema)?;
    recipe.memory.check()?;
    recipe.optimizer.check()
}

/// Reads the clips of `data`, and settles what it leaves open. Paths begin in `from`.
fn read_data(
    data: &mut DataConfig,
    from: &Path,
    (dit, defaults): (&DitConfig, &Defaults),
    mut watch: Watch,
) -> Result<(Dataset, DatasetPlan)> {
    conditions::check_hub(data)?;
    conditions::settle_places(data, from);
    for import in data.sets.iter_mut().filter_map(|set| set.import.as_mut()).chain(&mut data.import) {
        *import = existing("data.import", from, import)?;
    }
    data.fps.get_or_insert(defaults.fps);
    let (multiple, companions) = (SizeMultiple::new(defaults.multiple()), conditions::read_by(dit));
    let model = Takes { multiple, fps: defaults.fps, companions: &companions };
    let dataset = Dataset::build_watched(data, &model, &mut watch).map_err(|error| match error {
        DataError::Stopped => Error::Interrupted,
        error => error.into(),
    })?;
    (data.sizes, data.frames) = (dataset.sizes.clone(), dataset.frames.clone());
    let found = summary(&dataset)?;
    Ok((dataset, found))
}

/// Name and folders of the run of the recipe at `path`.
pub(crate) fn run_plan(run: RunConfig, path: &Path, seed: u64) -> RunPlan {
    let from = path.parent().unwrap_or(Path::new(""));
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let name = run.name.or(stem).unwrap_or_else(|| "run".into());
    RunPlan {
        folder: run.folder.map_or_else(|| Path::new("runs").join(&name), |folder| from.join(folder)),
        cache: run.cache.map_or_else(|| PathBuf::from("runs/cache"), |folder| from.join(folder)),
        name,
        seed,
    }
}
