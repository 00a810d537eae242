//! Previews: what a clip looks like on its way, through a tiny decoder.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use data::Film;
use kernels::{Device, Tensor};
use models::dit::DitConfig;
use models::vae::{TinyDecoder, TinyLatents, TinySizes};
use serde::{Deserialize, Serialize};

use super::output::film;
use super::{Prompted, StepDone, clip_name};
use crate::error::{Error, Result};
use crate::watch::ui::Ui;

/// Previews that may wait for their file.
const WAITING: usize = 1;

/// When previews are made, and by what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PreviewPlan {
    /// Solver steps of a clip between two previews; at least 1.
    pub every: usize,
    /// The file of the tiny decoder.
    pub decoder: PathBuf,
}

impl PreviewPlan {
    /// Settles it: both are given, or neither. `keys` name the two settings; the model is `dit`.
    ///
    /// # Errors
    /// One of the two alone, a file that holds no tiny decoder, and one for latents of another width.
    pub fn settle(
        [every_key, decoder_key]: [&str; 2],
        every: usize,
        decoder: Option<PathBuf>,
        dit: &DitConfig,
    ) -> Result<Option<Self>> {
        let refuse = |key: &str, why: String| Err(Error::Setting { key: key.into(), why });
        match (every, decoder) {
            (0, None) => Ok(None),
            (0, Some(_)) => refuse(decoder_key, format!("is for previews: set {every_key} too")),
            (_, None) => {
                let name = if dit.out_channels == 48 { "taew2_2" } else { "taew2_1" };
                let why = format!(
                    "needs a tiny decoder: name the file of {name} with {decoder_key} (`tandem fetch Kijai/WanVideo_comfy --only \
                     {name}` downloads it)"
                );
                refuse(every_key, why)
            }
            (every, Some(decoder)) => {
                let (has, sizes) = (dit.out_channels, TinySizes::at(&decoder)?);
                if sizes.latent != has {
                    let right = if has == 48 { "taew2_2" } else { "taew2_1" };
                    let why = format!(
                        "{} decodes latents of {} channels, and this model's have {has}: give {right}",
                        decoder.display(),
                        sizes.latent
                    );
                    return refuse(decoder_key, why);
                }
                Ok(Some(Self { every, decoder }))
            }
        }
    }

    /// The latents that the decoder takes, which its name tells.
    pub fn latents(&self) -> TinyLatents {
        TinyLatents::by_name(&self.decoder)
    }

    /// Says it where the decoder takes latents other than the usual ones.
    pub fn tell(&self, ui: &Ui) {
        if self.latents() == TinyLatents::Raw {
            ui.note(&format!(
                "{}: by its name one of LightX2V's, which decodes latents without scaling; rename it if it is not",
                self.decoder.display()
            ));
        }
    }
}

/// Where previews of a set of clips go.
#[derive(Debug, Clone, Copy)]
pub struct Previews<'a> {
    /// When they are made.
    pub plan: &'a PreviewPlan,
    /// The folder of the clips.
    pub folder: &'a Path,
    /// Frames a second.
    pub fps: f64,
}

impl Previews<'_> {
    fn file(&self, index: usize, clip: &Prompted) -> PathBuf {
        preview_file(self.folder, &clip_name(index, &clip.request.prompt))
    }

    /// Removes those of `clips`, which are finished.
    ///
    /// # Errors
    /// A file that cannot be removed.
    pub fn remove(&self, clips: &[Prompted]) -> Result<()> {
        for (index, clip) in clips.iter().enumerate() {
            let path = self.file(index, clip);
            match std::fs::remove_file(&path) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::Io { action: "remove", path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Begins to make them of `clips`, of which these are the numbers, with `decoder`.
    ///
    /// # Errors
    /// Conditions without an axis of frames.
    pub(super) fn begin(
        &self,
        decoder: Arc<TinyDecoder>,
        (clips, numbers): (&[Prompted], &[usize]),
    ) -> Result<Previewing> {
        let files = clips.iter().zip(numbers).map(|(clip, number)| self.file(*number, clip)).collect();
        let (sender, films) = sync_channel::<(PathBuf, Film)>(WAITING);
        let fps = self.fps;
        let writer = std::thread::spawn(move || {
            films.into_iter().try_for_each(|(path, film)| Ok(data::write_mp4(&path, &film, fps)?))
        });
        let in_front = clips.iter().map(|clip| clip.shown.frames_in_front()).collect::<Result<_>>()?;
        let (every, sender, writer) = (self.plan.every, Some(sender), Some(writer));
        Ok(Previewing { decoder, every, files, in_front, sender, writer })
    }
}

/// The video of `latents` `[1,c,t,h,w]` through `decoder`, on `host`: its device has the frames of one latent frame at a time.
///
/// # Errors
/// Latents that the decoder does not take.
pub fn preview_video(decoder: &TinyDecoder, latents: &Tensor, host: &Device) -> Result<Tensor> {
    let mut stream = decoder.stream();
    // A clip may be at home on another device.
    let latents = latents.to_device(decoder.device())?;
    let frames = (0..latents.dim(2)?).map(|t| Ok(stream.push(&latents.narrow(2, t, 1)?)?.to_device(host)?));
    Ok(Tensor::cat(&frames.collect::<Result<Vec<_>>>()?, 2)?)
}

/// The file of the preview of the clip `name`.
pub fn preview_file(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.preview.mp4"))
}

/// Previews under way: decoded where the latents are, written by a thread of their own.
pub(super) struct Previewing {
    decoder: Arc<TinyDecoder>,
    every: usize,
    files: Vec<PathBuf>,
    /// Latent frames of each clip that are reference pictures.
    in_front: Vec<usize>,
    sender: Option<SyncSender<(PathBuf, Film)>>,
    writer: Option<JoinHandle<Result<()>>>,
}

impl Previewing {
    /// Makes the preview behind a step, where one is due: not behind the last, which the clip itself follows.
    pub fn show(&self, done: &StepDone) -> Result<()> {
        let made = done.step + 1;
        if !made.is_multiple_of(self.every) || made == done.steps {
            return Ok(());
        }
        let (predicted, in_front) = (done.predicted()?, self.in_front[done.clip]);
        let own = predicted.narrow(2, in_front, predicted.dim(2)? - in_front)?;
        let film = film(&preview_video(&self.decoder, &own, &Device::Cpu)?)?;
        let sent = self.sender.as_ref().map(|sender| sender.send((self.files[done.clip].clone(), film)));
        // A writer that is gone says why when it is joined.
        if matches!(sent, Some(Err(_))) { Err(Error::NeighbourStopped) } else { Ok(()) }
    }

    /// Waits for the last file.
    pub fn finish(mut self) -> Result<()> {
        self.sender = None;
        match self.writer.take().map(JoinHandle::join) {
            Some(Ok(written)) => written,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(()),
        }
    }
}
