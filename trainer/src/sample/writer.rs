//! The thread that writes clips while they are decoded.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};

use data::{Film, Mp4Writer};
use models::vae::{Bands, Tiling};

use super::output::clip_file;
use super::pieces::Piece;
use super::{ClipFiles, ClipFormat, Sampled};
use crate::error::{Error, Result};
use crate::watch::ui::Ui;

/// What the thread is told.
enum Message {
    /// Frames of the clip whose turn it is.
    Frames(Vec<u8>),
    /// That these were all.
    End,
}

/// What was written.
pub(super) struct Written {
    /// The clips, in order.
    pub films: Vec<Film>,
    /// Their files.
    pub files: Vec<PathBuf>,
}

/// Decodes `clips` and writes their files into `folder`: a clip's frames are coded while its next ones are decoded.
///
/// # Errors
/// Latents that the VAE does not fit, a clip that is not finite, and files that cannot be written; what was finished before stays.
pub(super) fn write(
    folder: &Path,
    vae: &Bands,
    clips: &[Sampled],
    files: ClipFiles,
    ui: &Ui,
) -> Result<Written> {
    let ratio = vae.first().sizes().spatial_ratio();
    let (sender, messages) = channel();
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || write_all(&messages, folder, (clips, ratio), files));
        let bar = ui.bar("decoding clips", clips.len());
        let decoded = clips.iter().try_for_each(|clip| {
            decode(vae, files.tiling, clip, &sender)?;
            bar.inc(1);
            Ok(())
        });
        bar.finish();
        drop(sender);
        let bar = ui.bar("writing clips", clips.len());
        let written = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        bar.inc(clips.len());
        bar.finish();
        decoded.and(written)
    })
}

/// Sends the frames of `clip` to the writer; ends early where it is gone.
fn decode(vae: &Bands, tiling: Tiling, clip: &Sampled, sender: &Sender<Message>) -> Result<()> {
    for piece in &clip.pieces {
        let (_, _, _, height, width) = piece.latents.dims5()?;
        let ratio = vae.first().sizes().spatial_ratio();
        let mut own = Own::of(piece, height * width * ratio * ratio * 3);
        let mut send = |frames| match sender.send(Message::Frames(own.of_these(frames))) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        };
        vae.decode_frames(&piece.latents, tiling, &mut send).map_err(|error| match error {
            models::Error::NotFinite { .. } => Error::NonFiniteVideo { clip: clip.title.clone() },
            other => other.into(),
        })?;
    }
    // A writer that is gone says why when it is joined.
    let _ = sender.send(Message::End);
    Ok(())
}

/// The frames of a piece that are the clip's.
pub(crate) struct Own {
    /// Bytes of a frame.
    frame: usize,
    /// Frames that are still left out.
    before: usize,
    /// Frames that are still taken.
    left: usize,
}

impl Own {
    /// Of `piece`, whose frames have so many bytes.
    pub fn of(piece: &Piece, frame: usize) -> Self {
        Self { frame, before: piece.before, left: piece.frames }
    }

    /// Those of the next `frames`.
    pub fn of_these(&mut self, mut frames: Vec<u8>) -> Vec<u8> {
        let out = self.before.min(frames.len() / self.frame);
        self.before -= out;
        frames.drain(..out * self.frame);
        let taken = self.left.min(frames.len() / self.frame);
        self.left -= taken;
        frames.truncate(taken * self.frame);
        frames
    }
}

fn write_all(
    messages: &Receiver<Message>,
    folder: &Path,
    (clips, ratio): (&[Sampled], usize),
    ClipFiles { fps, formats, .. }: ClipFiles,
) -> Result<Written> {
    let mut written = Written { films: Vec::new(), files: Vec::new() };
    for clip in clips {
        let Some(first) = clip.pieces.first() else { continue };
        let (_, _, _, height, width) = first.latents.dims5()?;
        let (width, height) = ((width * ratio) as u32, (height * ratio) as u32);
        let mp4 = |path: &Path| Mp4Writer::new(path, width, height, fps);
        let path = clip_file(folder, &clip.name, ClipFormat::Mp4);
        let mut mp4 = formats.contains(&ClipFormat::Mp4).then(|| mp4(&path)).transpose()?;
        let mut rgb = Vec::new();
        loop {
            match messages.recv() {
                Ok(Message::Frames(frames)) => {
                    let each = frames.chunks_exact(width as usize * height as usize * 3);
                    mp4.iter_mut().try_for_each(|mp4| each.clone().try_for_each(|frame| mp4.push(frame)))?;
                    rgb.extend(frames);
                }
                Ok(Message::End) => break,
                // Decoding failed, and says why.
                Err(_) => return Ok(written),
            }
        }
        let film = Film::new(width, height, rgb)
            .ok_or_else(|| Error::Tensor(kernels::Error::msg("the VAE gave no whole frames")))?;
        for format in formats {
            let path = clip_file(folder, &clip.name, *format);
            let label = clip.label.as_deref();
            match format {
                ClipFormat::Mp4 => mp4.take().map_or(Ok(()), |mp4| mp4.finish(label))?,
                ClipFormat::Gif => data::write_commented_gif(&path, &film, fps, label)?,
                ClipFormat::Webp => data::write_commented_webp(&path, &film, fps, label)?,
            }
            written.files.push(path);
        }
        written.films.push(film);
    }
    Ok(written)
}
