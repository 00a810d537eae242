//! The `[sample]` section of a recipe.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::prompt::ClipRequest;
use crate::solver::{Convention, SolverKind};

/// Clips made before, while and after training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SampleConfig {
    /// Prompts, one clip each; each may have options behind it: `--w --h --f --d --s --l --fs --n` for width, height,
    /// frames, seed, steps, guidance, shift and negative prompt. Default: none, so no clips.
    pub prompts: Vec<String>,
    /// Steps between two sets of clips, besides the one before the first step and the one after the last; 0 for just
    /// these two. Default 0.
    pub every: u64,
    /// Negative prompt. Default: the one that Wan was published with.
    pub negative: String,
    /// `[width, height]` in pixels. Default: the first of `data.sizes`.
    pub size: Option<[u32; 2]>,
    /// Frames, 4n+1. Default: the longest of `data.frames`.
    pub frames: Option<u32>,
    /// An adapter that is put to the model for clips alone, relative to the recipe: a distilled one makes them in few `steps`,
    /// mostly with `guidance = 1`. A file of any format, or a PEFT folder. Default: none.
    pub adapter: Option<PathBuf>,
    /// What its changes are multiplied by. Default 1.
    pub strength: f64,
    /// Solver steps. Default 50.
    pub steps: usize,
    /// Guidance scale. Default 5.
    pub guidance: f64,
    /// Shift of the sigmas. Default 5; 3 is suggested for 480p.
    pub shift: f64,
    /// `unipc`, `euler` or `dpmpp2m`. Default `unipc`.
    pub solver: SolverKind,
    /// `official` or `diffusers`: whose grid of sigmas. Default `official`.
    pub convention: Convention,
    /// Seed of the starting noise. Default: the seed of the run.
    pub seed: Option<u64>,
    /// Files of a clip: `mp4`, `gif`, `webp`. Default `["mp4"]`; a PNG contact sheet comes with every set.
    pub formats: Vec<ClipFormat>,
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
            prompts: Vec::new(),
            every: 0,
            negative: OFFICIAL_NEGATIVE.to_owned(),
            size: None,
            frames: None,
            adapter: None,
            strength: 1.0,
            steps: 50,
            guidance: 5.0,
            shift: 5.0,
            solver: SolverKind::UniPc,
            convention: Convention::Official,
            seed: None,
            formats: vec![ClipFormat::Mp4],
        }
    }
}

impl SampleConfig {
    /// A request without a prompt, with these settings; `size`, `frames` and `seed` serve where the section names none.
    pub fn request(&self, size: [u32; 2], frames: u32, seed: u64) -> ClipRequest {
        let [width, height] = self.size.unwrap_or(size);
        ClipRequest {
            prompt: String::new(),
            negative: self.negative.clone(),
            width,
            height,
            frames: self.frames.unwrap_or(frames),
            steps: self.steps,
            guidance: self.guidance,
            shift: self.shift,
            seed: self.seed.unwrap_or(seed),
            solver: self.solver,
            convention: self.convention,
        }
    }

    /// The requests of all prompts, checked.
    ///
    /// # Errors
    /// An option or a value of a prompt line that cannot work.
    pub fn requests(
        &self,
        size: [u32; 2],
        frames: u32,
        seed: u64,
        multiple: u32,
    ) -> Result<Vec<ClipRequest>> {
        let base = self.request(size, frames, seed);
        let requests: Vec<ClipRequest> =
            self.prompts.iter().map(|line| base.with_line(line)).collect::<Result<_>>()?;
        requests.iter().try_for_each(|request| request.check(multiple))?;
        Ok(requests)
    }
}
