//! Stills, and folders of numbered pictures.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use super::{
    Alpha, Channel, Engine, Frame, FrameStream, MAX_PIXELS, PixelAspect, Probe, check_webp, picture_limits,
};
use crate::error::{DataError, Result};

/// Size of a still, upright.
pub(super) fn probe_still(path: &Path) -> Result<Probe> {
    let ((width, height), alpha) = head(path)?;
    let codec = "still picture".to_string();
    let pixel_aspect = PixelAspect::SQUARE;
    Ok(Probe {
        width,
        height,
        pixel_aspect,
        times: vec![0.0],
        end: 0.0,
        codec,
        engine: Engine::Picture,
        alpha,
    })
}

/// Size of the first picture, and evenly spaced times.
pub(super) fn probe_folder(files: &[PathBuf], fps: f64) -> Result<Probe> {
    let Some(first) = files.first() else {
        return Err(DataError::unreadable("", "the folder holds no picture"));
    };
    let ((width, height), alpha) = head(first)?;
    let times = (0..files.len()).map(|index| index as f64 / fps).collect();
    let end = files.len() as f64 / fps;
    let codec = "numbered pictures".to_string();
    let pixel_aspect = PixelAspect::SQUARE;
    Ok(Probe { width, height, pixel_aspect, times, end, codec, engine: Engine::Picture, alpha })
}

/// One frame a file, at the given times.
pub(super) fn frames(files: Vec<PathBuf>, times: Vec<f64>, channel: Channel) -> FrameStream {
    Box::new(files.into_iter().zip(times).map(move |(path, time)| read(&path, time, channel)))
}

/// The size of a picture, upright, and whether it has an alpha channel.
fn head(path: &Path) -> Result<((u32, u32), Alpha)> {
    let mut decoder = open(path)?;
    let (width, height) = decoder.dimensions();
    use image::metadata::Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    let orientation = decoder.orientation().map_err(|error| DataError::unreadable(path, error))?;
    let sideways = matches!(orientation, Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH);
    let alpha = if decoder.color_type().has_alpha() { Alpha::Channel } else { Alpha::None };
    Ok((if sideways { (height, width) } else { (width, height) }, alpha))
}

fn read(path: &Path, time: f64, channel: Channel) -> Result<Frame> {
    let broken = |error: image::ImageError| DataError::unreadable(path, error);
    let mut decoder = open(path)?;
    let orientation = decoder.orientation().map_err(broken)?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(broken)?;
    image.apply_orientation(orientation);
    Ok(super::animation::shown(&image.into_rgba8(), time, channel))
}

fn open(path: &Path) -> Result<impl ImageDecoder + use<>> {
    let file = File::open(path).map_err(DataError::io("read", path))?;
    let mut reader =
        ImageReader::new(BufReader::new(file)).with_guessed_format().map_err(DataError::io("read", path))?;
    match reader.format() {
        None => return Err(DataError::unreadable(path, "its contents are no known picture format")),
        Some(ImageFormat::WebP) => check_webp(path)?,
        Some(_) => {}
    }
    reader.limits(Limits::default());
    let mut decoder = reader.into_decoder().map_err(|error| DataError::unreadable(path, error))?;
    let limits = picture_limits(path, decoder.dimensions(), MAX_PIXELS)?;
    decoder.set_limits(limits).map_err(|error| DataError::unreadable(path, error))?;
    Ok(decoder)
}
