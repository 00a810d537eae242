//! Prompt lines: the prompt, with options of its own behind it, as musubi-tuner writes them.

use std::path::{Path, PathBuf};

use models::dit::{DitConfig, Pictures};
use serde::{Deserialize, Serialize};

use super::conditions::given::{CameraPath, GivenConditions};
use super::length;
use super::preset::Preset;
use crate::bounds::{FRAMES, SIDE, SOLVER_STEPS, VOLUME, at_most, near};
use crate::error::{Error, Result};
use crate::solver::{Convention, Schedule, SolverKind};

/// Everything that a clip is made from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClipRequest {
    /// What to show.
    pub prompt: String,
    /// What to keep away from.
    pub negative: String,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Frames, 4n+1.
    pub frames: u32,
    /// Solver steps.
    pub steps: usize,
    /// Guidance scale; 1 asks the network once a step instead of twice. Of two experts, that of the one for low noise.
    pub guidance: f64,
    /// Guidance scale of the expert for high noise.
    pub guidance_high: f64,
    /// Shift of the sigmas.
    pub shift: f64,
    /// Seed of the starting noise.
    pub seed: u64,
    /// Solver.
    pub solver: SolverKind,
    /// Whose grid of sigmas, and whose way to scale a picture.
    pub convention: Convention,
    /// Steps that the expert for high noise makes, of two experts; where this says nothing, their sigmas decide.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub high_steps: Option<usize>,
    /// The preset that set steps, shift, solver and guidance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preset: Option<Preset>,
    /// A fixed grid in place of one by steps and shift: the timesteps, 1000 times the sigmas, without the final 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timesteps: Option<Vec<f32>>,
    /// The picture that the clip starts with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<PathBuf>,
    /// The picture that it ends with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_image: Option<PathBuf>,
    /// What else a control model makes the clip from.
    #[serde(default, skip_serializing_if = "GivenConditions::is_empty")]
    pub conditions: GivenConditions,
}

impl ClipRequest {
    /// Checks sizes and numbers; `multiple` is what both sides must be a multiple of.
    ///
    /// # Errors
    /// Naming the value and the nearest valid ones.
    pub fn check(&self, multiple: u32) -> Result<()> {
        check_bounds(self)?;
        let (w, h) = (self.width, self.height);
        if w == 0 || h == 0 || w % multiple != 0 || h % multiple != 0 {
            let nearest = data::SizeMultiple::new(multiple).nearest(w, h);
            let why =
                format!("{w}x{h}: both sides must be multiples of {multiple}; nearest valid: {nearest}");
            return Err(Error::Setting { key: "size of a clip".into(), why });
        }
        if self.frames % 4 != 1 {
            let down = self.frames.max(1).div_ceil(4) * 4 - 3;
            let why = format!("{} is not of the form 4n+1; nearest: {down}, {}", self.frames, down + 4);
            return Err(Error::Setting { key: "frames of a clip".into(), why });
        }
        if self.preset.is_some_and(|preset| preset.over(self.clone()) != *self) {
            let why = "its preset sets steps, shift, guidance and solver; leave them out".into();
            return Err(Error::Setting { key: "steps, shift, guidance of a clip".into(), why });
        }
        self.schedule()?;
        Ok(())
    }

    /// Whether it is made from anything besides text.
    pub fn has_conditions(&self) -> bool {
        self.image.is_some() || !self.conditions.is_empty()
    }

    /// Latent frames before the clip's own: reference pictures of VACE and Animate.
    pub fn frames_in_front(&self, dit: &DitConfig) -> usize {
        dit.control.frames_of_references(self.conditions.references.len())
    }

    /// (frames, height, width) of its latents on their way through `dit`, with those before the clip's own; of a clip in pieces, those
    /// of a piece.
    pub fn latents(&self, dit: &DitConfig) -> (usize, usize, usize) {
        let defaults = dit.kind.facts().whole;
        let frames = length::of_piece(self, &dit.control);
        let (frames, height, width) = defaults.latents(frames, self.height, self.width);
        (frames + self.frames_in_front(dit), height, width)
    }

    /// Pieces that it is made in, one after the other: one, but for long clips of S2V.
    pub fn pieces(&self, dit: &DitConfig) -> usize {
        length::pieces(self, &dit.control)
    }

    /// The same with the length of its audio where it asks for that with 0 frames; checks that its audio is as long as the clip.
    ///
    /// # Errors
    /// Audio that cannot be read or is too short, a size in which clips cannot be continued, and 0 frames of a model that hears nothing.
    pub fn settled(self, dit: &DitConfig) -> Result<Self> {
        length::settled(self, dit)
    }

    /// The noise levels and timesteps of its steps.
    ///
    /// # Errors
    /// A grid that cannot be.
    pub fn schedule(&self) -> Result<Schedule> {
        Ok(match &self.timesteps {
            Some(timesteps) => {
                let sigmas: Vec<f32> = timesteps.iter().map(|timestep| timestep / 1000.0).collect();
                Schedule::given(self.solver, &sigmas, timesteps)?
            }
            None => Schedule::new(self.solver, self.convention, self.steps, self.shift)?,
        })
    }

    /// Checks that the clip has the pictures and other conditions that `dit` takes.
    ///
    /// # Errors
    /// Conditions that are missing, or that the model has no use for.
    pub fn check_pictures(&self, dit: &DitConfig) -> Result<()> {
        self.conditions.check(dit, self.image.is_some())?;
        let needs_last = dit.image.is_some_and(|image| image.positions.is_some());
        let why = match (dit.pictures(), &self.image, &self.last_image) {
            (Pictures::None, None, None) | (Pictures::Condition, _, None) => return Ok(()),
            (Pictures::Condition, _, Some(_)) => {
                "this model takes a first picture alone; leave the last one out"
            }
            (Pictures::None, ..) => "this model makes clips from text alone; leave the picture out",
            (_, None, Some(_)) => "a last picture without a first one; name both",
            (Pictures::Beside, None, _) => {
                "this model makes clips from a picture: name one (--image, or --i behind a prompt)"
            }
            (Pictures::InPlace, _, Some(_)) => {
                "this model takes a first picture alone; leave the last one out"
            }
            (_, Some(_), None) if needs_last => {
                "this model goes from a first picture to a last one: name that too (--last-image, or --ei behind a prompt)"
            }
            _ => return Ok(()),
        };
        Err(Error::Setting { key: "picture of a clip".into(), why: why.into() })
    }

    /// This request with the prompt and options of `line` in place of its own:
    /// `--w` width, `--h` height, `--f` frames, `--d` seed, `--s` steps, `--l` guidance, `--lh` guidance of the expert for
    /// high noise where it differs, `--fs` shift, `--i` first picture, `--ei` last picture, `--cv` control clip, `--mk` mask,
    /// `--hs` factor of VACE's hints, `--fc` face clip, `--bg` background, `--ref` reference picture (any number), `--cam` camera move or file of poses, `--au` audio, `--pf` frames of a piece, `--n` negative prompt. Files are looked for
    /// from the folder `from`.
    ///
    /// # Errors
    /// An unknown option, or a value that cannot be read.
    pub fn with_line(&self, line: &str, from: &Path) -> Result<Self> {
        let mut request = self.clone();
        let (mut parts, mut guidance_high, mut references) = (line.split(" --"), None, Vec::new());
        request.prompt = parts.next().unwrap_or_default().trim().to_owned();
        for part in parts {
            let (option, value) = part.trim().split_once(char::is_whitespace).unwrap_or((part.trim(), ""));
            let value = value.trim();
            let refuse =
                || Error::PromptOption { line: line.to_owned(), option: format!("--{option} {value}") };
            match option {
                "w" => request.width = value.parse().map_err(|_| refuse())?,
                "h" => request.height = value.parse().map_err(|_| refuse())?,
                "f" => request.frames = value.parse().map_err(|_| refuse())?,
                "d" => request.seed = value.parse().map_err(|_| refuse())?,
                "s" => request.steps = value.parse().map_err(|_| refuse())?,
                "l" => {
                    request.guidance = value.parse().map_err(|_| refuse())?;
                    request.guidance_high = request.guidance;
                }
                "lh" => guidance_high = Some(value.parse().map_err(|_| refuse())?),
                "i" if !value.is_empty() => request.image = Some(from.join(value)),
                "ei" if !value.is_empty() => request.last_image = Some(from.join(value)),
                "cv" if !value.is_empty() => request.conditions.control = Some(from.join(value)),
                "mk" if !value.is_empty() => request.conditions.mask = Some(from.join(value)),
                "hs" => request.conditions.hint_scale = Some(value.parse().map_err(|_| refuse())?),
                "fc" if !value.is_empty() => request.conditions.faces = Some(from.join(value)),
                "bg" if !value.is_empty() => request.conditions.background = Some(from.join(value)),
                "ref" if !value.is_empty() => references.push(from.join(value)),
                "au" if !value.is_empty() => request.conditions.audio = Some(from.join(value)),
                "pf" => request.conditions.piece_frames = Some(value.parse().map_err(|_| refuse())?),
                "cam" if !value.is_empty() => {
                    request.conditions.camera = Some(CameraPath::parse(value, from));
                }
                "fs" => request.shift = value.parse().map_err(|_| refuse())?,
                "n" => request.negative = value.to_owned(),
                _ => return Err(refuse()),
            }
        }
        request.guidance_high = guidance_high.unwrap_or(request.guidance_high);
        if !references.is_empty() {
            request.conditions.references = references;
        }
        Ok(request)
    }

    /// The requests of the file of prompt lines at `path`, which `key` names; pictures are looked for in its folder.
    ///
    /// # Errors
    /// A file that cannot be read or that holds no prompt, and those of [`Self::with_line`].
    pub fn from_file(&self, path: &Path, key: &str) -> Result<Vec<Self>> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Setting {
            key: key.to_owned(),
            why: format!("cannot read the prompts in {}: {source}", path.display()),
        })?;
        // Editors of other systems mark UTF-8 by three bytes at the beginning.
        let text = text.trim_start_matches('\u{feff}');
        match self.from_lines(text, path.parent().unwrap_or("".as_ref()))? {
            requests if requests.is_empty() => {
                let why = format!("{} holds no prompt", path.display());
                Err(Error::Setting { key: key.to_owned(), why })
            }
            requests => Ok(requests),
        }
    }

    /// The requests of a file of prompt lines, whose folder is `from`; empty lines and lines that start with `#` are skipped.
    pub fn from_lines(&self, text: &str, from: &Path) -> Result<Vec<Self>> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        lines.map(|line| self.with_line(line, from)).collect()
    }
}

/// Checks the numbers of a clip against their bounds.
fn check_bounds(clip: &ClipRequest) -> Result<()> {
    let (width, height, frames) = (u64::from(clip.width), u64::from(clip.height), u64::from(clip.frames));
    at_most("size of a clip", width.max(height), SIDE)?;
    at_most("frames of a clip", frames, FRAMES)?;
    at_most("width x height x frames of a clip", width * height * frames, VOLUME)?;
    at_most("steps of a clip", clip.steps as u64, SOLVER_STEPS)?;
    near("guidance of a clip", clip.guidance)?;
    near("guidance of a clip", clip.guidance_high)?;
    near("shift of a clip", clip.shift)
}
