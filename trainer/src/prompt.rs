//! Prompt lines: the prompt, with options of its own behind it, as musubi-tuner writes them.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::solver::{Convention, SolverKind};

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
    /// Guidance scale; 1 asks the network once a step instead of twice.
    pub guidance: f64,
    /// Shift of the sigmas.
    pub shift: f64,
    /// Seed of the starting noise.
    pub seed: u64,
    /// Solver.
    pub solver: SolverKind,
    /// Whose grid of sigmas.
    pub convention: Convention,
}

impl ClipRequest {
    /// Checks sizes and numbers; `multiple` is what both sides must be a multiple of.
    ///
    /// # Errors
    /// Naming the value and the nearest valid ones.
    pub fn check(&self, multiple: u32) -> Result<()> {
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
        crate::solver::Schedule::new(self.solver, self.convention, self.steps, self.shift)?;
        match self.guidance.is_finite() {
            true => Ok(()),
            false => {
                Err(Error::Setting { key: "guidance".into(), why: format!("{} is no number", self.guidance) })
            }
        }
    }

    /// This request with the prompt and options of `line` in place of its own:
    /// `--w` width, `--h` height, `--f` frames, `--d` seed, `--s` steps, `--l` guidance, `--fs` shift, `--n` negative prompt.
    ///
    /// # Errors
    /// An unknown option, or a value that cannot be read.
    pub fn with_line(&self, line: &str) -> Result<Self> {
        let mut request = self.clone();
        let mut parts = line.split(" --");
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
                "l" => request.guidance = value.parse().map_err(|_| refuse())?,
                "fs" => request.shift = value.parse().map_err(|_| refuse())?,
                "n" => request.negative = value.to_owned(),
                _ => return Err(refuse()),
            }
        }
        Ok(request)
    }

    /// The requests of a file of prompt lines; empty lines and lines that start with `#` are skipped.
    pub fn from_lines(&self, text: &str) -> Result<Vec<Self>> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        lines.map(|line| self.with_line(line)).collect()
    }
}
