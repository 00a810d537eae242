//! From any supported file to a stream of RGB frames with their times.
//!
//! GIF, WebP, APNG, stills and H.264 in MP4/MOV are decoded in process; everything else goes through the `ffmpeg` program.

pub mod animation;
mod bytes;
mod ffmpeg;
mod h264;
mod mp4;
mod mp4_tables;
mod pictures;
mod sps;

use crate::error::{DataError, Result};
use crate::scan::Media;

/// One decoded picture, upright, in RGB.
#[derive(Debug, Clone, PartialEq)]
pub struct Frame {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// `height * width * 3` bytes: rows from the top, pixels from the left, red green blue.
    pub rgb: Vec<u8>,
    /// When the frame appears, in seconds from the first.
    pub time: f64,
}

/// What a file holds, known without keeping a picture in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Probe {
    /// Width in pixels, as displayed (after rotation).
    pub width: u32,
    /// Height in pixels, as displayed.
    pub height: u32,
    /// When each frame appears, in seconds, ascending from 0.
    pub times: Vec<f64>,
    /// When the last frame ends, in seconds. 0 for a still.
    pub end: f64,
    /// Codec in plain words, such as "H.264" or "animated GIF".
    pub codec: String,
    /// Who decodes it.
    pub engine: Engine,
}

/// Who turns the file into frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// A picture decoder of the `image` crate.
    Picture,
    /// The built-in MP4 reader and openh264.
    OpenH264,
    /// The `ffmpeg` program found on PATH.
    Ffmpeg,
}

/// Frames in display order. After an error nothing more comes.
pub type FrameStream = Box<dyn Iterator<Item = Result<Frame>>>;

/// Pictures beyond this many pixels are refused: a header may claim anything, and 8K by 8K is past every use here.
pub(crate) const MAX_PIXELS: u64 = 8192 * 8192;

/// Reads sizes, times and codec of a clip. `picture_folder_fps` times a folder of numbered pictures.
///
/// # Errors
/// [`DataError::Unreadable`] for a damaged or empty file, [`DataError::NoDecoder`] when ffmpeg would be needed and is absent.
pub fn probe(media: &Media, picture_folder_fps: f64) -> Result<Probe> {
    let probe = match media {
        Media::Still(path) => pictures::probe_still(path)?,
        Media::Pictures { files, .. } => pictures::probe_folder(files, picture_folder_fps)?,
        Media::Animation(path) => animation::probe(path)?,
        Media::Video(path) => match mp4::read(path)? {
            mp4::Contents::H264(track) => h264::probe(path, &track)?,
            mp4::Contents::Other(codec) => ffmpeg::probe(path, &codec)?,
        },
    };
    if probe.times.is_empty() {
        return Err(DataError::unreadable(media.path(), "it holds no frame"));
    }
    Ok(probe)
}

/// Starts decoding a clip from its first frame; `probe` must be this file's own.
///
/// # Errors
/// As [`probe`]; damage further in comes out of the stream.
pub fn frames(media: &Media, probe: &Probe) -> Result<FrameStream> {
    match (media, probe.engine) {
        (Media::Still(path), _) => Ok(pictures::frames(vec![path.clone()], vec![0.0])),
        (Media::Pictures { files, .. }, _) => Ok(pictures::frames(files.clone(), probe.times.clone())),
        (Media::Animation(path), _) => animation::frames(path),
        (Media::Video(path), Engine::Ffmpeg) => ffmpeg::frames(path, probe.times.clone()),
        (Media::Video(path), _) => match mp4::read(path)? {
            mp4::Contents::H264(track) => h264::frames(path, track),
            mp4::Contents::Other(_) => Err(DataError::unreadable(path, "it changed while it was being read")),
        },
    }
}
