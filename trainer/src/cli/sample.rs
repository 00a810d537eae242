//! `tandem sample`.

mod basis;
mod clips;
mod compare;
mod conditions;
mod skips;
mod variants;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{ArgGroup, Args};
use kernels::Tensor;
use kernels::attention::Heads;
use models::adapter::{ApplyMode, apply};
use models::published::Published;
use models::vae::{Tiles, Tiling};

use super::devices::StageDevices;
use super::force::Force;
use super::plan::published;
use super::precision::ModelPrecision;
use crate::base::BaseModel;
use crate::base::hub::HubSettings;
use crate::encode::preset::Preset;
use crate::encode::prompt::ClipRequest;
use crate::encode::{Encoding, LatentStore};
use crate::error::Error;
use crate::machine::devices::{DevicesConfig, Limits};
use crate::machine::forecast::{Decoding, Networks, Residuals};
use crate::machine::memory::{Machine, WeightPlace};
use crate::machine::products::KnownProducts;
use crate::plan::{ClipsFit, ClipsOf, clips_fit};
use crate::recipe::Assignment;
use crate::residents::{FromFiles, Residency, Residents, Setup, WhenIdle};
use crate::sample::magcache::Skips;
use crate::sample::{
    self, ClipFiles, ClipFormat, ClipLayout, Course, PreviewPlan, Previews, Prompted, Stepped, clip_files,
    clip_name, estimate,
};
use crate::solver::{Convention, SolverKind};
use crate::watch::interrupt::{Interrupt, OnStop};
use crate::watch::ui::Ui;
use basis::{Basis, resettled};
use conditions::ConditionOptions;
use skips::{SkipOptions, tell_plan};

/// Make clips from prompts, many from one load of the model.
#[derive(Debug, Args)]
#[command(
    after_help = EXAMPLES,
    group = ArgGroup::new("basis").args(["source", "model", "assume"]).required(true).multiple(true),
    group = ArgGroup::new("what").args(["source", "prompt", "prompts", "assume"]).required(true).multiple(true),
)]
pub struct Sample {
    /// A run's folder, or a recipe (its newest run is used). Model, adapter, prompts and settings come from there; options
    /// override single ones.
    #[arg(value_name = "RUN_OR_RECIPE")]
    source: Option<PathBuf>,
    /// Use the adapter of this step of the run. Default: the last one.
    #[arg(long, value_name = "STEP", requires = "source")]
    checkpoint: Option<u64>,
    /// Override a setting of the recipe, such as sample.steps=20. May be given more than once.
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "source")]
    settings: Vec<Assignment>,
    /// Checkpoint folder, official or diffusers layout, or a model of the Hugging Face hub as owner/name, which is fetched.
    #[arg(long)]
    model: Option<PathBuf>,
    /// An adapter in any format, a file or a PEFT folder, optionally with a strength (FILE:0.8). May be given more than
    /// once. Replaces the adapter of the run.
    #[arg(long, value_name = "FILE[:STRENGTH]")]
    lora: Vec<String>,
    /// An adapter for the high-noise expert only.
    #[arg(long, value_name = "FILE[:STRENGTH]")]
    lora_high: Vec<String>,
    /// An adapter for the low-noise expert only.
    #[arg(long, value_name = "FILE[:STRENGTH]")]
    lora_low: Vec<String>,
    /// The picture that clips start with: image-to-video models need one, TI2V-5B takes one or none.
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// The picture that clips end with, for models that go from one picture to another.
    #[arg(long, value_name = "FILE", requires = "image")]
    last_image: Option<PathBuf>,
    #[command(flatten)]
    conditions: ConditionOptions,
    /// Prompt. May be given more than once, for one clip each.
    #[arg(long, conflicts_with = "prompts")]
    prompt: Vec<String>,
    /// A file with one prompt a line, optionally followed by its own settings:
    /// --w width --h height --f frames --d seed --s steps --l guidance --lh guidance of the high-noise expert
    /// --fs shift --i first picture --ei last picture --cv control clip --mk mask --ref reference picture
    /// --cam camera move or file of poses --n negative prompt.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Negative prompt. Default: the one that Wan was published with.
    #[arg(long)]
    negative: Option<String>,
    /// Width in pixels. Default: what the adapter was trained at, else 832 (models of 5B 1280); with a picture, its aspect ratio
    /// at that area.
    #[arg(long)]
    width: Option<u32>,
    /// Height in pixels. Default: what the adapter was trained at, else 480 (models of 5B 704); with a picture, its aspect ratio
    /// at that area.
    #[arg(long)]
    height: Option<u32>,
    /// Frames, 4n+1. Default: what the adapter was trained at, else 81 (models of 5B 121).
    #[arg(long)]
    frames: Option<u32>,
    /// Few-step sampling with a distilled adapter, which --lora, or --lora-high and --lora-low, name.
    #[arg(long, value_enum, conflicts_with_all = ["steps", "guidance", "guidance_high", "shift", "solver"])]
    preset: Option<Preset>,
    /// Solver steps. Default: the model's, 50 or 40.
    #[arg(long)]
    steps: Option<usize>,
    /// Guidance scale (CFG), of both experts if there are two; 1 turns guidance off and halves the time. Default: the model's,
    /// 5; T2V-A14B 3 (4 at high noise), I2V-A14B 3.5.
    #[arg(long)]
    guidance: Option<f64>,
    /// Guidance scale of the high-noise expert, if different.
    #[arg(long)]
    guidance_high: Option<f64>,
    /// Shift of the sigmas. Default: the model's, 5 (T2V-A14B 12).
    #[arg(long)]
    shift: Option<f64>,
    /// Seed of the starting noise. Default: 42.
    #[arg(long)]
    seed: Option<u64>,
    /// Solver. Default: the model's, unipc (Animate: dpmpp2m).
    #[arg(long, value_enum)]
    solver: Option<SolverKind>,
    /// Follow the official or the diffusers grid of sigmas and resizing of pictures. Default: official.
    #[arg(long, value_enum)]
    convention: Option<Convention>,
    /// Starting noise at sigma 1 from a safetensors file, [1,c,t,h,w]: `latents` for every clip, or `latents.0`,
    /// `latents.1`, ... for one each. Their size is the clip's.
    #[arg(long, value_name = "FILE")]
    latents: Option<PathBuf>,
    /// Write the finished latents to a safetensors file: `latents` of a single clip, `latents.0`, `latents.1`, ... of
    /// several.
    #[arg(long, value_name = "FILE")]
    save_latents: Option<PathBuf>,
    /// Output folder.
    #[arg(long, default_value = "clips")]
    out: PathBuf,
    /// File formats of the clips. Default: mp4.
    #[arg(long, value_enum, value_delimiter = ',')]
    format: Vec<ClipFormat>,
    /// Frames per second of the files. Default: the model's, 16 (models of 5B 24).
    #[arg(long)]
    fps: Option<f64>,
    /// Decode in tiles: needs less memory, may leave faint seams.
    #[arg(long)]
    tiled: bool,
    /// While a clip is made, write what it looks like so far to <clip>.preview.mp4 after every STEPS solver steps (5 where no
    /// number is given), each in place of the one before. Removed when the clip is finished.
    #[arg(long, value_name = "STEPS", num_args = 0..=1, require_equals = true, default_missing_value = "5",
          value_parser = clap::value_parser!(u32).range(1..), requires = "tiny_decoder")]
    preview: Option<u32>,
    /// The tiny decoder that makes previews: taew2_1, for models of 5B taew2_2, as .pth or .safetensors. A file named lighttae...
    /// is taken for LightX2V's variant, which decodes latents without scaling. `tandem fetch Kijai/WanVideo_comfy --only taew2_1`
    /// downloads it.
    #[arg(long, value_name = "FILE", requires = "preview")]
    tiny_decoder: Option<PathBuf>,
    #[command(flatten)]
    force: Force,
    #[command(flatten)]
    precision: ModelPrecision,
    #[command(flatten)]
    devices: StageDevices,
    /// Folder of cached text states. Default: the run's, else runs/cache.
    #[arg(long)]
    cache: Option<PathBuf>,
    /// Do not ask before sampling that takes over an hour.
    #[arg(long)]
    yes: bool,
    /// Where the matrices of the DiT are: host streams them from pinned host memory, auto as many as do not fit.
    #[arg(long, value_enum, default_value_t)]
    weights: WeightPlace,
    /// How clips go through the network on several devices. The clips are the same (with ulysses up to the rounding of sums).
    /// Default: the recipe's sample.layout, else auto.
    #[arg(long, value_enum)]
    layout: Option<ClipLayout>,
    #[command(flatten)]
    skips: SkipOptions,
    /// With MagCache: make the same clips with every step computed too, into the folder `exact`, and tell PSNR and SSIM.
    #[arg(long, conflicts_with = "plan")]
    compare_exact: bool,
    /// Say what would be done, and stop there.
    #[arg(long)]
    plan: bool,
    /// Plan for a published model whose files are not here.
    #[arg(long, value_parser = published(), value_name = "MODEL", requires = "plan", conflicts_with_all = ["source", "model"])]
    assume: Option<&'static Published>,
}

/// Each model is needed once, so each has the devices to itself; but the VAE may be needed for pictures and for clips.
fn one_at_a_time(clip_groups: NonZeroUsize) -> Residency {
    Residency { networks: Networks::InTurn, decoding: Decoding::Alone, vae: WhenIdle::Park, clip_groups }
}

/// Sampling that takes longer is asked about.
const LONG: Duration = Duration::from_secs(3600);

const EXAMPLES: &str = "\
Examples:
  tandem sample runs/cat                                # the run's prompts with its last adapter
  tandem sample cat.toml --checkpoint 500 --prompt \"a cat on a roof\" --out clips/500
  tandem sample --model Wan-AI/Wan2.1-T2V-1.3B --prompt \"a cat on a roof\" --prompt \"a dog in the snow\"
  tandem sample --model Wan2.1-T2V-14B --lora cat.safetensors:0.8 --prompts prompts.txt --out clips/cat
  tandem sample runs/cat --cache-preset E012K2R20      # faster, by MagCache
  tandem sample --plan --assume t2v-a14b --cache-preset E004K2R20
  tandem sample --model Wan2.2-TI2V-5B --image first.png --prompt \"she turns her head\"

Every key of a recipe is explained in recipes/README.md.";

impl Sample {
    /// Makes the clips.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let ui = &ui.with_phases();
        if let Some(model) = self.assume {
            return self.tell_assumed(model, ui);
        }
        let mut job = self.job(ui)?;
        let formats = if self.format.is_empty() { job.basis.formats.clone() } else { self.format.clone() };
        let mut exact_files = Vec::new();
        if !self.plan {
            let named = job.requests.iter().enumerate();
            let names: Vec<String> = named.map(|(i, request)| clip_name(i, &request.prompt)).collect();
            self.check_outputs(&names, &formats)?;
            exact_files = self.exact_files(&names, &formats);
        }
        let preview = self.preview_plan(&job)?;
        self.find_networks(&mut job, ui)?;
        let skips = self.skips(&job)?;
        self.check_comparison(skips.is_some(), &exact_files)?;
        let tiling = if self.tiled { Tiling::On(Tiles::default()) } else { Tiling::Off };
        let residuals = if skips.is_some() { Residuals::Kept } else { Residuals::None };
        self.lay(&mut job, (residuals, tiling, preview.as_ref()), ui)?;
        if self.plan {
            self.tell_time(&job, skips.as_ref(), ui)?;
            tell_plan(skips.as_ref(), &job.requests, ui);
            return Ok(0);
        }
        skips.iter().flat_map(|skips| skips.lines(&job.requests)).for_each(|line| ui.note(&line));
        if !self.is_worth_it(&job, skips.as_ref(), ui)? {
            ui.note("nothing was made");
            return Ok(0);
        }
        let (fps, bands) = (self.fps.unwrap_or(job.basis.fps), job.bands);
        let skipped = skips.map_or_else(Vec::new, |skips| skips.clips);
        preview.iter().for_each(|plan| plan.tell(ui));
        let previews = preview.as_ref().map(|plan| Previews { plan, folder: &self.out, fps });
        let course = Course { skipped: &skipped, previews, ..Course::default() };
        let mut done = self.steps(job, course, ui)?;
        if let Some(path) = &self.save_latents {
            save_latents(path, &done.stepped.latents)?;
        }
        let files = ClipFiles { tiling, bands, fps, formats: &formats };
        let made = done.stepped.pieces.clone();
        let clips = (done.prompted.as_slice(), made.clone(), skipped.as_slice());
        let written = sample::files(&self.out, clips, "", &mut done.residents, files)?;
        previews.map_or(Ok(()), |previews| previews.remove(&done.prompted))?;
        let mut told = serde_json::json!({ "files": written });
        if self.compare_exact {
            told["likeness"] = serde_json::json!(self.compare(&mut done, &made, files)?);
        }
        let lines: Vec<String> = written.iter().map(|path| path.display().to_string()).collect();
        ui.tell(&lines.join("\n"), &told);
        Ok(0)
    }

    /// The previews that are asked for.
    fn preview_plan(&self, job: &Job) -> crate::Result<Option<PreviewPlan>> {
        let every = self.preview.map_or(0, |steps| steps as usize);
        PreviewPlan::settle(["--preview", "--tiny-decoder"], every, self.tiny_decoder.clone(), &job.basis.dit)
    }

    /// What is to be done, before anything is loaded: without networks, whose adapters are large files.
    pub(super) fn job(&self, ui: &Ui) -> Result<Job> {
        let basis = Basis::of(self, ui)?;
        let interrupt = Interrupt::listen_to(OnStop::Leave).context("cannot listen for Ctrl-C")?;
        let devices = self.devices.over(&basis.devices).settle(basis.dit.layers)?;
        let model = resettled(&basis.model, self, &devices)?;
        let requests = self.requests(&basis)?;
        let (networks, clip_groups, clip_sharing) = (Vec::new(), NonZeroUsize::MIN, NonZeroUsize::MIN);
        let bands = 1;
        Ok(Job { basis, model, devices, requests, networks, clip_groups, clip_sharing, bands, interrupt })
    }

    /// Reads the adapters of the networks of `job`.
    pub(super) fn find_networks(&self, job: &mut Job, ui: &Ui) -> Result<()> {
        let loras = std::mem::take(&mut job.basis.loras);
        job.networks = self.networks(&job.model, &job.basis.dit, loras, ui)?;
        Ok(())
    }

    /// Checks that everything fits, and settles how the clips go through the network.
    pub(super) fn lay(
        &self,
        job: &mut Job,
        clips: (Residuals, Tiling, Option<&PreviewPlan>),
        ui: &Ui,
    ) -> crate::Result<()> {
        let asked = self.layout.unwrap_or(job.basis.layout);
        let Job { basis, model, devices, requests, networks, .. } = &*job;
        let adapters =
            |network: &FromFiles| Ok(apply(&network.adapters, &basis.dit, ApplyMode::Unmerged)?.adapters);
        let of = ClipsOf {
            model,
            dit: &basis.dit,
            defaults: &basis.defaults,
            devices,
            requests,
            attached: networks.iter().map(adapters).collect::<crate::Result<_>>()?,
            cache: self.cache.as_deref().unwrap_or(&basis.cache),
        };
        let ClipsFit { laid, streamed, bands, .. } = clips_fit(of, clips, (asked, self.weights))?;
        if job.devices.stages.len() > 1 {
            ui.note(&format!("clips: {laid}"));
        }
        (job.clip_groups, job.clip_sharing, job.bands) = (laid.groups, laid.sharing, bands);
        job.model.precision.streamed = streamed;
        if !streamed.is_none() {
            let (some, all) = (streamed.of(0..job.basis.dit.layers), job.basis.dit.layers);
            ui.note(&format!(
                "the matrices of {some} of {all} blocks stay in pinned host memory, and are copied as they are used"
            ));
        }
        Ok(())
    }

    /// Makes all steps of the clips of `job`.
    pub(super) fn steps(&self, job: Job, course: Course, ui: &Ui) -> Result<Done> {
        let Job { basis, model, devices, requests, networks, clip_groups, clip_sharing, interrupt, .. } = job;
        let attentions = attentions(&basis, &requests);
        let (route, sharing) = (devices.transfer.into(), Some(clip_sharing));
        let setup = Setup { route, attentions, sharing, ..Setup::default() };
        let (config, residency) = (&basis.dit, one_at_a_time(clip_groups));
        let mut residents = Residents::new((&model, config), devices.open()?, residency, setup, ui);
        let products = KnownProducts::at(HubSettings::from_environment().beside().join("products.json"));
        products.restore(residents.devices());
        networks.into_iter().for_each(|network| residents.add(network));

        let mut encoded = LatentStore::open(self.cache.as_ref().unwrap_or(&basis.cache), &model)?;
        let texts = requests.iter().flat_map(|r| [r.prompt.as_str(), r.negative.as_str()]);
        let mut with = Encoding { residents: &mut residents, interrupt: &interrupt };
        encoded.encode_prompts(texts, &mut with)?;
        encoded.encode_pictures(&requests, &mut with)?;
        let prompted = self.prompted(&requests, &encoded, config, residents.first_device())?;
        match sample::latents(&prompted, &mut residents, course, &interrupt)? {
            Some(stepped) => {
                if let Err(error) = products.store(residents.devices()) {
                    ui.note(&format!("the next start measures products again: {error}"));
                }
                Ok(Done { prompted, stepped, residents, interrupt })
            }
            None => Err(Error::Interrupted.into()),
        }
    }

    /// Says how long the steps will take.
    fn tell_time(&self, job: &Job, skips: Option<&Skips>, ui: &Ui) -> crate::Result<Duration> {
        let Job { basis, model, devices, requests, .. } = job;
        let skipped: Vec<usize> =
            (0..requests.len()).map(|i| skips.map_or(0, |skips| skips.clips[i].len())).collect();
        let machine = Machine::here(devices, &Limits::default(), model.precision.dit(), &basis.dit, None);
        let time = estimate::forecast(
            (requests, &skipped),
            (&basis.dit, model.precision.dit().frozen),
            (&machine, &devices.split, [job.clip_groups, job.clip_sharing]),
        )?;
        let clips =
            if requests.len() == 1 { "1 clip".to_owned() } else { format!("{} clips", requests.len()) };
        ui.note(&format!("{clips}: about {} of sampling (an estimate)", estimate::in_words(time)));
        Ok(time)
    }

    /// Says how long the steps will take, and asks where that is over an hour; whether to begin.
    pub(super) fn is_worth_it(&self, job: &Job, skips: Option<&Skips>, ui: &Ui) -> crate::Result<bool> {
        let time = self.tell_time(job, skips, ui)?;
        Ok(time < LONG || self.yes || ui.confirm("go on?"))
    }

    /// Whether files may be overwritten.
    pub(super) fn force(&self) -> &Force {
        &self.force
    }

    /// Whether adapters are named here, which go in place of a run's.
    fn names_adapters(&self) -> bool {
        [&self.lora, &self.lora_high, &self.lora_low].into_iter().any(|named| !named.is_empty())
    }

    /// Makes the folder and tries it, before anything is loaded; what is there is not overwritten without `--force`.
    fn check_outputs(&self, names: &[String], formats: &[ClipFormat]) -> crate::Result<()> {
        for file in clip_files(&self.out, names, formats) {
            self.force.check(&file, "--out")?;
        }
        if let Some(path) = &self.save_latents {
            self.force.check(path, "--save-latents")?;
        }
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source| Error::Io { action, path, source }
        };
        std::fs::create_dir_all(&self.out).map_err(io("create the folder", &self.out))?;
        let probe = self.out.join(format!(".tandem-{}.tmp", std::process::id()));
        std::fs::write(&probe, b"").map_err(io("write into", &self.out))?;
        std::fs::remove_file(&probe).map_err(io("remove", &probe))
    }
}

/// The attentions of clips of these sizes, each once.
fn attentions(basis: &Basis, requests: &[ClipRequest]) -> Vec<Heads> {
    let mut found = Vec::new();
    for request in requests {
        let (frames, height, width) = request.latents(&basis.dit);
        let tokens = basis.dit.tokens(frames, height, width);
        let continued = (request.pieces(&basis.dit) > 1)
            .then(|| basis.dit.attentions(1, tokens + basis.dit.tokens_of_past(height, width)));
        for heads in basis.dit.attentions(1, tokens).into_iter().chain(continued.into_iter().flatten()) {
            if !found.contains(&heads) {
                found.push(heads);
            }
        }
    }
    found
}

/// What is to be done.
pub(super) struct Job {
    pub basis: Basis,
    pub model: BaseModel,
    pub devices: DevicesConfig,
    pub requests: Vec<ClipRequest>,
    pub networks: Vec<FromFiles>,
    /// Groups of devices, each of which has the whole network.
    pub clip_groups: NonZeroUsize,
    /// Devices of such a group that share the tokens of a call.
    pub clip_sharing: NonZeroUsize,
    /// Devices that decode clips together.
    pub bands: usize,
    pub interrupt: Interrupt,
}

/// What was done, before the VAE.
pub(super) struct Done {
    pub prompted: Vec<Prompted>,
    pub stepped: Stepped,
    pub residents: Residents,
    pub interrupt: Interrupt,
}

fn save_latents(path: &std::path::Path, latents: &[Tensor]) -> Result<()> {
    let named: Vec<(String, &Tensor)> = match latents {
        [one] => vec![("latents".to_owned(), one)],
        many => many.iter().enumerate().map(|(i, t)| (format!("latents.{i}"), t)).collect(),
    };
    let views = named.iter().map(|(name, tensor)| (name.as_str(), *tensor));
    models::weights::write_safetensors(path, views, &Default::default()).map_err(Error::from)?;
    Ok(())
}
