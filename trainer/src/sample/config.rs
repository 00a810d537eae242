//! The `[sample]` section of a recipe.

use std::path::{Path, PathBuf};

use models::dit::DitConfig;
use models::published::Defaults;
use serde::{Deserialize, Serialize};

use super::magcache::CacheConfig;
use crate::encode::conditions::given::GivenConditions;
use crate::encode::preset::Preset;
use crate::encode::prompt::ClipRequest;
use crate::error::Result;
use crate::solver::{Convention, SolverKind};

/// Clips made before, while and after training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SampleConfig {
    /// Prompts, one clip each; each may have options behind it: `--w --h --f --d --s --l --lh --fs --i --ei --n` for
    /// width, height, frames, seed, steps, guidance, guidance at high noise, shift, first and last picture, negative prompt.
    /// Or the name of a text file, relative to the recipe, with one such prompt a line. Default: none, so no clips.
    pub prompts: Prompts,
    /// Steps between two sets of clips, besides the one before the first step and the one after the last; 0 for just
    /// these two. Default 0.
    pub every: u64,
    /// Negative prompt. Default: the one that Wan was published with.
    pub negative: String,
    /// `[width, height]` in pixels. Default: the first of `data.sizes`.
    pub size: Option<[u32; 2]>,
    /// Frames, 4n+1; 0 for the length of the audio of S2V. Default: the longest of `data.frames`.
    pub frames: Option<u32>,
    /// An adapter that is applied for clips only, relative to the recipe: with a distilled one they take few `steps`,
    /// mostly with `guidance = 1`. A file of any format, or a PEFT folder. Default: none.
    pub adapter: Option<PathBuf>,
    /// The same for the expert for high noise only, of a model of two experts. Default: none.
    pub adapter_high: Option<PathBuf>,
    /// The same for the expert for low noise only. Default: none.
    pub adapter_low: Option<PathBuf>,
    /// What their changes are multiplied by. Default 1.
    pub strength: f64,
    /// Solver steps. Default: the model's, 50 or 40.
    pub steps: Option<usize>,
    /// Guidance scale, of both experts where there are two. Default: the model's.
    pub guidance: Option<f64>,
    /// Guidance scale of the expert for high noise. Default: `guidance`, else the model's.
    pub guidance_high: Option<f64>,
    /// Shift of the sigmas. Default: the model's, 5, or 12 for T2V-A14B; 3 is suggested for 480p.
    pub shift: Option<f64>,
    /// `unipc`, `euler`, `dpmpp2m` or `lcm`. Default: the model's, `unipc`, or `dpmpp2m` for Animate.
    pub solver: Option<SolverKind>,
    /// `official` or `diffusers`: whose grid of sigmas, and whose way to scale a picture. Default `official`.
    pub convention: Convention,
    /// Few-step sampling with an adapter that was distilled for it, which `adapter`, or `adapter_high` and `adapter_low`, name:
    /// `lightx2v-4`, `lightx2v-4-lcm`, `lightning-4`, `lightning-8`, `causvid-8`, `causvid-1.3b-4`, `fusionx-8`. It sets steps,
    /// shift, solver and a guidance of 1. Default: none.
    pub preset: Option<Preset>,
    /// With a preset: steps between two sets of clips that are made without it and without its adapters, in all of the model's
    /// own steps, where a set is due. 0 for none. Default 0.
    pub full_every: u64,
    /// MagCache: solver steps that reuse what the blocks added in an earlier step, `"E012K2R20"` or
    /// `{ threshold = 0.12, most = 2, retention = 0.2 }`. Clips differ a little from exact ones. Default: every step is computed.
    pub cache: Option<CacheConfig>,
    /// A table of `tandem calibrate` for it, relative to the recipe. Default: the first clip of the run measures one.
    pub cache_table: Option<PathBuf>,
    /// How clips go through the network on several devices: `pipeline`, split as it is trained; `cfg`, the whole network on each
    /// device, which computes one half of the guidance (or other clips, without guidance); `ulysses`, the whole network on each
    /// device, which computes a part of the tokens of each call, for devices that reach each other directly. Default `auto`: the
    /// fastest of those that fit. The clips are the same, with `ulysses` up to the rounding of sums.
    pub layout: ClipLayout,
    /// Solver steps of a clip between two previews of it, `<clip>.preview.mp4` beside the clip, each in place of the one before;
    /// removed when the clip is finished. 0 for none. Default 0.
    pub preview_every: usize,
    /// The tiny decoder that makes previews, `taew2_1` (models of 5B: `taew2_2`) as .pth or .safetensors, relative to the recipe.
    /// Default: none.
    pub tiny_decoder: Option<PathBuf>,
    /// Seed of the starting noise. Default: the seed of the run.
    pub seed: Option<u64>,
    /// Files of a clip: `mp4`, `gif`, `webp`. Default `["mp4"]`; a PNG contact sheet comes with every set.
    pub formats: Vec<ClipFormat>,
}

/// The prompts of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "prompts in brackets, such as [\"a cat\"], or the name of a file with one a line"
)]
pub enum Prompts {
    /// One clip each.
    Listed(Vec<String>),
    /// A text file of prompt lines.
    File(PathBuf),
}

impl Default for Prompts {
    fn default() -> Self {
        Self::Listed(Vec::new())
    }
}

impl Prompts {
    /// Whether no clips are asked for; a file is taken to ask for some.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Replaces prompt and options of `base` by those of each prompt. The file is looked for in the folder `from`; pictures in
    /// the folder of the file, or in `from`.
    fn requests(&self, base: &ClipRequest, from: &Path) -> Result<Vec<ClipRequest>> {
        match self {
            Self::Listed(lines) => lines.iter().map(|line| base.with_line(line, from)).collect(),
            Self::File(path) => base.from_file(&from.join(path), "sample.prompts"),
        }
    }
}

/// How clips go through the network on several devices. The clips are the same in all of them, with `ulysses` up to the rounding of sums.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ClipLayout {
    /// The fastest that fits.
    #[default]
    Auto,
    /// The blocks are split over the devices, and several calls are in flight.
    Pipeline,
    /// Each device, or group of devices, has the whole network; the halves of the guidance are computed at once.
    Cfg,
    /// Each device has the whole network and a part of the tokens of each call; on four devices and more beside `cfg`.
    Ulysses,
}

impl ClipLayout {
    /// Whether it is left to the plan.
    pub fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

/// A file format of clips.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ClipFormat {
    /// H.264.
    Mp4,
    /// Animated GIF.
    Gif,
    /// Animated WebP.
    Webp,
}

impl ClipFormat {
    /// The ending of such a file, without the dot.
    pub fn extension(self) -> &'static str {
        match self {
            Self::Mp4 => "mp4",
            Self::Gif => "gif",
            Self::Webp => "webp",
        }
    }
}

/// The negative prompt that Wan was published with: Wan-Video/Wan2.1 wan/configs/shared_config.py `sample_neg_prompt`.
pub const OFFICIAL_NEGATIVE: &str = "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，\
低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，\
静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走";

impl Default for SampleConfig {
    fn default() -> Self {
        Self {
            prompts: Prompts::default(),
            every: 0,
            negative: OFFICIAL_NEGATIVE.to_owned(),
            size: None,
            frames: None,
            adapter: None,
            adapter_high: None,
            adapter_low: None,
            strength: 1.0,
            steps: None,
            guidance: None,
            guidance_high: None,
            shift: None,
            solver: None,
            convention: Convention::Official,
            preset: None,
            full_every: 0,
            cache: None,
            cache_table: None,
            layout: ClipLayout::Auto,
            preview_every: 0,
            tiny_decoder: None,
            seed: None,
            formats: vec![ClipFormat::Mp4],
        }
    }
}

impl SampleConfig {
    /// A request without a prompt, with these settings; `defaults`, `size`, `frames` and `seed` serve where the section names
    /// none.
    pub fn request(&self, defaults: &Defaults, size: [u32; 2], frames: u32, seed: u64) -> ClipRequest {
        let [width, height] = self.size.unwrap_or(size);
        let request = ClipRequest {
            prompt: String::new(),
            negative: self.negative.clone(),
            width,
            height,
            frames: self.frames.unwrap_or(frames),
            steps: self.steps.unwrap_or(defaults.steps),
            guidance: self.guidance.unwrap_or(defaults.guidance),
            guidance_high: self.guidance_high.or(self.guidance).unwrap_or(defaults.guidance_high),
            shift: self.shift.unwrap_or(defaults.shift),
            seed: self.seed.unwrap_or(seed),
            solver: self.solver.unwrap_or(defaults.solver.into()),
            convention: self.convention,
            high_steps: None,
            preset: None,
            timesteps: None,
            image: None,
            last_image: None,
            conditions: GivenConditions::default(),
        };
        match self.preset {
            Some(preset) => preset.over(request),
            None => request,
        }
    }

    /// The requests of all prompts from `base` on, checked for `dit`; pictures are looked for from the folder `from`.
    ///
    /// # Errors
    /// An option or a value of a prompt line that cannot work.
    pub fn requests(
        &self,
        base: &ClipRequest,
        from: &Path,
        dit: &DitConfig,
        defaults: &Defaults,
    ) -> Result<Vec<ClipRequest>> {
        let requests = self.prompts.requests(base, from)?;
        let settled = |request: ClipRequest| {
            request.check_pictures(dit)?;
            let request = request.settled(dit)?;
            request.check(defaults.multiple())?;
            Ok(request)
        };
        requests.into_iter().map(settled).collect()
    }
}
