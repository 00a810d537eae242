//! `tandem sample`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use clap::Args;
use models::adapter::{Place, Source};
use models::dit::DitConfig;
use models::expert::Expert;
use models::vae::{Tiles, Tiling};
use models::weights::Checkpoint;

use super::devices::StageDevices;
use super::fetch::fetched;
use super::force::Force;
use super::precision::ModelPrecision;
use crate::adapters;
use crate::base::{BaseModel, DitFiles};
use crate::encode::{Encoded, Encoding};
use crate::error::Error;
use crate::habits::Habits;
use crate::interrupt::{Interrupt, OnStop};
use crate::pipeline::Pipeline;
use crate::prompt::ClipRequest;
use crate::sample::{
    ClipFormat, Prompted, SampleConfig, Sampling, Share, clip_files, clip_name, starting_noise, write_clips,
};
use crate::solver::{Convention, SolverKind};
use crate::ui::Ui;

/// Make clips from prompts, many from one load of the model.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Sample {
    /// Checkpoint folder, official or diffusers layout, or a model of the Hugging Face hub as owner/name, which is fetched.
    #[arg(long)]
    model: PathBuf,
    /// An adapter in any format, a file or a PEFT folder, with its strength behind a colon where it is not 1. May be given more than once.
    #[arg(long, value_name = "FILE[:STRENGTH]")]
    lora: Vec<String>,
    /// An adapter of the expert for high noise alone, of a model of two experts.
    #[arg(long, value_name = "FILE[:STRENGTH]")]
    lora_high: Vec<String>,
    /// An adapter of the expert for low noise alone.
    #[arg(long, value_name = "FILE[:STRENGTH]")]
    lora_low: Vec<String>,
    /// The picture that clips start with: image-to-video models need one, TI2V-5B takes one or none.
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// The picture that clips end with, for models that go from one picture to another.
    #[arg(long, value_name = "FILE", requires = "image")]
    last_image: Option<PathBuf>,
    /// What to show. May be given more than once, for one clip each.
    #[arg(long, required_unless_present = "prompts", conflicts_with = "prompts")]
    prompt: Vec<String>,
    /// A file of prompts, one a line, each with options of its own behind it:
    /// --w width --h height --f frames --d seed --s steps --l guidance --lh guidance of the expert for high noise
    /// --fs shift --i first picture --ei last picture --n negative prompt.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// What to keep away from. Default: the negative prompt that Wan was published with.
    #[arg(long)]
    negative: Option<String>,
    /// Width in pixels. Default: 832, of TI2V-5B 1280; with a picture, its aspect at that area.
    #[arg(long)]
    width: Option<u32>,
    /// Height in pixels. Default: 480, of TI2V-5B 704; with a picture, its aspect at that area.
    #[arg(long)]
    height: Option<u32>,
    /// Frames, 4n+1. Default: 81, of TI2V-5B 121.
    #[arg(long)]
    frames: Option<u32>,
    /// Solver steps. Default: the model's, 50 or 40.
    #[arg(long)]
    steps: Option<usize>,
    /// Guidance scale, of both experts where there are two; 1 asks the network once a step instead of twice. Default: the
    /// model's, 5; of T2V-A14B 3 (4 at high noise), of I2V-A14B 3.5.
    #[arg(long)]
    guidance: Option<f64>,
    /// Guidance scale of the expert for high noise, where it differs.
    #[arg(long)]
    guidance_high: Option<f64>,
    /// Shift of the sigmas. Default: the model's, 5, of T2V-A14B 12.
    #[arg(long)]
    shift: Option<f64>,
    /// Seed of the starting noise.
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// What goes from noise to clip.
    #[arg(long, value_enum, default_value_t = SolverKind::UniPc)]
    solver: SolverKind,
    /// Whose grid of sigmas, and whose way to scale pictures.
    #[arg(long, value_enum, default_value_t = Convention::Official)]
    convention: Convention,
    /// Starting noise at sigma 1 from a safetensors file, [1,c,t,h,w]: `latents` for every clip, or `latents.0`,
    /// `latents.1`, ... for one each. Their size is the clip's.
    #[arg(long, value_name = "FILE")]
    latents: Option<PathBuf>,
    /// Write the finished latents to a safetensors file: `latents` of a single clip, `latents.0`, `latents.1`, ... of
    /// several.
    #[arg(long, value_name = "FILE")]
    save_latents: Option<PathBuf>,
    /// Folder that the clips go to.
    #[arg(long, default_value = "clips")]
    out: PathBuf,
    /// Files of a clip.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "mp4")]
    format: Vec<ClipFormat>,
    /// Frames a second of the files. Default: the model's, 16, of TI2V-5B 24.
    #[arg(long)]
    fps: Option<f64>,
    /// Decode in tiles: less memory, faint seams possible.
    #[arg(long)]
    tiled: bool,
    #[command(flatten)]
    force: Force,
    #[command(flatten)]
    precision: ModelPrecision,
    #[command(flatten)]
    devices: StageDevices,
    /// Folder of cached text states.
    #[arg(long, default_value = "runs/cache")]
    cache: PathBuf,
}

const EXAMPLES: &str = "\
Examples:
  tandem sample --model Wan-AI/Wan2.1-T2V-1.3B --prompt \"a cat on a roof\" --prompt \"a dog in the snow\"
  tandem sample --model Wan2.1-T2V-14B --lora cat.safetensors:0.8 --prompts prompts.txt --out clips/cat
  tandem sample --model Wan2.2-TI2V-5B --image first.png --prompt \"she turns her head\"";

impl Sample {
    /// Makes the clips.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let folder = fetched(&self.model, ui)?;
        let interrupt = Interrupt::listen_to(OnStop::Leave).context("cannot listen for Ctrl-C")?;
        let model = self.precision.model(&folder).settle("".as_ref(), self.devices.config().processor())?;
        let (config, _) = model.dits.of(Expert::High).open()?;
        let habits = Habits::of(&config, model.dits.experts().is_some());
        let requests = self.requests(&config, &habits)?;
        let names: Vec<String> =
            requests.iter().enumerate().map(|(i, request)| clip_name(i, &request.prompt)).collect();
        self.check_outputs(&names)?;
        let networks = self.networks(&model, &habits, ui)?;
        let stages = self.devices.config().settle(config.layers)?;
        let split = stages.open()?;
        let device = split[0].0.clone(); // a settled config has a stage

        let mut encoded = Encoded::open(&self.cache, &model)?;
        let texts = requests.iter().flat_map(|r| [r.prompt.as_str(), r.negative.as_str()]);
        let with = Encoding { model: &model, dit: &config, device: &device, interrupt: &interrupt, ui };
        encoded.encode_prompts(texts, &with)?;
        encoded.encode_pictures(&requests, &with)?;
        let prompted = self.prompted(&requests, &encoded, &config, &device)?;
        let mut sampling = Sampling::new(&prompted)?;
        let bar = ui.bar("sampling", networks.iter().map(|network| sampling.steps_of(network.share)).sum());
        for network in networks {
            // An expert that has no steps to make is not loaded.
            if sampling.rounds(network.share) == 0 {
                continue;
            }
            let (dit, weights) = network.dit.open()?;
            let (adapters, weights) = adapters::put(&network.adapters, &dit, weights, Place::Beside, ui)?;
            let mut pipeline = Pipeline::load(&weights, &dit, &split, &adapters, model.precision.dit())?;
            pipeline.set_route(stages.transfer.into())?;
            let flow = sampling.advance(&pipeline, network.share, || {
                bar.inc(1);
                interrupt.flow()
            })?;
            if flow.is_break() {
                return Err(Error::Interrupted.into());
            }
        }
        bar.finish();

        if let Some(path) = &self.save_latents {
            save_latents(path, sampling.latents())?;
        }
        let vae = with.vae()?;
        let tiling = if self.tiled { Tiling::On(Tiles::default()) } else { Tiling::Off };
        let named: Vec<(String, Tensor)> =
            names.into_iter().zip(sampling.latents().iter().cloned()).collect();
        let fps = self.fps.unwrap_or(habits.fps);
        let written = write_clips(&self.out, &vae, tiling, &named, fps, &self.format)?;
        let lines: Vec<String> = written.iter().map(|path| path.display().to_string()).collect();
        ui.tell(&lines.join("\n"), &serde_json::json!({ "files": written }));
        Ok(0)
    }

    /// Makes the folder and tries it, before anything is loaded; what is there is not overwritten without `--force`.
    fn check_outputs(&self, names: &[String]) -> crate::Result<()> {
        for file in clip_files(&self.out, names, &self.format) {
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

    /// The networks that the clips go through, in order.
    fn networks<'a>(&self, model: &'a BaseModel, habits: &Habits, ui: &Ui) -> Result<Vec<Network<'a>>> {
        let read = |key: &str, own: &[String]| -> crate::Result<Vec<Source>> {
            let mut all = adapters::sources("--lora", &self.lora, ui)?;
            all.extend(adapters::sources(key, own, ui)?);
            Ok(all)
        };
        if model.dits.experts().is_none() {
            if !(self.lora_high.is_empty() && self.lora_low.is_empty()) {
                let why = "this model has no experts; give the adapter with --lora".into();
                return Err(Error::Setting { key: "--lora-high, --lora-low".into(), why }.into());
            }
            let adapters = read("--lora", &[])?;
            return Ok(vec![Network { dit: model.dits.of(Expert::High), share: Share::All, adapters }]);
        }
        let boundary = model.boundary.unwrap_or(habits.boundary);
        let network = |expert: Expert| {
            let (key, own) = match expert {
                Expert::High => ("--lora-high", &self.lora_high),
                Expert::Low => ("--lora-low", &self.lora_low),
            };
            adapters::check_experts("--lora", &self.lora, expert, "--lora-EXPERT")?;
            adapters::check_experts(key, own, expert, "--lora-EXPERT")?;
            let share = Share::Of { expert, boundary };
            Ok(Network { dit: model.dits.of(expert), share, adapters: read(key, own)? })
        };
        Expert::ALL.into_iter().map(network).collect()
    }

    /// The requests with what the cache has of them, and their starting noise.
    fn prompted(
        &self,
        requests: &[ClipRequest],
        encoded: &Encoded,
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

    fn requests(&self, config: &DitConfig, habits: &Habits) -> Result<Vec<ClipRequest>> {
        let settings = SampleConfig {
            negative: self.negative.clone().unwrap_or_else(|| SampleConfig::default().negative),
            steps: self.steps,
            guidance: self.guidance,
            guidance_high: self.guidance_high,
            shift: self.shift,
            solver: self.solver,
            convention: self.convention,
            ..SampleConfig::default()
        };
        let [width, height] = self.size(habits)?;
        let frames = self.frames.unwrap_or(habits.frames);
        let base = ClipRequest {
            image: self.image.clone(),
            last_image: self.last_image.clone(),
            ..settings.request(habits, [width, height], frames, self.seed)
        };
        let requests = match &self.prompts {
            Some(path) => base.from_file(path, "--prompts")?,
            None => {
                let request = |prompt: &String| ClipRequest { prompt: prompt.clone(), ..base.clone() };
                self.prompt.iter().map(request).collect()
            }
        };
        for request in &requests {
            request.check(habits.multiple())?;
            request.check_pictures(config)?;
        }
        Ok(requests)
    }

    /// Width and height: what is said, else the picture's aspect, else the model's own.
    fn size(&self, habits: &Habits) -> Result<[u32; 2]> {
        let own = match &self.image {
            Some(path) if self.width.is_none() || self.height.is_none() => {
                let picture = data::Picture::open(path).map_err(Error::from)?;
                habits.size_for(picture.width(), picture.height())
            }
            _ => habits.size,
        };
        Ok([self.width.unwrap_or(own[0]), self.height.unwrap_or(own[1])])
    }
}

/// A network on its way through the sampling.
struct Network<'a> {
    dit: &'a DitFiles,
    share: Share,
    adapters: Vec<Source>,
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
