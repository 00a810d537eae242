//! One procedure for all clips: those of `tandem sample`, and those that a run makes while it trains.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use kernels::Tensor;
use models::vae::Bands;

use super::pieces::{Growing, Piece};
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
    /// The latents of each clip, [1, c, t, h, w] f32; of one in pieces, those of all pieces one behind the other.
    pub latents: Vec<Tensor>,
    /// The same as they are decoded.
    pub pieces: Vec<Vec<Piece>>,
    /// How the residual of the clip that is measured changed, by step and half of the guidance.
    pub changes: Vec<(usize, Half, Change)>,
}

/// Goes through all steps of `clips`, piece by piece where they have several; `None` where the user broke off.
///
/// # Errors
/// When a network fails, and a clip that is not finite.
pub fn latents(
    clips: &[Prompted],
    residents: &mut Residents,
    course: Course,
    interrupt: &Interrupt,
) -> Result<Option<Stepped>> {
    let numbers: Vec<usize> = (0..clips.len()).collect();
    let Some((first, changes)) = steps((clips, &numbers), residents, course, interrupt)? else {
        return Ok(None);
    };
    let begun = clips.iter().zip(first).map(|(clip, latents)| Growing::begun(clip, latents));
    let mut growing = begun.collect::<Result<Vec<_>>>()?;
    let most = clips.iter().map(|clip| clip.shown.later.len()).max().unwrap_or(0);
    for index in 1..=most {
        let going: Vec<usize> =
            numbers.iter().copied().filter(|clip| clips[*clip].shown.later.len() >= index).collect();
        residents.ui().note(&format!("piece {} of {}", index + 1, most + 1));
        let vae = residents.vae()?;
        for clip in &going {
            growing[*clip].look_back(&clips[*clip], &vae, index)?;
            interrupt.check()?;
        }
        drop(vae);
        let next = going.iter().map(|clip| growing[*clip].next(&clips[*clip], index));
        let next = next.collect::<Result<Vec<_>>>()?;
        let skipped: Vec<Vec<usize>> =
            going.iter().filter_map(|clip| course.skipped.get(*clip).cloned()).collect();
        let course = Course { skipped: &skipped, measured: None, ..course };
        let Some((made, _)) = steps((&next, &going), residents, course, interrupt)? else {
            return Ok(None);
        };
        for (clip, latents) in going.into_iter().zip(made) {
            growing[clip].continued(&clips[clip], latents)?;
        }
    }
    let whole = |own: &Growing| Ok(Tensor::cat(&own.latents, 2)?);
    let latents = growing.iter().map(whole).collect::<Result<Vec<_>>>()?;
    Ok(Some(Stepped { latents, pieces: growing.into_iter().map(|own| own.pieces).collect(), changes }))
}

/// The latents of each clip without those of references, and how the residual of the one that is measured changed.
type Made = (Vec<Tensor>, Vec<(usize, Half, Change)>);

/// Goes through all steps of `clips`, of which these are the numbers; `None` where the user broke off.
fn steps(
    (clips, numbers): (&[Prompted], &[usize]),
    residents: &mut Residents,
    course: Course,
    interrupt: &Interrupt,
) -> Result<Option<Made>> {
    let mut session = Session::new(clips)?.skipping(course.skipped);
    if let Some(clip) = course.measured {
        session = session.measuring(clip);
    }
    let begin = |previews: Previews| {
        let decoder = residents.tiny_decoder(&previews.plan.decoder, previews.plan.latents())?;
        previews.begin(decoder, (clips, numbers))
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
    Ok(Some((own.collect::<Result<_>>()?, changes)))
}

/// The latents [1, c, t, h, w] of `clip` without those of reference pictures in front.
pub(super) fn without_references(latents: &Tensor, clip: &Prompted) -> Result<Tensor> {
    let in_front = clip.shown.frames_in_front()?;
    Ok(match in_front {
        0 => latents.clone(),
        _ => latents.narrow(2, in_front, latents.dim(2)? - in_front)?.contiguous()?,
    })
}

/// Decodes `pieces` and writes the clips into `folder`, each with its prompt behind `prefix` as its title. The paths written,
/// the contact sheet last.
///
/// # Errors
/// Those of [`write_clips`].
pub fn files(
    folder: &Path,
    (clips, pieces, skipped): (&[Prompted], Vec<Vec<Piece>>, &[Vec<usize>]),
    prefix: &str,
    residents: &mut Residents,
    files: ClipFiles,
) -> Result<Vec<PathBuf>> {
    let sampled = clips.iter().zip(pieces).enumerate().map(|(index, (clip, pieces))| Sampled {
        name: clip_name(index, &clip.request.prompt),
        title: format!("{prefix}{}", clip.request.prompt),
        label: label(&clip.request, skipped.get(index).map_or(0, Vec::len)),
        pieces,
    });
    let ui = residents.ui().clone();
    let vae = Bands::new(residents.vaes(files.bands)?, residents.route())?;
    write_clips(folder, &vae, &sampled.collect::<Vec<_>>(), files, &ui)
}
