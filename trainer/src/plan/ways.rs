//! The memory of a whole run: its steps, then all that it does besides; and what is said of something that does not fit.

use kernels::weight::Format;
use models::dit::Base;
use models::vae::{Tiles, Tiling};
use models::weights::{Frozen, Storage};

use super::layout::laid;
use super::rest::{Rest, Split};
use crate::bytes::Bytes;
use crate::encode::prompt::ClipRequest;
use crate::error::{Error, Result};
use crate::machine::forecast::{Decoding, Task};
use crate::machine::memory::{self, Machine, MemoryConfig, Phase, PhaseForecast, Settled, Shapes};
use crate::sample::ClipLayout;

/// Who reads the ways out: each has its own names for the same settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wording {
    /// The writer of a recipe.
    Recipe,
    /// The user of `tandem sample`.
    Command,
}

/// Frames of clips that are tried in place of longer ones.
const FRAMES: [u32; 8] = [81, 65, 49, 33, 17, 9, 5, 1];
/// Shares of both sides that are tried in place of the whole.
const SIDES: [f64; 3] = [0.75, 0.5, 0.25];

/// Settles the memory of the steps of a run, and with it that of the `rest`.
///
/// Where clips cannot be decoded beside the DiT, its matrices wait in host memory meanwhile. `has_texts` is asked where the
/// text encoder does not fit: whether the cache has the states of all texts, so that it is not loaded.
///
/// # Errors
/// A step, or something besides, that does not fit: what is missing, and what would fit.
pub(super) fn settled(
    task: &Task,
    machine: &Machine,
    (asked, given, layout): (&MemoryConfig, Option<&[usize]>, ClipLayout),
    shapes: &Shapes,
    rest: &Rest,
    has_texts: impl Fn() -> Result<bool>,
) -> Result<Settled> {
    let settled = memory::settle(task, machine, asked, given, shapes)?;
    let with_phases = |settled: Settled| {
        let task = settled.task(task);
        let phases = rest.phases(split(&task, machine, &settled))?;
        Ok::<_, Error>(Settled { forecast: settled.forecast.with_phases(phases), ..settled })
    };
    let mut best = with_phases(settled)?;
    let is_misfit = |phase: &PhaseForecast| phase.phase == Phase::Decoding && phase.misfit().is_some();
    if best.forecast.phases.iter().any(is_misfit)
        && let Some(apart) = memory::settle_apart(task, machine, asked, shapes, &best)?
    {
        best = with_phases(apart)?;
    }
    let task = best.task(task);
    if !rest.clips.is_empty() {
        let laid = laid(rest, split(&task, machine, &best), layout, Wording::Recipe)?;
        let grouped = Rest { clip_groups: laid.groups, clip_sharing: laid.sharing, ..rest.clone() };
        if laid.groups.get() * laid.sharing.get() > 1 {
            let sampling = grouped.sampling(split(&task, machine, &best), &rest.clips)?;
            let phases = &mut best.forecast.phases;
            phases
                .iter_mut()
                .filter(|phase| phase.phase == Phase::Sampling)
                .for_each(|phase| *phase = sampling.clone());
        }
        best = best.with_clips(laid.groups, laid.sharing, laid.to_string());
    }
    let mut needed = best.forecast.phases.clone();
    // The text encoder is not loaded where the cache has all that it would make.
    let is_text = |phase: &PhaseForecast| phase.phase == Phase::TextEncoder;
    if needed.iter().any(|phase| is_text(phase) && !fits(phase)) && has_texts()? {
        needed.retain(|phase| !is_text(phase));
    }
    checked(rest, split(&task, machine, &best), &needed, shapes, Wording::Recipe)?;
    Ok(best)
}

fn split<'a>(task: &'a Task<'a>, machine: &'a Machine, settled: &'a Settled) -> Split<'a> {
    let choice = &settled.choice;
    let pinned = choice.stages.iter().map(|stage| stage.host).sum();
    Split { task, machine, blocks: &choice.split, ffn_tokens: choice.ffn_tokens, pinned }
}

/// Checks that all `phases` of `rest` fit.
///
/// # Errors
/// The first that does not: what is missing, and every single change that helps.
pub fn checked(
    rest: &Rest,
    dit: Split,
    phases: &[PhaseForecast],
    shapes: &Shapes,
    wording: Wording,
) -> Result<()> {
    let misfit = phases.iter().find_map(|phase| Some((phase, phase.misfit()?)));
    let Some((phase, memory)) = misfit else { return Ok(()) };
    let ways = Ways { rest, dit, wording };
    let ways = match phase.phase {
        Phase::TextEncoder => ways.of_text_encoder()?,
        Phase::EncodingClips | Phase::HeldOutLoss => ways.of_buckets(phase.phase, shapes)?,
        Phase::EncodingPictures | Phase::Sampling | Phase::Decoding => ways.of_clips(phases)?,
    };
    Err(Error::PhaseTooLarge {
        phase: phase.phase,
        place: memory.place(dit.machine),
        needed: Bytes(memory.needed),
        room: Bytes(memory.room.bytes().unwrap_or(0)),
        ways,
    })
}

/// Looks for changes by which something fits; each is played before it is named.
struct Ways<'a> {
    rest: &'a Rest,
    dit: Split<'a>,
    wording: Wording,
}

impl Ways<'_> {
    fn of_text_encoder(&self) -> Result<Vec<String>> {
        let held = self.rest.precision.text();
        let quantised = Frozen { storage: Storage::Quantised(Format::E4m3), ..held };
        let helps = !held.is_quantised() && fits(&self.rest.text_encoder(self.dit, quantised)?);
        Ok(match (helps, self.wording) {
            (false, _) => Vec::new(),
            (true, Wording::Recipe) => vec!["model.text_base = \"fp8\" or \"int8\"".to_owned()],
            (true, Wording::Command) => vec!["--text-base fp8 or int8".to_owned()],
        })
    }

    fn of_buckets(&self, phase: Phase, shapes: &Shapes) -> Result<Vec<String>> {
        let size = |(t, h, w): (usize, usize, usize)| t * h * w;
        let largest = self.rest.bucket.map_or(0, size);
        for (what, latents) in &shapes.possible {
            let smaller = size(*latents) < largest;
            let of = || match phase {
                Phase::HeldOutLoss => self.rest.held_out_loss(self.dit, *latents),
                _ => self.rest.encoding_clips(self.dit, *latents),
            };
            if smaller && fits(&of()?) {
                return Ok(vec![format!("clips of at most {what} (data.sizes, data.frames)")]);
            }
        }
        // Nothing that the recipe names is small enough.
        let (frames, height, width) = self.rest.bucket.unwrap_or((1, 1, 1));
        for shorter in FRAMES.into_iter().filter(|n| models::vae::latent_frames(*n as usize) < frames) {
            let latents = (models::vae::latent_frames(shorter as usize), height, width);
            let of = match phase {
                Phase::HeldOutLoss => self.rest.held_out_loss(self.dit, latents),
                _ => self.rest.encoding_clips(self.dit, latents),
            };
            if fits(&of?) {
                return Ok(vec![format!("data.frames = [{shorter}]")]);
            }
        }
        Ok(Vec::new())
    }

    /// What helps clips, one of whose `phases` does not fit.
    fn of_clips(&self, phases: &[PhaseForecast]) -> Result<Vec<String>> {
        let mut ways: Vec<String> = self.more_host()?.into_iter().collect();
        let clips = &self.rest.clips;
        if self.wording == Wording::Command && self.rest.tiling == Tiling::Off {
            let tiled = Rest { tiling: Tiling::On(Tiles::default()), ..self.rest.clone() };
            if self.clips_fit(&tiled, self.dit, clips)? {
                ways.push("--tiled".to_owned());
            }
        }
        let longest = clips.iter().map(|clip| clip.frames).max().unwrap_or(1);
        for frames in FRAMES.into_iter().filter(|frames| *frames < longest) {
            let shorter: Vec<ClipRequest> = clips
                .iter()
                .map(|clip| ClipRequest { frames: clip.frames.min(frames), ..clip.clone() })
                .collect();
            if self.clips_fit(self.rest, self.dit, &shorter)? {
                ways.push(match self.wording {
                    Wording::Recipe => format!("sample.frames = {frames}"),
                    Wording::Command => format!("--frames {frames}"),
                });
                break;
            }
        }
        ways.extend(self.smaller()?);
        ways.extend(self.quantised()?);
        let is_of_clips = |phase: &&PhaseForecast| {
            matches!(phase.phase, Phase::EncodingPictures | Phase::Sampling | Phase::Decoding)
        };
        if self.wording == Wording::Recipe && phases.iter().filter(|phase| !is_of_clips(phase)).all(fits) {
            ways.push("no sample.prompts".to_owned());
        }
        Ok(ways)
    }

    /// The pinned host memory that lets the DiT's matrices wait there while clips are decoded, where that helps.
    fn more_host(&self) -> Result<Option<String>> {
        let dit = self.dit;
        let apart = Task { decoding: Decoding::Alone, ..dit.task.clone() };
        if dit.task.decoding == Decoding::Alone || self.wording == Wording::Command {
            return Ok(None);
        }
        let matrices = dit.matrices()?;
        if matrices == 0 {
            return Ok(None);
        }
        let helps = self.clips_fit(self.rest, Split { task: &apart, ..dit }, &self.rest.clips)?;
        let gib = (dit.pinned + matrices).div_ceil(1 << 30);
        Ok(helps
            .then(|| format!("memory.host_memory = \"{gib}GiB\", where the machine has that much to pin")))
    }

    /// A smaller size of clips that helps.
    fn smaller(&self) -> Result<Option<String>> {
        let (clips, unit) = (&self.rest.clips, self.rest.defaults.multiple());
        let cut = |side: u32, share: f64| ((f64::from(side) * share) as u32 / unit).max(1) * unit;
        for share in SIDES {
            let smaller: Vec<ClipRequest> = clips
                .iter()
                .map(|clip| ClipRequest {
                    width: cut(clip.width, share),
                    height: cut(clip.height, share),
                    ..clip.clone()
                })
                .collect();
            if self.clips_fit(self.rest, self.dit, &smaller)? {
                let largest = smaller.iter().max_by_key(|clip| clip.width * clip.height);
                return Ok(largest.map(|ClipRequest { width, height, .. }| match self.wording {
                    Wording::Recipe => format!("sample.size = [{width}, {height}]"),
                    Wording::Command => format!("--width {width} --height {height}"),
                }));
            }
        }
        Ok(None)
    }

    /// Quantised matrices of the DiT, where they help.
    fn quantised(&self) -> Result<Option<String>> {
        let Task { base, .. } = *self.dit.task;
        let storage = Storage::Quantised(Format::E4m3);
        let quantised = Base { frozen: Frozen { storage, ..base.frozen }, ..base };
        let task = Task { base: quantised, ..self.dit.task.clone() };
        let dit = Split { task: &task, ..self.dit };
        let helps = !base.frozen.is_quantised() && self.clips_fit(self.rest, dit, &self.rest.clips)?;
        Ok(helps.then(|| match self.wording {
            Wording::Recipe => "model.base = \"fp8\"".to_owned(),
            Wording::Command => "--base fp8".to_owned(),
        }))
    }

    /// Whether all that is done for `clips` fits.
    fn clips_fit(&self, rest: &Rest, dit: Split, clips: &[ClipRequest]) -> Result<bool> {
        let has_pictures = clips.iter().any(ClipRequest::has_conditions);
        if has_pictures && !fits(&rest.encoding_pictures(dit, clips)?) {
            return Ok(false);
        }
        Ok(fits(&rest.sampling(dit, clips)?) && fits(&rest.decoding(dit, clips, rest.tiling)?))
    }
}

fn fits(phase: &PhaseForecast) -> bool {
    phase.misfit().is_none()
}
