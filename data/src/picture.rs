//! A single picture that a clip is to start or end with.

use std::path::Path;

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::ImageEncoder;

use crate::clip::cover;
use crate::decode::{self, Frame, PixelAspect};
use crate::error::{DataError, Result};
use crate::media::Media;

/// A picture in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    width: u32,
    height: u32,
    rgb: Vec<u8>,
}

impl Picture {
    /// A picture of `height * width * 3` bytes, red green blue. `None` when they are more or fewer.
    pub fn new(width: u32, height: u32, rgb: Vec<u8>) -> Option<Self> {
        let bytes = u64::from(width) * u64::from(height) * 3;
        (bytes == rgb.len() as u64 && bytes > 0).then_some(Self { width, height, rgb })
    }

    /// Reads a still, upright; what is transparent becomes white.
    ///
    /// # Errors
    /// A file that cannot be read, or holds no picture.
    pub fn open(path: &Path) -> Result<Self> {
        let media = Media::Still(path.to_owned());
        let probe = decode::probe(&media, 1.0)?;
        let frame = decode::frames(&media, &probe)?.next();
        let Frame { width, height, rgb, .. } =
            frame.ok_or_else(|| DataError::unreadable(path, "it holds no frame"))??;
        Self::new(width, height, rgb).ok_or_else(|| DataError::unreadable(path, "it is incomplete"))
    }

    /// Pixels from left to right.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Pixels from top to bottom.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// `[3, height, width]`, -1 for black to 1 for full.
    pub fn planes(&self) -> Vec<f32> {
        let channel = |channel: usize| self.rgb.iter().skip(channel).step_by(3);
        (0..3).flat_map(|index| channel(index).map(|&value| f32::from(value) / 127.5 - 1.0)).collect()
    }

    /// The mean of red, green and blue of each pixel.
    pub(crate) fn grey(&self) -> Vec<u8> {
        let mean = |pixel: &[u8]| (pixel.iter().map(|value| u16::from(*value)).sum::<u16>() / 3) as u8;
        self.rgb.chunks_exact(3).map(mean).collect()
    }

    /// As a PNG file.
    ///
    /// # Errors
    /// None of a picture that fits into memory.
    pub fn png(&self) -> Result<Vec<u8>> {
        let mut png = Vec::new();
        let encoder = image::codecs::png::PngEncoder::new(&mut png);
        let written = encoder.write_image(&self.rgb, self.width, self.height, image::ExtendedColorType::Rgb8);
        written.map_err(|error| DataError::unreadable(Path::new("a picture"), error.to_string()))?;
        Ok(png)
    }

    /// As a JPEG file of this quality, 1 to 100.
    ///
    /// # Errors
    /// A side of more than 65,535 pixels.
    pub fn jpeg(&self, quality: u8) -> Result<Vec<u8>> {
        let mut jpeg = Vec::new();
        let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut jpeg, quality);
        let written = encoder.write_image(&self.rgb, self.width, self.height, image::ExtendedColorType::Rgb8);
        written.map_err(|error| DataError::unreadable(Path::new("a picture"), error.to_string()))?;
        Ok(jpeg)
    }

    /// Scaled until it just covers `width` x `height`, with an antialiased Lanczos filter, the centre cut out.
    pub fn covering(&self, width: u32, height: u32) -> Option<Self> {
        let Self { width: w, height: h, rgb } = self.clone();
        let frame = Frame { width: w, height: h, rgb, time: 0.0 };
        Self::new(width, height, cover(frame, PixelAspect::SQUARE, width, height)?)
    }

    /// Scaled to `width` x `height` without keeping its aspect, with an antialiased Lanczos filter.
    pub fn stretched(&self, width: u32, height: u32) -> Option<Self> {
        self.resized(width, height, FilterType::Lanczos3)
    }

    /// The largest part around its centre of the aspect of `width` x `height`.
    pub fn cut_to_aspect(&self, width: u32, height: u32) -> Option<Self> {
        let (w, h) = (u64::from(self.width), u64::from(self.height));
        let (to_w, to_h) = (u64::from(width), u64::from(height));
        let (w, h) = if w * to_h > h * to_w { (h * to_w / to_h, h) } else { (w, w * to_h / to_w) };
        let side = |side: u64| u32::try_from(side).ok().filter(|side| *side > 0);
        self.centre(side(w)?, side(h)?)
    }

    /// Its shorter side scaled to `side` with an antialiased bicubic filter, and the square in the centre: what diffusers
    /// shows CLIP. Source: transformers `CLIPImageProcessor`.
    pub fn thumbnail(&self, side: u32) -> Option<Self> {
        let long =
            |longer: u32, shorter: u32| (u64::from(side) * u64::from(longer) / u64::from(shorter)) as u32;
        let (width, height) = match self.width <= self.height {
            true => (side, long(self.height, self.width)),
            false => (long(self.width, self.height), side),
        };
        // Along the rows first, rounded to bytes in between, as Pillow does.
        let wide = self.resized(width, self.height, FilterType::CatmullRom)?;
        wide.resized(width, height, FilterType::CatmullRom)?.centre(side, side)
    }

    fn resized(&self, width: u32, height: u32, filter: FilterType) -> Option<Self> {
        if (self.width, self.height) == (width, height) {
            return Some(self.clone());
        }
        let source = ImageRef::new(self.width, self.height, &self.rgb, PixelType::U8x3).ok()?;
        let mut target = Image::new(width, height, PixelType::U8x3);
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter));
        Resizer::new().resize(&source, &mut target, &options).ok()?;
        Self::new(width, height, target.into_vec())
    }

    fn centre(&self, width: u32, height: u32) -> Option<Self> {
        let (left, top) = (self.width.checked_sub(width)? / 2, self.height.checked_sub(height)? / 2);
        let stride = self.width as usize * 3;
        let rows = self.rgb.chunks_exact(stride).skip(top as usize).take(height as usize);
        let (from, to) = (left as usize * 3, (left + width) as usize * 3);
        Self::new(width, height, rows.flat_map(|row| &row[from..to]).copied().collect())
    }
}
