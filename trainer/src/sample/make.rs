//! One procedure for all clips: those of `tandem sample`, and those that a run makes while it trains.

use std::path::{Path, PathBuf};

use kernels::Tensor;

use super::{ClipFiles, Prompted, Sampled, Session, StepDone, clip_name, write_clips};
use crate::error::Result;
use crate::machine::devices;
use crate::residents::Residents;
use crate::watch::interrupt::Interrupt;

/// The latents of each clip, [1, c, t, h, w] f32; `None` where the user broke off.
///
/// # Errors
/// When a network fails, and a clip that is not finite.
pub fn latents(
    clips: &[Prompted],
    residents: &mut Residents,
    interrupt: &Interrupt,
) -> Result<Option<Vec<Tensor>>> {
    let mut session = Session::new(clips)?;
    let (ui, ranges) = (residents.ui().clone(), residents.clip_ranges());
    let bar = ui.bar("sampling", ranges.iter().map(|range| session.steps_of(*range)).sum());
    for range in ranges {
        // An expert that has no steps to make is not needed.
        if session.steps_of(range) == 0 {
            continue;
        }
        let progress = |_: StepDone| {
            bar.inc(1);
            interrupt.flow()
        };
        if residents.for_clips(range, |pipeline| session.run(pipeline, range, progress))?.is_break() {
            bar.finish();
            return Ok(None);
        }
    }
    bar.finish();
    devices::tell_refusals(residents.devices(), &ui);
    Ok(Some(session.latents()))
}

/// Decodes `latents` and writes the clips into `folder`, each with its prompt behind `prefix` as its title. The paths written,
/// the contact sheet last.
///
/// # Errors
/// Those of [`write_clips`].
pub fn files(
    folder: &Path,
    (clips, latents): (&[Prompted], Vec<Tensor>),
    prefix: &str,
    residents: &mut Residents,
    files: ClipFiles,
) -> Result<Vec<PathBuf>> {
    let sampled = clips.iter().zip(latents).enumerate().map(|(index, (clip, latents))| Sampled {
        name: clip_name(index, &clip.request.prompt),
        title: format!("{prefix}{}", clip.request.prompt),
        latents,
    });
    let (ui, vae) = (residents.ui().clone(), residents.vae()?);
    write_clips(folder, &vae, &sampled.collect::<Vec<_>>(), files, &ui)
}
