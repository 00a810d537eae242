//! GIF, animated WebP and APNG.

use std::fs::File;
use std::io::{BufRead, BufReader, Seek};
use std::path::Path;

use image::codecs::{gif::GifDecoder, png::PngDecoder, webp::WebPDecoder};
use image::{AnimationDecoder, ImageDecoder, ImageFormat, ImageResult, RgbaImage};

use super::{Engine, Frame, FrameStream, MAX_PIXELS, Probe};
use crate::error::{DataError, Result};

/// Browsers show frames with a delay of at most 10 ms for 100 ms, because old tools wrote 0 for "unspecified"; files are
/// made to look right there.
const UNSPECIFIED_DELAY_S: f64 = 0.010;
const DEFAULT_DELAY_S: f64 = 0.100;

/// Whether the picture file is an animation. A file that cannot be read counts as still, and is refused when it is decoded.
pub fn moves(path: &Path) -> bool {
    fn check(path: &Path) -> ImageResult<bool> {
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
    let mut animation = Animation::open(path)?;
    let mut size = None;
    let mut times = Vec::new();
    while let Some(frame) = animation.next() {
        let frame = frame?;
        size = Some((frame.width, frame.height));
        times.push(frame.time);
    }
    let (width, height) = size.ok_or_else(|| DataError::unreadable(path, "it holds no frame"))?;
    let codec = format!("animated {}", animation.format);
    Ok(Probe { width, height, times, end: animation.time, codec, engine: Engine::Picture })
}

/// Streams the frames, composed as a viewer would see them.
pub(super) fn frames(path: &Path) -> Result<FrameStream> {
    Ok(Box::new(Animation::open(path)?))
}

struct Animation {
    path: std::path::PathBuf,
    format: &'static str,
    frames: image::Frames<'static>,
    /// When the next frame appears, in seconds.
    time: f64,
    failed: bool,
}

impl Animation {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(DataError::io("read", path))?;
        let broken = |error: image::ImageError| DataError::unreadable(path, error);
        let guessed = image::ImageReader::new(BufReader::new(file)).with_guessed_format();
        let guessed = guessed.map_err(DataError::io("read", path))?;
        let (format, frames) = match guessed.format() {
            Some(ImageFormat::Gif) => {
                let decoder = sized(path, GifDecoder::new(guessed.into_inner()).map_err(broken)?)?;
                ("GIF", decoder.into_frames())
            }
            Some(ImageFormat::WebP) => {
                let decoder = sized(path, WebPDecoder::new(guessed.into_inner()).map_err(broken)?)?;
                ("WebP", decoder.into_frames())
            }
            Some(ImageFormat::Png) => {
                let decoder = sized(path, PngDecoder::new(guessed.into_inner()).map_err(broken)?)?;
                ("PNG", apng_frames(decoder).map_err(broken)?)
            }
            _ => return Err(DataError::unreadable(path, "its contents are neither GIF, WebP nor PNG")),
        };
        Ok(Self { path: path.to_path_buf(), format, frames, time: 0.0, failed: false })
    }
}

fn apng_frames<R: BufRead + Seek + 'static>(decoder: PngDecoder<R>) -> ImageResult<image::Frames<'static>> {
    Ok(decoder.apng()?.into_frames())
}

/// Refuses a decoder whose header claims an absurd size, before it allocates for it.
fn sized<D: ImageDecoder>(path: &Path, decoder: D) -> Result<D> {
    let (width, height) = decoder.dimensions();
    match u64::from(width) * u64::from(height) {
        0 => Err(DataError::unreadable(path, "its header gives a size of zero")),
        pixels if pixels > MAX_PIXELS => {
            Err(DataError::unreadable(path, format!("its header claims {width}x{height} pixels")))
        }
        _ => Ok(decoder),
    }
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
        Some(Ok(on_white(&frame.into_buffer(), time)))
    }
}

/// RGB over white, where transparent parts show the page in a browser.
pub(super) fn on_white(rgba: &RgbaImage, time: f64) -> Frame {
    let over = |value: u8, alpha: u8| {
        let alpha = u32::from(alpha);
        ((u32::from(value) * alpha + 255 * (255 - alpha) + 127) / 255) as u8
    };
    let rgb = rgba.pixels().flat_map(|pixel| {
        let [red, green, blue, alpha] = pixel.0;
        [over(red, alpha), over(green, alpha), over(blue, alpha)]
    });
    Frame { width: rgba.width(), height: rgba.height(), rgb: rgb.collect(), time }
}
