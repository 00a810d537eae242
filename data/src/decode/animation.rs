//! GIF, animated WebP and APNG.

use std::fs::File;
use std::io::{BufRead, BufReader, Seek};
use std::path::Path;

use image::codecs::{gif::GifDecoder, png::PngDecoder, webp::WebPDecoder};
use image::{AnimationDecoder, ImageDecoder, ImageFormat, ImageResult, RgbaImage};

use super::{
    Alpha, Channel, Engine, Frame, FrameStream, MAX_ANIMATED_PIXELS, PixelAspect, Probe, check_webp,
    picture_limits,
};
use crate::error::{DataError, Result};

/// Browsers show frames with a delay of at most 10 ms for 100 ms, because old tools wrote 0 for "unspecified"; files are
/// made to look right there.
const UNSPECIFIED_DELAY_S: f64 = 0.010;
const DEFAULT_DELAY_S: f64 = 0.100;

/// Whether the picture file is an animation. A file that cannot be read counts as still, and is refused when it is decoded.
pub fn moves(path: &Path) -> bool {
    fn check(path: &Path) -> ImageResult<bool> {
        // Opening a pipe would block until it is opened for writing.
        if !path.is_file() {
            return Ok(false);
        }
        let reader = BufReader::new(File::open(path)?);
        let guessed = image::ImageReader::new(reader).with_guessed_format()?;
        Ok(match guessed.format() {
            Some(ImageFormat::Gif) => true,
            Some(ImageFormat::WebP) => WebPDecoder::new(guessed.into_inner())?.has_animation(),
            Some(ImageFormat::Png) => PngDecoder::new(guessed.into_inner())?.is_apng()?,
            _ => false,
        })
    }
    check(path).unwrap_or(false)
}

/// Decodes once, keeping only the times.
pub(super) fn probe(path: &Path) -> Result<Probe> {
    let mut animation = Animation::open(path, Channel::Colour)?;
    let mut size = None;
    let mut times = Vec::new();
    for frame in animation.by_ref() {
        let frame = frame?;
        size = Some((frame.width, frame.height));
        times.push(frame.time);
    }
    let (width, height) = size.ok_or_else(|| DataError::unreadable(path, "it holds no frame"))?;
    let codec = format!("animated {}", animation.format);
    let pixel_aspect = PixelAspect::SQUARE;
    let (end, alpha) = (animation.time, animation.alpha);
    Ok(Probe { width, height, pixel_aspect, times, end, codec, engine: Engine::Picture, alpha })
}

/// Streams the frames, composed as a viewer would see them.
pub(super) fn frames(path: &Path, channel: Channel) -> Result<FrameStream> {
    Ok(Box::new(Animation::open(path, channel)?))
}

struct Animation {
    path: std::path::PathBuf,
    format: &'static str,
    frames: image::Frames<'static>,
    channel: Channel,
    alpha: Alpha,
    /// When the next frame appears, in seconds.
    time: f64,
    failed: bool,
}

impl Animation {
    fn open(path: &Path, channel: Channel) -> Result<Self> {
        let file = File::open(path).map_err(DataError::io("read", path))?;
        let broken = |error: image::ImageError| DataError::unreadable(path, error);
        let guessed = image::ImageReader::new(BufReader::new(file)).with_guessed_format();
        let guessed = guessed.map_err(DataError::io("read", path))?;
        let alpha = |decoder: &dyn ImageDecoder| match decoder.color_type().has_alpha() {
            true => Alpha::Channel,
            false => Alpha::None,
        };
        let (format, alpha, frames) = match guessed.format() {
            Some(ImageFormat::Gif) => {
                let decoder = limited(path, GifDecoder::new(guessed.into_inner()).map_err(broken)?)?;
                ("GIF", alpha(&decoder), decoder.into_frames())
            }
            Some(ImageFormat::WebP) => {
                check_webp(path)?;
                let decoder = limited(path, WebPDecoder::new(guessed.into_inner()).map_err(broken)?)?;
                ("WebP", alpha(&decoder), decoder.into_frames())
            }
            Some(ImageFormat::Png) => {
                let decoder = PngDecoder::with_limits(guessed.into_inner(), image::Limits::default());
                let decoder = limited(path, decoder.map_err(broken)?)?;
                ("PNG", alpha(&decoder), apng_frames(decoder).map_err(broken)?)
            }
            _ => return Err(DataError::unreadable(path, "its contents are neither GIF, WebP nor PNG")),
        };
        let path = path.to_path_buf();
        Ok(Self { path, format, frames, channel, alpha, time: 0.0, failed: false })
    }
}

fn apng_frames<R: BufRead + Seek + 'static>(decoder: PngDecoder<R>) -> ImageResult<image::Frames<'static>> {
    Ok(decoder.apng()?.into_frames())
}

/// Bounds what a decoder allocates, its frames included, whose sizes need not be the canvas's.
fn limited<D: ImageDecoder>(path: &Path, mut decoder: D) -> Result<D> {
    let limits = picture_limits(path, decoder.dimensions(), MAX_ANIMATED_PIXELS)?;
    decoder.set_limits(limits).map_err(|error| DataError::unreadable(path, error))?;
    Ok(decoder)
}

impl Iterator for Animation {
    type Item = Result<Frame>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let frame = match self.frames.next()? {
            Ok(frame) => frame,
            Err(error) => {
                self.failed = true;
                return Some(Err(DataError::unreadable(&self.path, error)));
            }
        };
        let (milliseconds, parts) = frame.delay().numer_denom_ms();
        let delay = f64::from(milliseconds) / f64::from(parts.max(1)) / 1000.0;
        let time = self.time;
        self.time += if delay <= UNSPECIFIED_DELAY_S { DEFAULT_DELAY_S } else { delay };
        Some(Ok(shown(&frame.into_buffer(), time, self.channel)))
    }
}

/// A channel of a picture.
pub(super) fn shown(rgba: &RgbaImage, time: f64, channel: Channel) -> Frame {
    match channel {
        Channel::Colour => on_white(rgba, time),
        Channel::Alpha => {
            let rgb = rgba.pixels().flat_map(|pixel| [pixel.0[3]; 3]).collect();
            Frame { width: rgba.width(), height: rgba.height(), rgb, time }
        }
    }
}

/// RGB over white, where transparent parts show the page in a browser.
fn on_white(rgba: &RgbaImage, time: f64) -> Frame {
    let over = |value: u8, alpha: u8| {
        let alpha = u32::from(alpha);
        ((u32::from(value) * alpha + 255 * (255 - alpha) + 127) / 255) as u8
    };
    let mut rgb = vec![0; rgba.width() as usize * rgba.height() as usize * 3];
    for (out, pixel) in rgb.chunks_exact_mut(3).zip(rgba.pixels()) {
        let [red, green, blue, alpha] = pixel.0;
        let shown =
            if alpha == 255 { [red, green, blue] } else { [red, green, blue].map(|v| over(v, alpha)) };
        out.copy_from_slice(&shown);
    }
    Frame { width: rgba.width(), height: rgba.height(), rgb, time }
}
