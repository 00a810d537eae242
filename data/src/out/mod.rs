//! Finished clips out: H.264 MP4, GIF, animated WebP, contact sheets, and sound as WAV. No system package is needed for any of them.

mod animated;
mod h264;
mod letters;
mod mp4;
mod sheet;
mod wav;

use std::path::{Path, PathBuf};

pub use animated::{write_commented_gif, write_commented_webp, write_gif, write_webp};
pub use sheet::{SheetRow, SheetStyle, contact_sheet, picture_table, titled_sheet};
pub use wav::{pcm, write_wav};

use crate::clip::Clip;
use crate::decode::{self, Frame};
use crate::error::{DataError, Result};
use crate::media::Media;

/// The frame in the middle of the clip at `path`, which [`write_mp4`], [`write_gif`] or [`write_webp`] wrote.
///
/// # Errors
/// If the file cannot be read, or is not such a clip.
pub fn middle_frame(path: &Path) -> Result<Film> {
    let media = match path.extension() {
        Some(end) if end == "mp4" => Media::Video(path.to_owned()),
        _ => Media::Animation(path.to_owned()),
    };
    let probe = decode::probe(&media, 1.0)?;
    let frame = decode::frames(&media, &probe)?.nth(probe.times.len() / 2);
    let Frame { width, height, rgb, .. } =
        frame.ok_or_else(|| DataError::unreadable(path, "it ends before its middle"))??;
    Film::new(width, height, rgb).ok_or_else(|| DataError::unreadable(path, "a frame is incomplete"))
}

/// Frames of one size, in RGB.
#[derive(Debug, Clone, PartialEq)]
pub struct Film {
    width: u32,
    height: u32,
    rgb: Vec<u8>,
}

impl Film {
    /// A film of `[frames, height, width, 3]` bytes. `None` if they are not a whole number of frames, at least one.
    pub fn new(width: u32, height: u32, rgb: Vec<u8>) -> Option<Self> {
        let frame = (width as usize).checked_mul(height as usize)?.checked_mul(3)?;
        let whole = frame > 0 && !rgb.is_empty() && rgb.len().is_multiple_of(frame);
        whole.then_some(Self { width, height, rgb })
    }

    /// A film of a VAE's output: `[3, frames, height, width]`, -1 for black to 1 for full; values outside are clipped.
    /// `None` when the sizes do not fit.
    pub fn from_planes(width: u32, height: u32, planes: &[f32]) -> Option<Self> {
        let plane = planes.len() / 3;
        if !planes.len().is_multiple_of(3) {
            return None;
        }
        // `as` saturates, and takes NaN to 0.
        let byte = |value: f32| ((value + 1.0) * 127.5 + 0.5) as u8;
        let rgb = (0..plane).flat_map(|at| [0, 1, 2].map(|channel| byte(planes[channel * plane + at])));
        Self::new(width, height, rgb.collect())
    }

    /// Width in pixels.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// Number of frames, at least 1.
    pub fn len(&self) -> usize {
        self.frames().count()
    }

    /// Always false; there to keep company with [`Film::len`].
    pub fn is_empty(&self) -> bool {
        self.rgb.is_empty()
    }

    /// Each frame as `height * width * 3` bytes.
    pub fn frames(&self) -> std::slice::ChunksExact<'_, u8> {
        self.rgb.chunks_exact(self.width as usize * self.height as usize * 3)
    }
}

impl From<Clip> for Film {
    fn from(clip: Clip) -> Self {
        Self { width: clip.bucket.width, height: clip.bucket.height, rgb: clip.pixels }
    }
}

/// Writes an H.264 MP4 that players and browsers open: 4:2:0, BT.709, index in front. H.264 has no odd sizes, so an odd
/// side is filled up with a copy of its last row or column.
///
/// # Errors
/// [`DataError::Encode`] for a rate or size that H.264 cannot carry (at most 3840x2160),
/// [`DataError::Io`] when the file cannot be written. No partial file is left.
pub fn write_mp4(path: &Path, film: &Film, fps: f64) -> Result<()> {
    write_commented_mp4(path, film, fps, None)
}

/// [`write_mp4`] with a comment in the file's metadata.
///
/// # Errors
/// As there.
pub fn write_commented_mp4(path: &Path, film: &Film, fps: f64, comment: Option<&str>) -> Result<()> {
    let mut writer = Mp4Writer::new(path, film.width(), film.height(), fps)?;
    film.frames().try_for_each(|frame| writer.push(frame))?;
    writer.finish(comment)
}

/// An MP4 that is coded frame by frame, as [`write_mp4`] does it; the file is written at the end.
pub struct Mp4Writer {
    path: PathBuf,
    fps: f64,
    coder: h264::Coder,
}

impl Mp4Writer {
    /// A file of frames of `width` x `height`.
    ///
    /// # Errors
    /// A rate or size that H.264 cannot carry.
    pub fn new(path: &Path, width: u32, height: u32, fps: f64) -> Result<Self> {
        check_rate(path, fps)?;
        let coder = h264::Coder::new(width, height, fps).map_err(|reason| DataError::encode(path, reason))?;
        Ok(Self { path: path.to_owned(), fps, coder })
    }

    /// Codes the next frame, `height * width * 3` bytes.
    ///
    /// # Errors
    /// What the encoder refuses.
    pub fn push(&mut self, frame: &[u8]) -> Result<()> {
        self.coder.push(frame).map_err(|reason| DataError::encode(&self.path, reason))
    }

    /// Writes the file, with a comment in its metadata if there is one.
    ///
    /// # Errors
    /// A clip that is too long for an MP4, and a file that cannot be written.
    pub fn finish(self, comment: Option<&str>) -> Result<()> {
        let Self { path, fps, coder } = self;
        let bytes = mp4::file(&coder.finish(), fps, comment)
            .ok_or_else(|| DataError::encode(&path, "the clip is too long for an MP4"))?;
        save(&path, &bytes)
    }
}

fn check_rate(path: &Path, fps: f64) -> Result<()> {
    if (0.1..=1000.0).contains(&fps) {
        Ok(())
    } else {
        Err(DataError::encode(path, format!("{fps} frames a second is not between 0.1 and 1000")))
    }
}

/// Writes the whole file or nothing; creates its folder first.
pub(crate) fn save(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write;
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(DataError::io("create the folder", folder))?;
    }
    crate::atomic::write(path, |file| file.write_all(bytes)).map_err(DataError::io("write", path))
}
