//! `tandem probe`.

mod learning;
mod sample;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};
use kernels::device::Settings;
use kernels::{Device, Tensor};
use models::adapter::Adapters;
use models::clip::Clip;
use models::dit::{Base, DitConfig};
use models::text::TextEncoder;
use models::vae::{Tiles, Tiling, TinyDecoder, TinyLatents, Vae};
use models::wav2vec::SpeechEncoder;
use models::weights::Weights;

use super::fetch::on_this_machine;
use super::precision::ProbePrecision;
use crate::base::{self, DitFiles, Part};
use crate::error::Error;
use crate::machine::devices::{self, DevicesConfig};
use crate::machine::precision::{Float, Processor};
use crate::pipeline::Pipeline;
use crate::solver::{Convention, Schedule, SolverKind};
use crate::tools::probe::{self, Inputs, Outputs, Past, train::TrainProbe};
use crate::watch::ui::Ui;
use learning::{CasesProbe, LossProbe, OptimizerProbe};
use sample::SampleProbe;

/// Run one part on given tensors, to compare it with another implementation.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Probe {
    #[command(subcommand)]
    part: ProbePart,
}

const EXAMPLES: &str = "\
Examples:
  tandem probe dit --model Wan2.1-T2V-1.3B --input x.safetensors --output y.safetensors
  tandem probe solver --steps 20 --shift 5";

#[derive(Debug, Subcommand)]
enum ProbePart {
    /// The network: `input` [b,c,t,h,w], `timestep` [b] or [b,l], `context` [b,512,text_dim], of models with an image branch
    /// `clip_fea` [b,257,1280], of control models `ref_latent` [b,c,h,w], `camera` [b,24,t,8h,8w], `vace_context` [b,96,t,h,w], or
    /// `pose_latents` [b,c,t-1,h,w] with `face_pixel_values` [b,3,4(t-2)+1,512,512] in -1..1, of S2V `ref_latent` [b,c,1,h,w],
    /// `pose_latents` [b,c,t,h,w], `audio_embeds` [b,25,1024,4t] and `motion_latents` [b,c,19,h,w] -> `output`.
    Dit(DitProbe),
    /// The conditioning of control models from pixels in -1..1, masks and camera poses, with the VAE.
    ///
    /// Of all that the input names, each condition is made that can be: `video` [1,3,f,h,w] with `mask` [1,1,f,h,w] (1 = generate)
    /// gives `mask_latents` (4 channels, 1 = given), `masked_latents`, `y_inp` and `vace_context`; `control_video` gives
    /// `control_latents` and `y_control11`; `start_image` [1,3,1,h,w] gives `y_camera11` and, with `control_video`,
    /// `y_control11_start`; `control_video`, `video` and a mask give `y_control22`; `ref_image` gives `ref_latent`; `poses` [f,19] with any
    /// of the clips for the size give `pluecker` and `camera`; the pictures that --reference names are put in
    /// front of `vace_context`. What ends a mask's or poses' name, as in `mask_first_frame`, ends the names of what is made of it.
    ///
    /// Of Animate, `pose_video` [1,3,f,h,w] gives `pose_latents` and, with the reference `ref` [1,3,1,h,w], `y_move_first`; `bg_video`
    /// and `mask` (1 = character) give `y_replace_first`; `prev_frames` [1,3,k,h,w], the last of the clip before, give `y_move_next` and
    /// `y_replace_next`.
    ///
    /// Of S2V, a `pose_video` of 4t frames gives `pose_latents` of t, `ref` `ref_latent`, `motion_video` [1,3,73,h,w] `motion_latents`;
    /// `audio_hidden_50hz` [25,n,c] gives `audio_hidden_30hz` and `audio_clips` [r,25,c,f] of --clip-frames.
    Condition(ConditionProbe),
    /// The VAE's encoder: `video` [b,3,t,h,w] in -1..1 -> `latents`, scaled.
    VaeEncode(VaeProbe),
    /// The VAE's decoder: `latents` [b,c,t,h,w], scaled -> `video` in -1..1.
    VaeDecode(VaeProbe),
    /// A tiny decoder: `latents` [b,c,t,h,w], scaled -> `video` [b,3,1+4(t-1),8h,8w] in -1..1.
    TinyDecode(TinyProbe),
    /// CLIP's picture tower: `image_u8_hwc` [h,w,3] in 0..255, or `pixels` [b,3,side,side] as the tower takes them ->
    /// `clip_fea` [b,257,1280], and the `pixels`.
    Clip(ClipProbe),
    /// S2V's speech encoder (wav2vec 2.0): `waveform_16k` [n], mono at 16 kHz -> `input_values`, normalised, `hidden_states`
    /// [layers+1,t,width] at 50 a second, the last behind the encoder's norm, and `audio_hidden_30hz`.
    Audio(AudioProbe),
    /// Tokenizer and text encoder: prompts -> `ids.N`, `context.N`, without padding.
    Text(TextProbe),
    /// A whole sampling loop: `noise` [c,t,h,w], `context` and `context_null` [rows,text_dim], for MagCache `table` [steps,2],
    /// for solvers that re-noise `renoise` [steps-1,c,t,h,w] -> `latents` [steps,c,t,h,w] after each step.
    Sample(SampleProbe),
    /// A solver: its sigmas and timesteps as JSON; with --input it integrates v(x,s) = 0.5x + (0.2+s)sin(2x) - c.
    Solver(SolverProbe),
    /// An optimiser: `p0.N` and `grad.N` [steps,...] -> `p.N` [steps,...] after each step.
    Optimizer(OptimizerProbe),
    /// Losses with masks and weights by sigma: `pred`, `target` [b,c,t,h,w], `sigma` [b], `maskN.pixels` [b,f,h,w] in 0..255 ->
    /// `maskN.latent`, `weight_clamp`, `weight_lerp`, `grad.LOSS.WEIGHTS.REDUCTION`, and the losses as JSON.
    Loss(LossProbe),
    /// Learning rates of every step by every schedule, as JSON; a warm-up begins with the rate 0, as in transformers.
    Schedule(CasesProbe),
    /// Noise levels by every distribution on given random numbers, as JSON.
    Timesteps(CasesProbe),
    /// Training steps: `x0`, `noise`, `sigmas` or `timesteps` (per step, sample or token), `context`, `init.*`, and where the
    /// model takes them `cond` (or `y`), `clip_fea`, `ref_latent`, `camera`, `vace_context`, `pose_latents`, `face_pixel_values`,
    /// `loss_weight_mask` -> `losses`, `grad_norms`, `grad0.*`, `final.*`.
    Train(TrainingProbe),
}

/// The files of input and output tensors.
#[derive(Debug, Args)]
struct Files {
    /// Safetensors file of the input tensors.
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// Safetensors file for the output tensors.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

/// A DiT and its devices.
#[derive(Debug, Args)]
struct DitModel {
    /// Checkpoint folder (official or diffusers layout, or the DiT's own folder), or a file of weights.
    #[arg(long, value_name = "DIR_OR_FILE", value_parser = on_this_machine)]
    model: PathBuf,
    /// `config.json` of the DiT. Default: the one in the folder of the weights.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Device of the whole model: cpu, cuda:0, ...
    #[arg(long, conflicts_with = "stages")]
    device: Option<String>,
    /// Devices of the stages of the pipeline, such as cpu,cpu.
    #[arg(long, value_delimiter = ',')]
    stages: Vec<String>,
    #[command(flatten)]
    precision: ProbePrecision,
}

#[derive(Debug, Args)]
struct DitProbe {
    #[command(flatten)]
    model: DitModel,
    /// What VACE's side chain adds to the main stream is multiplied by this.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    hint_scale: f64,
    /// S2V without `motion_latents`, as in the first of several clips.
    #[arg(long)]
    drop_motion: bool,
    #[command(flatten)]
    files: Files,
}

/// The VAE, the input and what VACE is shown.
#[derive(Debug, Args)]
struct ConditionProbe {
    /// The VAE: a checkpoint folder or a file of weights.
    #[arg(long, value_name = "DIR_OR_FILE", value_parser = on_this_machine)]
    model: PathBuf,
    /// The VAE's diffusers `config.json`, for its latent statistics. Default: the one in the folder, else Wan's own.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A reference picture of VACE by its name in the input; may be given more than once, in their order.
    #[arg(long, value_name = "NAME")]
    reference: Vec<String>,
    /// VACE without a video: everything is generated.
    #[arg(long)]
    no_video: bool,
    /// Frames of a clip of S2V, for `audio_clips`.
    #[arg(long, value_name = "N", default_value_t = 80)]
    clip_frames: usize,
    #[command(flatten)]
    coding: Coding,
}

/// The files of an encoder's or decoder's input and output tensors, and its device.
#[derive(Debug, Args)]
struct Coding {
    #[command(flatten)]
    files: Files,
    /// Dtype of the part.
    #[arg(long, value_enum, default_value_t = Float::Float32)]
    dtype: Float,
    /// cpu, cuda:0, ...
    #[arg(long, default_value = "cpu")]
    device: String,
}

#[derive(Debug, Args)]
struct VaeProbe {
    /// Checkpoint folder (official or diffusers layout, or the VAE's own folder), or a file of weights.
    #[arg(long, value_name = "DIR_OR_FILE", value_parser = on_this_machine)]
    model: PathBuf,
    /// The VAE's diffusers `config.json`, for its latent statistics. Default: the one in the folder, else Wan's own.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    coding: Coding,
    /// Encode and decode in tiles.
    #[arg(long)]
    tiled: bool,
    /// Height and width of a tile in pixels.
    #[arg(long, requires = "tiled", default_value_t = Tiles::default().size.0)]
    tile: usize,
    /// Pixels from one tile to the next.
    #[arg(long, requires = "tiled", default_value_t = Tiles::default().stride.0)]
    stride: usize,
}

#[derive(Debug, Args)]
struct TinyProbe {
    /// taew2_1 or taew2_2, .pth or .safetensors. A file named lighttae... is taken for LightX2V's variant, which decodes
    /// latents without scaling.
    #[arg(long, value_name = "FILE")]
    file: PathBuf,
    /// One frame for each latent frame, without growth in time.
    #[arg(long)]
    latent_rate: bool,
    #[command(flatten)]
    coding: Coding,
}

#[derive(Debug, Args)]
struct ClipProbe {
    /// Checkpoint folder (official or diffusers layout), or the tower's own folder or file.
    #[arg(long, value_name = "DIR_OR_FILE", value_parser = on_this_machine)]
    model: PathBuf,
    /// The tower's HF `config.json`, for the number of heads. Default: the one in the folder, else heads of 80.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    coding: Coding,
}

#[derive(Debug, Args)]
struct AudioProbe {
    /// `model.safetensors` of wav2vec2-large-xlsr-53-english, or its folder.
    #[arg(long, value_name = "DIR_OR_FILE", value_parser = on_this_machine)]
    model: PathBuf,
    /// Its `config.json`, for the number of heads. Default: the one beside the weights, else heads of 64.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    files: Files,
    /// cpu, cuda:0, ...
    #[arg(long, default_value = "cpu")]
    device: String,
}

#[derive(Debug, Args)]
struct TextProbe {
    /// Checkpoint folder (official or diffusers layout), or the text encoder's folder or file.
    #[arg(long, value_name = "DIR_OR_FILE", value_parser = on_this_machine)]
    model: PathBuf,
    /// `tokenizer.json` or its folder. Default: the checkpoint folder's.
    #[arg(long, value_name = "DIR_OR_FILE")]
    tokenizer: Option<PathBuf>,
    /// JSON list of strings.
    #[arg(long, value_name = "FILE")]
    prompts: PathBuf,
    /// Safetensors file for the output tensors.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    precision: ProbePrecision,
    /// cpu, cuda:0, ...
    #[arg(long, default_value = "cpu")]
    device: String,
}

#[derive(Debug, Args)]
struct SolverProbe {
    /// Solver.
    #[arg(long, value_enum, default_value_t = SolverKind::UniPc)]
    kind: SolverKind,
    /// The grid of sigmas.
    #[arg(long, value_enum, default_value_t = Convention::Official)]
    convention: Convention,
    /// Steps.
    #[arg(long)]
    steps: usize,
    /// Shift of the sigmas.
    #[arg(long)]
    shift: f64,
    /// Safetensors file with `x` and `c`: integrate from x.
    #[arg(long, value_name = "FILE", requires = "output")]
    input: Option<PathBuf>,
    /// Safetensors file for `x` [steps+1,...], `sigmas` [steps+1], `timesteps` [steps].
    #[arg(long, value_name = "FILE", requires = "input")]
    output: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct TrainingProbe {
    #[command(flatten)]
    model: DitModel,
    #[command(flatten)]
    files: Files,
    /// JSON with rank, alpha, lr and, where not PyTorch's defaults, betas, eps, weight_decay.
    #[arg(long, value_name = "FILE")]
    train_config: PathBuf,
}

impl Probe {
    /// Runs the part and writes its outputs.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        match &self.part {
            ProbePart::Dit(probe) => {
                let inputs = Inputs::open(&probe.files.input)?;
                let (mut config, weights) = probe.model.open()?;
                if let Some(chain) = &mut config.control.side_chain {
                    chain.scale = probe.hint_scale;
                }
                let inputs = inputs.with_faces(&config, &weights)?;
                let pipeline = probe.model.pipeline(&config, &weights, &Adapters::default())?;
                let past = if probe.drop_motion { Past::LeftOut } else { Past::Shown };
                finish(&probe.files.output, &probe::dit(&pipeline, &inputs, past)?, ui)
            }
            ProbePart::Condition(probe) => {
                let inputs = Inputs::open(&probe.coding.files.input)?;
                let asked = (probe.reference.as_slice(), probe.no_video, probe.clip_frames);
                let made = probe::condition::make(&probe.vae()?, &inputs, asked)?;
                finish(&probe.coding.files.output, &made, ui)
            }
            ProbePart::VaeEncode(probe) => {
                let inputs = Inputs::open(&probe.coding.files.input)?;
                let latents =
                    probe.vae()?.encode(&inputs.ranked("video", 5)?, probe.tiling()).map_err(Error::from)?;
                finish(&probe.coding.files.output, &Outputs::from([("latents".to_owned(), latents)]), ui)
            }
            ProbePart::VaeDecode(probe) => {
                let inputs = Inputs::open(&probe.coding.files.input)?;
                let video = probe
                    .vae()?
                    .decode(&inputs.ranked("latents", 5)?, probe.tiling())
                    .map_err(Error::from)?;
                finish(&probe.coding.files.output, &Outputs::from([("video".to_owned(), video)]), ui)
            }
            ProbePart::TinyDecode(probe) => {
                let inputs = Inputs::open(&probe.coding.files.input)?;
                let video = probe.video(&inputs.ranked("latents", 5)?)?;
                finish(&probe.coding.files.output, &Outputs::from([("video".to_owned(), video)]), ui)
            }
            ProbePart::Clip(probe) => {
                let inputs = Inputs::open(&probe.coding.files.input)?;
                finish(&probe.coding.files.output, &probe::clip::encode(&probe.tower()?, &inputs)?, ui)
            }
            ProbePart::Audio(probe) => {
                let inputs = Inputs::open(&probe.files.input)?;
                finish(&probe.files.output, &probe::audio::encode(&probe.encoder()?, &inputs)?, ui)
            }
            ProbePart::Text(probe) => {
                let prompts = probe::text::read_prompts(&probe.prompts)?;
                finish(&probe.output, &probe::text::encode(&probe.encoder()?, &prompts)?, ui)
            }
            ProbePart::Solver(probe) => probe.run(ui),
            ProbePart::Optimizer(probe) => probe.run(ui),
            ProbePart::Loss(probe) => probe.run(ui),
            ProbePart::Schedule(probe) => learning::print(&probe::schedule::rates(&probe.cases)?, ui),
            ProbePart::Timesteps(probe) => learning::print(&probe::timesteps::sigmas(&probe.cases)?, ui),
            ProbePart::Sample(probe) => probe.run(ui),
            ProbePart::Train(probe) => {
                let inputs = Inputs::open(&probe.files.input)?;
                let settings = TrainProbe::read(&probe.train_config)?;
                for key in settings.unused.keys() {
                    ui.note(&format!("{}: `{key}` is not used", probe.train_config.display()));
                }
                let (config, weights) = probe.model.open()?;
                let inputs = inputs.with_faces(&config, &weights)?;
                let adapters = probe::train::starting_adapters(&inputs, &config, &settings)?;
                let mut pipeline = probe.model.pipeline(&config, &weights, &adapters)?;
                finish(&probe.files.output, &probe::train::train(&mut pipeline, &inputs, &settings)?, ui)
            }
        }
    }
}

impl DitModel {
    fn open(&self) -> crate::Result<(DitConfig, Weights)> {
        let dit = base::locate(&self.model, Part::Dit)?;
        DitFiles::at(&dit, self.config.clone())?.open()
    }

    fn pipeline(
        &self,
        config: &DitConfig,
        weights: &Weights,
        adapters: &Adapters,
    ) -> crate::Result<Pipeline> {
        let stages = self.device.iter().chain(&self.stages).cloned().collect();
        let devices = DevicesConfig { stages, ..DevicesConfig::default() }.settle(config.layers)?;
        let base = Base::new(self.precision.frozen(devices.processor()));
        Pipeline::load(weights, config, &devices.open()?, adapters, base)
    }
}

impl Coding {
    fn device(&self) -> crate::Result<Device> {
        devices::open(&self.device, &Settings::default())
    }
}

impl ConditionProbe {
    fn vae(&self) -> crate::Result<Vae> {
        let path = base::locate(&self.model, Part::Vae)?;
        Ok(Vae::load(&path, self.config.as_deref(), self.coding.dtype.dtype(), &self.coding.device()?)?)
    }
}

impl VaeProbe {
    fn vae(&self) -> crate::Result<Vae> {
        let path = base::locate(&self.model, Part::Vae)?;
        Ok(Vae::load(&path, self.config.as_deref(), self.coding.dtype.dtype(), &self.coding.device()?)?)
    }

    fn tiling(&self) -> Tiling {
        let square = |side: usize| (side, side);
        match self.tiled {
            true => Tiling::On(Tiles { size: square(self.tile), stride: square(self.stride) }),
            false => Tiling::Off,
        }
    }
}

impl TinyProbe {
    fn video(&self, latents: &Tensor) -> crate::Result<Tensor> {
        let (latents_of, dtype) = (TinyLatents::by_name(&self.file), self.coding.dtype.dtype());
        let decoder = TinyDecoder::load(&self.file, latents_of, dtype, &self.coding.device()?)?;
        Ok(match self.latent_rate {
            true => decoder.decode_at_latent_rate(latents)?,
            false => decoder.decode(latents)?,
        })
    }
}

impl ClipProbe {
    fn tower(&self) -> crate::Result<Clip> {
        let path = base::locate(&self.model, Part::Clip)?;
        Ok(Clip::load(&path, self.config.as_deref(), self.coding.dtype.dtype(), &self.coding.device()?)?)
    }
}

impl AudioProbe {
    fn encoder(&self) -> crate::Result<SpeechEncoder> {
        let device = devices::open(&self.device, &Settings::default())?;
        Ok(SpeechEncoder::load(&self.model, self.config.as_deref(), &device)?)
    }
}

impl TextProbe {
    fn encoder(&self) -> crate::Result<TextEncoder> {
        let weights = base::locate(&self.model, Part::TextEncoder)?;
        // For a file or folder of weights, the tokenizer is in the checkpoint folder above it.
        let around = || if weights == self.model { self.model.parent() } else { None };
        let tokenizer = match (&self.tokenizer, around()) {
            (Some(named), _) => named.clone(),
            (None, Some(_)) if base::carries_tokenizer(&weights) => weights.clone(),
            (None, Some(folder)) => folder.to_owned(),
            (None, None) => base::locate(&self.model, Part::Tokenizer)?,
        };
        let device: Device = devices::open(&self.device, &Settings::default())?;
        let frozen = self.precision.frozen(Processor::of(&device));
        Ok(TextEncoder::load(&weights, &tokenizer, frozen, &device)?)
    }
}

impl SolverProbe {
    fn run(&self, ui: &Ui) -> Result<u8> {
        let schedule =
            Schedule::new(self.kind, self.convention, self.steps, self.shift).map_err(Error::from)?;
        if let (Some(input), Some(output)) = (&self.input, &self.output) {
            probe::write(output, &probe::solver::integrate(&schedule, &Inputs::open(input)?)?)?;
        }
        let object = serde_json::json!({ "sigmas": schedule.sigmas, "timesteps": schedule.timesteps });
        ui.tell(&object.to_string(), &object);
        Ok(0)
    }
}

/// Writes the tensors and prints what was written.
fn finish(path: &std::path::Path, outputs: &Outputs, ui: &Ui) -> Result<u8> {
    probe::write(path, outputs)?;
    let shapes: serde_json::Map<String, serde_json::Value> =
        outputs.iter().map(|(name, tensor)| (name.clone(), tensor.dims().into())).collect();
    let text = format!("{}: {} tensors", path.display(), outputs.len());
    ui.tell(&text, &serde_json::json!({ "output": path, "tensors": shapes }));
    Ok(0)
}
