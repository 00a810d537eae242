//! One procedure for all clips: those of `tandem sample`, and those that a run makes while it trains.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use kernels::Tensor;
use models::vae::Bands;

use super::preview::Previewing;
use super::{ClipFiles, Half, Previews, Prompted, Sampled, Session, StepDone, clip_name, write_clips};
use crate::encode::preset::label;
use crate::error::Result;
use crate::machine::devices;
use crate::pipeline::{Change, Pipeline};
use crate::residents::{ClipAdapters, Residents};
use crate::watch::interrupt::Interrupt;

/// What is out of the ordinary in the steps of a set of clips.
#[derive(Debug, Clone, Copy, Default)]
pub struct Course<'a> {
    /// Steps that each clip skips; none where this is empty.
    pub skipped: &'a [Vec<usize>],
    /// The clip whose residuals are measured.
    pub measured: Option<usize>,
    /// Adapters that networks have for clips alone.
    pub clip_adapters: ClipAdapters,
    /// Where previews go, if there are any.
    pub previews: Option<Previews<'a>>,
    /// Counts the solver steps of all clips as they are made, for whoever shows progress elsewhere.
    pub made: Option<&'a AtomicUsize>,
}

/// What came of the steps of a set of clips.
#[derive(Debug)]
pub struct Stepped {
    /// The latents of each clip, [1, c, t, h, w] f32.
    pub latents: Vec<Tensor>,
    /// How the residual of the clip that is measured changed, by step and half of the guidance.
    pub changes: Vec<(usize, Half, Change)>,
}

/// Goes through all steps of `clips`; `None` where the user broke off.
///
/// # Errors
/// When a network fails, and a clip that is not finite.
pub fn latents(
    clips: &[Prompted],
    residents: &mut Residents,
    course: Course,
    interrupt: &Interrupt,
) -> Result<Option<Stepped>> {
    let mut session = Session::new(clips)?.skipping(course.skipped);
    if let Some(clip) = course.measured {
        session = session.measuring(clip);
    }
    let begin = |previews: Previews| {
        let decoder = residents.tiny_decoder(&previews.plan.decoder, previews.plan.latents())?;
        previews.begin(decoder, clips)
    };
    let previewing = course.previews.map(begin).transpose()?;
    let (mut failed, mut is_stopped) = (None, false);
    let (ui, ranges) = (residents.ui().clone(), residents.clip_ranges());
    let bar = ui.bar("sampling", ranges.iter().map(|range| session.steps_of(*range)).sum());
    for range in ranges {
        // An expert that has no steps to make is not needed.
        if session.steps_of(range) == 0 {
            continue;
        }
        let progress = |done: StepDone| {
            bar.inc(1);
            if let Some(made) = course.made {
                made.fetch_add(1, Ordering::Relaxed);
            }
            failed = previewing.as_ref().and_then(|previewing| previewing.show(&done).err());
            if failed.is_some() { ControlFlow::Break(()) } else { interrupt.flow() }
        };
        let run = |groups: &[Pipeline]| session.run(groups, range, progress);
        is_stopped = residents.for_clips(range, course.clip_adapters, run)?.is_break();
        if is_stopped {
            break;
        }
    }
    bar.finish();
    previewing.map_or(Ok(()), Previewing::finish)?;
    match (failed, is_stopped) {
        (Some(failed), _) => return Err(failed),
        (None, true) => return Ok(None),
        (None, false) => {}
    }
    devices::tell_refusals(residents.devices(), &ui);
    let changes = course.measured.map_or_else(Vec::new, |clip| session.changes(clip).to_vec());
    let latents = session.latents();
    let own = clips.iter().zip(&latents).map(|(clip, latents)| without_references(latents, clip));
    Ok(Some(Stepped { latents: own.collect::<Result<_>>()?, changes }))
}

/// The latents [1, c, t, h, w] of `clip` without those of reference pictures in front.
pub(super) fn without_references(latents: &Tensor, clip: &Prompted) -> Result<Tensor> {
    let in_front = clip.shown.frames_in_front()?;
    Ok(match in_front {
        0 => latents.clone(),
        _ => latents.narrow(2, in_front, latents.dim(2)? - in_front)?.contiguous()?,
    })
}

/// Decodes `latents` and writes the clips into `folder`, each with its prompt behind `prefix` as its title. The paths written,
/// the contact sheet last.
///
/// # Errors
/// Those of [`write_clips`].
pub fn files(
    folder: &Path,
    (clips, latents, skipped): (&[Prompted], Vec<Tensor>, &[Vec<usize>]),
    prefix: &str,
    residents: &mut Residents,
    files: ClipFiles,
) -> Result<Vec<PathBuf>> {
    let sampled = clips.iter().zip(latents).enumerate().map(|(index, (clip, latents))| Sampled {
        name: clip_name(index, &clip.request.prompt),
        title: format!("{prefix}{}", clip.request.prompt),
        label: label(&clip.request, skipped.get(index).map_or(0, Vec::len)),
        latents,
    });
    let ui = residents.ui().clone();
    let vae = Bands::new(residents.vaes(files.bands)?, residents.route())?;
    write_clips(folder, &vae, &sampled.collect::<Vec<_>>(), files, &ui)
}
