//! From any supported file to a stream of RGB frames with their times.
//!
//! GIF, WebP, APNG, stills and H.264 in MP4/MOV are decoded in process; everything else by the `ffmpeg` program.

pub mod animation;
mod bytes;
mod ffmpeg;
mod h264;
mod mp4;
mod mp4_tables;
mod pictures;
mod pixel_aspect;
mod sound_offset;
mod sps;

pub use pixel_aspect::PixelAspect;
pub(crate) use sound_offset::sound_offset;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use crate::error::{DataError, Result};
use crate::media::Media;

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
    /// Width of its frames in pixels, upright.
    pub width: u32,
    /// Height of its frames in pixels, upright.
    pub height: u32,
    /// Shape of these pixels.
    pub pixel_aspect: PixelAspect,
    /// When each frame appears, in seconds, ascending from 0.
    pub times: Vec<f64>,
    /// When the last frame ends, in seconds. 0 for a still.
    pub end: f64,
    /// Codec in plain words, such as "H.264" or "animated GIF".
    pub codec: String,
    /// Who decodes it.
    pub engine: Engine,
    /// Whether its pixels say how opaque they are.
    pub alpha: Alpha,
}

impl Probe {
    /// Width and height in square pixels, as players show it: pixels that are not square are stretched, none is lost.
    pub fn displayed(&self) -> (u32, u32) {
        self.pixel_aspect.displayed((self.width, self.height))
    }
}

/// Whether the pixels of a file say how opaque they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alpha {
    /// They do not.
    None,
    /// They do. Of a folder of pictures the first decides.
    Channel,
    /// They do, in a way that is not decoded.
    Unread,
}

/// What is decoded of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// Red, green and blue; of pictures as over white.
    Colour,
    /// How opaque each pixel is, as a grey: white is opaque.
    Alpha,
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

/// Frames in display order. An error ends the stream.
pub type FrameStream = Box<dyn Iterator<Item = Result<Frame>>>;

/// Larger pictures are refused: a header may claim anything, and 8K by 8K is more than any use here needs.
pub(crate) const MAX_PIXELS: u64 = 8192 * 8192;
/// The same for each frame of an animated picture, of which several are in memory at once.
const MAX_ANIMATED_PIXELS: u64 = 4096 * 4096;
/// The longest side of a picture in pixels.
const MAX_SIDE: u32 = 16_384;
/// Memory that decoding a picture may take: a constant, and additional bytes for each byte of its file and for each pixel.
const BASE_BYTES: u64 = 64 << 20;
const BYTES_A_FILE_BYTE: u64 = 8;
const BYTES_A_PIXEL: u64 = 24;

/// Checks the size of a picture that its header claims, before anything is allocated for it; what its decoder may allocate.
fn picture_limits(path: &Path, (width, height): (u32, u32), most: u64) -> Result<image::Limits> {
    let pixels = u64::from(width) * u64::from(height);
    if pixels == 0 {
        return Err(DataError::unreadable(path, "its header gives a size of zero"));
    }
    if pixels > most || width.max(height) > MAX_SIDE {
        let reason = format!(
            "its header claims {width}x{height} pixels; at most {most} pixels, and {MAX_SIDE} a side, are read"
        );
        return Err(DataError::unreadable(path, reason));
    }
    let file = std::fs::metadata(path).map_err(DataError::io("read", path))?.len();
    let mut limits = image::Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(BASE_BYTES + BYTES_A_FILE_BYTE * file + BYTES_A_PIXEL * pixels);
    Ok(limits)
}

/// Refuses a WebP file of which a part claims more bytes than the file has: the decoder would allocate them.
fn check_webp(path: &Path) -> Result<()> {
    let io = DataError::io("read", path);
    let whole = || -> std::io::Result<bool> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        let (mut at, mut head) = (12, [0; 8]);
        while at + 8 <= length {
            file.seek(SeekFrom::Start(at))?;
            file.read_exact(&mut head)?;
            let [.., a, b, c, d] = head;
            let size = u64::from(u32::from_le_bytes([a, b, c, d]));
            if size > length - at - 8 {
                return Ok(false);
            }
            at += 8 + size.next_multiple_of(2);
        }
        Ok(true)
    };
    match whole().map_err(io)? {
        true => Ok(()),
        false => {
            Err(DataError::unreadable(path, "it is truncated: a part of it claims more bytes than there are"))
        }
    }
}

/// Refuses everything but regular files: a pipe or a device may block its reader, or never end.
pub(crate) fn check_regular(path: &Path) -> Result<()> {
    match std::fs::metadata(path).map_err(DataError::io("read", path))?.is_file() {
        true => Ok(()),
        false => {
            Err(DataError::unreadable(path, "it is not a regular file but a pipe, a device or a folder"))
        }
    }
}

/// Reads sizes, times and codec of a clip. `picture_folder_fps` times a folder of numbered pictures.
///
/// # Errors
/// [`DataError::Unreadable`] for a damaged or empty file, [`DataError::NoDecoder`] when ffmpeg would be needed and is absent.
pub fn probe(media: &Media, picture_folder_fps: f64) -> Result<Probe> {
    match media {
        Media::Pictures { files, .. } => files.iter().try_for_each(|file| check_regular(file))?,
        Media::Still(path) | Media::Animation(path) | Media::Video(path) => check_regular(path)?,
    }
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

/// Starts decoding the colours of a clip from its first frame; `probe` must be this file's own.
///
/// # Errors
/// Those of [`probe`]; later damage is an error of the stream.
pub fn frames(media: &Media, probe: &Probe) -> Result<FrameStream> {
    frames_of(media, probe, Channel::Colour)
}

/// [`frames`] of one of a clip's channels.
///
/// # Errors
/// As there, and a clip without this channel.
pub fn frames_of(media: &Media, probe: &Probe, channel: Channel) -> Result<FrameStream> {
    if channel == Channel::Alpha && probe.alpha != Alpha::Channel {
        return Err(DataError::unreadable(media.path(), "it has no alpha channel that can be decoded"));
    }
    match (media, probe.engine) {
        (Media::Still(path), _) => Ok(pictures::frames(vec![path.clone()], vec![0.0], channel)),
        (Media::Pictures { files, .. }, _) => {
            Ok(pictures::frames(files.clone(), probe.times.clone(), channel))
        }
        (Media::Animation(path), _) => animation::frames(path, channel),
        (Media::Video(path), Engine::Ffmpeg) => ffmpeg::frames(path, probe.times.clone(), channel),
        (Media::Video(path), _) => match mp4::read(path)? {
            mp4::Contents::H264(track) => h264::frames(path, track),
            mp4::Contents::Other(_) => Err(DataError::unreadable(path, "it changed while it was being read")),
        },
    }
}
