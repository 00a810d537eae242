//! `tandem sample`.

mod basis;
mod memory;

use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{ArgGroup, Args};
use kernels::{DType, Device, Tensor};
use models::adapter::{ApplyMode, Source};
use models::dit::DitConfig;
use models::expert::Expert;
use models::published::Defaults;
use models::vae::{Tiles, Tiling, Vae};
use models::weights::Checkpoint;

use super::devices::StageDevices;
use super::force::Force;
use super::precision::ModelPrecision;
use crate::adapters;
use crate::base::{BaseModel, DitFiles};
use crate::encode::prompt::ClipRequest;
use crate::encode::{Encoding, LatentStore};
use crate::error::Error;
use crate::learning::NoiseRange;
use crate::machine::devices::DevicesConfig;
use crate::pipeline::Pipeline;
use crate::recipe::Assignment;
use crate::sample::{
    self, ClipFiles, ClipFormat, Owner, Prompted, clip_files, clip_name, estimate, starting_noise,
};
use crate::solver::{Convention, SolverKind};
use crate::watch::interrupt::{Interrupt, OnStop};
use crate::watch::ui::Ui;
use basis::{Basis, Loras, resettled};

/// Make clips from prompts, many from one load of the model.
#[derive(Debug, Args)]
#[command(
    after_help = EXAMPLES,
    group = ArgGroup::new("basis").args(["source", "model"]).required(true).multiple(true),
    group = ArgGroup::new("what").args(["source", "prompt", "prompts"]).required(true).multiple(true),
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
    /// Prompt. May be given more than once, for one clip each.
    #[arg(long, conflicts_with = "prompts")]
    prompt: Vec<String>,
    /// A file with one prompt a line, optionally followed by its own settings:
    /// --w width --h height --f frames --d seed --s steps --l guidance --lh guidance of the high-noise expert
    /// --fs shift --i first picture --ei last picture --n negative prompt.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Negative prompt. Default: the one that Wan was published with.
    #[arg(long)]
    negative: Option<String>,
    /// Width in pixels. Default: what the adapter was trained at, else 832 (TI2V-5B 1280); with a picture, its aspect ratio
    /// at that area.
    #[arg(long)]
    width: Option<u32>,
    /// Height in pixels. Default: what the adapter was trained at, else 480 (TI2V-5B 704); with a picture, its aspect ratio
    /// at that area.
    #[arg(long)]
    height: Option<u32>,
    /// Frames, 4n+1. Default: what the adapter was trained at, else 81 (TI2V-5B 121).
    #[arg(long)]
    frames: Option<u32>,
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
    /// Solver. Default: unipc.
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
    /// Frames per second of the files. Default: the model's, 16 (TI2V-5B 24).
    #[arg(long)]
    fps: Option<f64>,
    /// Decode in tiles: needs less memory, may leave faint seams.
    #[arg(long)]
    tiled: bool,
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
}

/// Sampling that takes longer is asked about.
const LONG: Duration = Duration::from_secs(3600);

const EXAMPLES: &str = "\
Examples:
  tandem sample runs/cat                                # the run's prompts with its last adapter
  tandem sample cat.toml --checkpoint 500 --prompt \"a cat on a roof\" --out clips/500
  tandem sample --model Wan-AI/Wan2.1-T2V-1.3B --prompt \"a cat on a roof\" --prompt \"a dog in the snow\"
  tandem sample --model Wan2.1-T2V-14B --lora cat.safetensors:0.8 --prompts prompts.txt --out clips/cat
  tandem sample --model Wan2.2-TI2V-5B --image first.png --prompt \"she turns her head\"

Every key of a recipe is explained in recipes/README.md.";

impl Sample {
    /// Makes the clips.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let ui = &ui.with_phases();
        let mut basis = Basis::of(self, ui)?;
        let interrupt = Interrupt::listen_to(OnStop::Leave).context("cannot listen for Ctrl-C")?;
        let devices = self.devices.over(&basis.devices).settle(basis.dit.layers)?;
        let model = resettled(&basis.model, self, &devices);
        let requests = self.requests(&basis)?;
        let formats = if self.format.is_empty() { basis.formats.clone() } else { self.format.clone() };
        let names: Vec<String> =
            requests.iter().enumerate().map(|(i, request)| clip_name(i, &request.prompt)).collect();
        self.check_outputs(&names, &formats)?;
        let networks = self.networks(&model, &basis.defaults, std::mem::take(&mut basis.loras), ui)?;
        let mut encoded = LatentStore::open(self.cache.as_ref().unwrap_or(&basis.cache), &model)?;
        let tiling = if self.tiled { Tiling::On(Tiles::default()) } else { Tiling::Off };
        memory::check(&requests, (&model, &basis), &networks, (&devices, tiling), &encoded)?;
        if !self.is_worth_it(&requests, (&model, &basis), &devices, ui)? {
            ui.note("nothing was made");
            return Ok(0);
        }
        let split = devices.open()?;
        let device = split[0].0.clone(); // a settled config has a stage

        let texts = requests.iter().flat_map(|r| [r.prompt.as_str(), r.negative.as_str()]);
        let config = &basis.dit;
        let with = Encoding { model: &model, dit: config, device: &device, interrupt: &interrupt, ui };
        encoded.encode_prompts(texts, &with)?;
        encoded.encode_pictures(&requests, &with)?;
        let prompted = self.prompted(&requests, &encoded, config, &device)?;
        let mut owner =
            Loading { networks, model: &model, devices: &devices, split: &split, with: &with, ui };
        let Some(latents) = sample::latents(&prompted, &mut owner, &interrupt, ui)? else {
            return Err(Error::Interrupted.into());
        };
        if let Some(path) = &self.save_latents {
            save_latents(path, &latents)?;
        }
        let files = ClipFiles { tiling, fps: self.fps.unwrap_or(basis.fps), formats: &formats };
        let written = sample::files(&self.out, (&prompted, latents), "", &owner, files, ui)?;
        let lines: Vec<String> = written.iter().map(|path| path.display().to_string()).collect();
        ui.tell(&lines.join("\n"), &serde_json::json!({ "files": written }));
        Ok(0)
    }

    /// Says how long the steps will take, and asks where that is over an hour; whether to begin.
    fn is_worth_it(
        &self,
        requests: &[ClipRequest],
        (model, basis): (&BaseModel, &Basis),
        devices: &DevicesConfig,
        ui: &Ui,
    ) -> crate::Result<bool> {
        let time = estimate::forecast(requests, (model, &basis.dit, &basis.defaults), devices)?;
        let clips =
            if requests.len() == 1 { "1 clip".to_owned() } else { format!("{} clips", requests.len()) };
        ui.note(&format!("{clips}: about {} of sampling (an estimate)", estimate::in_words(time)));
        Ok(time < LONG || self.yes || ui.confirm("go on?"))
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

    /// The networks that the clips go through, in order, each with what is named here and with `own`.
    fn networks<'a>(
        &self,
        model: &'a BaseModel,
        defaults: &Defaults,
        mut own: Loras,
        ui: &Ui,
    ) -> Result<Vec<Network<'a>>> {
        own.all.extend(adapters::sources("--lora", &self.lora, ui)?);
        if model.dits.experts().is_none() {
            if !(self.lora_high.is_empty() && self.lora_low.is_empty()) {
                let why = "this model has no experts; give the adapter with --lora".into();
                return Err(Error::Setting { key: "--lora-high, --lora-low".into(), why }.into());
            }
            // Those of a run of one expert whose model is that expert alone.
            let adapters = [own.all, own.high, own.low].concat();
            return Ok(vec![Network { dit: model.dits.of(Expert::High), share: NoiseRange::All, adapters }]);
        }
        let boundary = model.boundary.unwrap_or(defaults.boundary);
        let mut network = |expert: Expert| {
            let (key, named) = match expert {
                Expert::High => ("--lora-high", &self.lora_high),
                Expert::Low => ("--lora-low", &self.lora_low),
            };
            adapters::check_experts("--lora", &self.lora, expert, "--lora-EXPERT")?;
            adapters::check_experts(key, named, expert, "--lora-EXPERT")?;
            let mut adapters = own.all.clone();
            adapters.append(own.of(Some(expert)));
            adapters.extend(adapters::sources(key, named, ui)?);
            Ok(Network { dit: model.dits.of(expert), share: NoiseRange::Of { expert, boundary }, adapters })
        };
        Expert::ALL.into_iter().map(&mut network).collect()
    }

    /// The requests with what the cache has of them, and their starting noise.
    fn prompted(
        &self,
        requests: &[ClipRequest],
        encoded: &LatentStore,
        config: &DitConfig,
        device: &Device,
    ) -> Result<Vec<Prompted>> {
        let given = self.latents.as_deref().map(Checkpoint::open).transpose().map_err(models::Error::from);
        let given = given.map_err(Error::from)?;
        let mut prompted = Vec::new();
        for (i, request) in requests.iter().enumerate() {
            let noise = match &given {
                Some(file) => given_noise(file, i)?,
                None => starting_noise(request, config, device)?,
            };
            prompted.push(Prompted::new(request, noise.to_device(device)?, encoded, config)?);
        }
        Ok(prompted)
    }

    /// The clips to make: those that are named here, else those of the run or the recipe, with the options of the command
    /// line over theirs.
    fn requests(&self, basis: &Basis) -> Result<Vec<ClipRequest>> {
        let defaults = &basis.defaults;
        let base = self.over(&basis.request, defaults)?;
        let requests = match &self.prompts {
            Some(path) => base.from_file(path, "--prompts")?,
            None if self.prompt.is_empty() => {
                basis.clips.iter().map(|clip| self.over(clip, defaults)).collect::<Result<_>>()?
            }
            None => {
                let request = |prompt: &String| ClipRequest { prompt: prompt.clone(), ..base.clone() };
                self.prompt.iter().map(request).collect()
            }
        };
        if requests.is_empty() {
            let why = "neither the run nor the recipe has one: give some with --prompt or --prompts".into();
            return Err(Error::Setting { key: "sample.prompts".into(), why }.into());
        }
        for request in &requests {
            request.check(defaults.multiple())?;
            request.check_pictures(&basis.dit)?;
        }
        Ok(requests)
    }

    /// `request` with the options of the command line over it.
    fn over(&self, request: &ClipRequest, defaults: &Defaults) -> Result<ClipRequest> {
        let own = request.clone();
        let [width, height] = match &self.image {
            Some(path) if self.width.is_none() || self.height.is_none() => {
                let picture = data::Picture::open(path).map_err(Error::from)?;
                let defaults = Defaults { size: [own.width, own.height], ..*defaults };
                defaults.size_for(picture.width(), picture.height())
            }
            _ => [own.width, own.height],
        };
        Ok(ClipRequest {
            prompt: own.prompt,
            negative: self.negative.clone().unwrap_or(own.negative),
            width: self.width.unwrap_or(width),
            height: self.height.unwrap_or(height),
            frames: self.frames.unwrap_or(own.frames),
            steps: self.steps.unwrap_or(own.steps),
            guidance: self.guidance.unwrap_or(own.guidance),
            guidance_high: self.guidance_high.or(self.guidance).unwrap_or(own.guidance_high),
            shift: self.shift.unwrap_or(own.shift),
            seed: self.seed.unwrap_or(own.seed),
            solver: self.solver.unwrap_or(own.solver),
            convention: self.convention.unwrap_or(own.convention),
            image: self.image.clone().or(own.image),
            last_image: self.last_image.clone().or(own.last_image),
        })
    }
}

/// A network on its way through the sampling.
struct Network<'a> {
    dit: &'a DitFiles,
    share: NoiseRange,
    adapters: Vec<Source>,
}

/// Loads each network when its turn comes, and lets go of it.
struct Loading<'a> {
    networks: Vec<Network<'a>>,
    model: &'a BaseModel,
    devices: &'a DevicesConfig,
    split: &'a [(Device, Range<usize>)],
    with: &'a Encoding<'a>,
    ui: &'a Ui,
}

impl Owner for Loading<'_> {
    fn devices(&self) -> Vec<Device> {
        self.split.iter().map(|(device, _)| device.clone()).collect()
    }

    fn shares(&self) -> Vec<NoiseRange> {
        self.networks.iter().map(|network| network.share).collect()
    }

    fn with_network(
        &mut self,
        share: NoiseRange,
        work: &mut dyn FnMut(&Pipeline) -> crate::Result<ControlFlow<()>>,
    ) -> crate::Result<ControlFlow<()>> {
        let Some(network) = self.networks.iter().find(|network| network.share == share) else {
            return Ok(ControlFlow::Continue(()));
        };
        let (dit, weights) = network.dit.open()?;
        let (adapters, weights) =
            adapters::put(&network.adapters, &dit, weights, ApplyMode::Unmerged, self.ui)?;
        let base = self.model.precision.dit();
        let load = || Pipeline::load(&weights, &dit, self.split, &adapters, base);
        let mut pipeline = self.ui.phase("loading the DiT", load)?;
        pipeline.set_route(self.devices.transfer.into())?;
        work(&pipeline)
    }

    fn vae(&self) -> crate::Result<Vae> {
        self.with.vae()
    }
}

/// The starting noise of the clip `index`.
fn given_noise(file: &Checkpoint, index: usize) -> crate::Result<Tensor> {
    let own = format!("latents.{index}");
    let name = if file.contains(&own) { own.as_str() } else { "latents" };
    Ok(file.tensor(name, DType::F32, &Device::Cpu)?)
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
