//! One procedure for all clips: those of `tandem sample`, and those that a run makes while it trains.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use kernels::{Device, Tensor};
use models::vae::Vae;

use super::{ClipFiles, Prompted, Sampled, Session, clip_name, write_clips};
use crate::error::Result;
use crate::learning::NoiseRange;
use crate::machine::devices;
use crate::pipeline::Pipeline;
use crate::watch::interrupt::Interrupt;
use crate::watch::ui::Ui;

/// Has the models that clips are made with, and decides what of them is on the devices when.
pub trait Owner {
    /// The devices of its stages, first to last.
    fn devices(&self) -> Vec<Device>;

    /// The networks that clips go through, in order.
    fn shares(&self) -> Vec<NoiseRange>;

    /// Has the network of `share` on the devices while `work` uses it.
    ///
    /// # Errors
    /// Those of `work`; files that cannot be read, and memory that runs out.
    fn with_network(
        &mut self,
        share: NoiseRange,
        work: &mut dyn FnMut(&Pipeline) -> Result<ControlFlow<()>>,
    ) -> Result<ControlFlow<()>>;

    /// The VAE on the first device, for as long as clips are decoded.
    ///
    /// # Errors
    /// Files that cannot be read, and memory that runs out.
    fn vae(&self) -> Result<Vae>;
}

/// The latents of each clip, [1, c, t, h, w] f32; `None` where the user broke off.
///
/// # Errors
/// When a network fails, and a clip that is not finite.
pub fn latents(
    clips: &[Prompted],
    owner: &mut dyn Owner,
    interrupt: &Interrupt,
    ui: &Ui,
) -> Result<Option<Vec<Tensor>>> {
    let mut session = Session::new(clips)?;
    let shares = owner.shares();
    let bar = ui.bar("sampling", shares.iter().map(|share| session.steps_of(*share)).sum());
    for share in shares {
        // An expert that has no steps to make is not needed.
        if session.steps_of(share) == 0 {
            continue;
        }
        let progress = || {
            bar.inc(1);
            interrupt.flow()
        };
        let flow = owner.with_network(share, &mut |pipeline| session.run(pipeline, share, progress))?;
        if flow.is_break() {
            bar.finish();
            return Ok(None);
        }
    }
    bar.finish();
    devices::tell_refusals(owner.devices().iter(), ui);
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
    owner: &dyn Owner,
    files: ClipFiles,
    ui: &Ui,
) -> Result<Vec<PathBuf>> {
    let vae = owner.vae()?;
    let sampled = clips.iter().zip(latents).enumerate().map(|(index, (clip, latents))| Sampled {
        name: clip_name(index, &clip.request.prompt),
        title: format!("{prefix}{}", clip.request.prompt),
        latents,
    });
    write_clips(folder, &vae, &sampled.collect::<Vec<_>>(), files, ui)
}
