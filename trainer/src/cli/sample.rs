//! `tandem sample`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use clap::Args;
use models::adapter::Place;
use models::vae::{Tiles, Tiling};
use models::weights::Checkpoint;

use super::devices::StageDevices;
use super::fetch::fetched;
use super::precision::ModelPrecision;
use crate::adapters;
use crate::base::{MODEL_FPS, SIZE_MULTIPLE};
use crate::encode::{Encoded, Encoding};
use crate::error::Error;
use crate::interrupt::Interrupt;
use crate::pipeline::Pipeline;
use crate::prompt::ClipRequest;
use crate::sample::{ClipFormat, Prompted, SampleConfig, clip_name, generate, starting_noise, write_clips};
use crate::solver::{Convention, SolverKind};
use crate::ui::Ui;

/// Make clips from prompts, many from one load of the model.
#[derive(Debug, Args)]
pub struct Sample {
    /// Checkpoint folder, official or diffusers layout, or a model of the Hugging Face hub as owner/name.
    #[arg(long)]
    model: PathBuf,
    /// An adapter in any format, a file or a PEFT folder, with its strength behind a colon where it is not 1. May be given more than once.
    #[arg(long, value_name = "FILE[:STRENGTH]")]
    lora: Vec<String>,
    /// What to show.
    #[arg(long, required_unless_present = "prompts", conflicts_with = "prompts")]
    prompt: Option<String>,
    /// A file of prompts, one a line, each with options of its own behind it:
    /// --w width --h height --f frames --d seed --s steps --l guidance --fs shift --n negative prompt.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// What to keep away from. Default: the negative prompt that Wan was published with.
    #[arg(long)]
    negative: Option<String>,
    /// Width in pixels.
    #[arg(long, default_value_t = 832)]
    width: u32,
    /// Height in pixels.
    #[arg(long, default_value_t = 480)]
    height: u32,
    /// Frames, 4n+1.
    #[arg(long, default_value_t = 81)]
    frames: u32,
    /// Solver steps.
    #[arg(long, default_value_t = 50)]
    steps: usize,
    /// Guidance scale; 1 asks the network once a step instead of twice.
    #[arg(long, default_value_t = 5.0)]
    guidance: f64,
    /// Shift of the sigmas.
    #[arg(long, default_value_t = 5.0)]
    shift: f64,
    /// Seed of the starting noise.
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Solver.
    #[arg(long, value_enum, default_value_t = SolverKind::UniPc)]
    solver: SolverKind,
    /// Whose grid of sigmas.
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
    /// Frames a second of the files.
    #[arg(long, default_value_t = MODEL_FPS)]
    fps: f64,
    /// Decode in tiles: less memory, faint seams possible.
    #[arg(long)]
    tiled: bool,
    #[command(flatten)]
    precision: ModelPrecision,
    #[command(flatten)]
    devices: StageDevices,
    /// Folder of cached text states.
    #[arg(long, default_value = "runs/cache")]
    cache: PathBuf,
}

impl Sample {
    /// Makes the clips.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let folder = fetched(&self.model, ui)?;
        let interrupt = Interrupt::listen().context("cannot listen for Ctrl-C")?;
        let requests = self.requests()?;
        let model = self.precision.model(&folder).settle("".as_ref(), self.devices.config().processor())?;
        let (config, weights) = model.open_dit()?;
        let sources = adapters::sources("--lora", &self.lora, ui)?;
        let (adapters, weights) = adapters::put(&sources, &config, weights, Place::Beside, ui)?;
        let stages = self.devices.config().settle(config.layers)?;
        let split = stages.open()?;
        let device = split[0].0.clone(); // a settled config has a stage

        let encoded = Encoded::open(&self.cache, &model)?;
        let texts = requests.iter().flat_map(|r| [r.prompt.as_str(), r.negative.as_str()]);
        let with = Encoding { model: &model, device: &device, interrupt: &interrupt, ui };
        encoded.encode_prompts(texts, &with)?;
        let mut pipeline = Pipeline::load(&weights, &config, &split, &adapters, model.precision.dit())?;
        pipeline.set_route(stages.transfer.into())?;
        let given = self.latents.as_deref().map(Checkpoint::open).transpose().map_err(models::Error::from);
        let given = given.map_err(Error::from)?;
        let mut prompted = Vec::new();
        for (i, request) in requests.iter().enumerate() {
            let noise = match &given {
                Some(file) => given_noise(file, i)?,
                None => starting_noise(request, config.out_channels, &device)?,
            };
            prompted.push(Prompted::new(request, noise.to_device(&device)?, &encoded)?);
        }
        let bar = ui.bar("sampling", requests.iter().map(|r| r.steps).max().unwrap_or(0));
        let latents = generate(&pipeline, &prompted, || {
            bar.inc(1);
            interrupt.flow()
        })?;
        bar.finish();
        let latents = latents.ok_or(Error::Interrupted)?;
        drop(pipeline);

        if let Some(path) = &self.save_latents {
            save_latents(path, &latents)?;
        }
        let vae = model.load_vae(&device)?;
        let tiling = if self.tiled { Tiling::On(Tiles::default()) } else { Tiling::Off };
        let names = requests.iter().enumerate().map(|(i, r)| clip_name(i, &r.prompt));
        let named: Vec<(String, Tensor)> = names.zip(latents).collect();
        let written = write_clips(&self.out, &vae, tiling, &named, self.fps, &self.format)?;
        let lines: Vec<String> = written.iter().map(|path| path.display().to_string()).collect();
        ui.tell(&lines.join("\n"), &serde_json::json!({ "files": written }));
        Ok(0)
    }

    fn requests(&self) -> Result<Vec<ClipRequest>> {
        let settings = SampleConfig {
            negative: self.negative.clone().unwrap_or_else(|| SampleConfig::default().negative),
            steps: self.steps,
            guidance: self.guidance,
            shift: self.shift,
            solver: self.solver,
            convention: self.convention,
            ..SampleConfig::default()
        };
        let base = settings.request([self.width, self.height], self.frames, self.seed);
        let requests = match (&self.prompt, &self.prompts) {
            (_, Some(path)) => {
                let io = |source| Error::Io { action: "read the prompts", path: path.clone(), source };
                base.from_lines(&std::fs::read_to_string(path).map_err(io)?)?
            }
            (prompt, None) => vec![ClipRequest { prompt: prompt.clone().unwrap_or_default(), ..base }],
        };
        if requests.is_empty() {
            let key = "--prompts".to_owned();
            return Err(Error::Setting { key, why: "the file holds no prompt".into() }.into());
        }
        requests.iter().try_for_each(|request| request.check(SIZE_MULTIPLE))?;
        Ok(requests)
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
