//! The exact pixels of a training item: resampled, scaled and cropped.

use std::collections::VecDeque;

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

use crate::bucket::Bucket;
use crate::crop::Crop;
use crate::decode::{Frame, FrameStream, PixelAspect};
use crate::error::{DataError, Result};

/// One training item as pixels.
#[derive(Debug, Clone, PartialEq)]
pub struct Clip {
    /// Id of the clip that it was cut from.
    pub source: String,
    /// Caption as trained.
    pub caption: String,
    /// Width, height and frames.
    pub bucket: Bucket,
    /// First frame, counted at the target rate.
    pub start: usize,
    /// `[frames, height, width, 3]` bytes, red green blue.
    pub pixels: Vec<u8>,
}

impl Clip {
    /// The pixels as the VAE takes them: `[3, frames, height, width]`, -1 for black to 1 for full.
    pub fn planes(&self) -> Vec<f32> {
        let channel = |channel: usize| self.pixels.iter().skip(channel).step_by(3);
        (0..3).flat_map(|index| channel(index).map(|&value| f32::from(value) / 127.5 - 1.0)).collect()
    }

    /// The frames one by one, `[height, width, 3]` each.
    pub fn frames(&self) -> impl Iterator<Item = &[u8]> {
        self.pixels.chunks_exact(self.bucket.width as usize * self.bucket.height as usize * 3)
    }
}

/// Scales a frame whose pixels have the shape `pixel_aspect` until it just covers `width` x `height`, with an antialiased
/// Lanczos filter, and cuts out the centre. Gives `height * width * 3` bytes; `None` for a frame whose bytes do not fit its
/// size.
pub fn cover(frame: Frame, pixel_aspect: PixelAspect, width: u32, height: u32) -> Option<Vec<u8>> {
    let source = ImageRef::new(frame.width, frame.height, &frame.rgb, PixelType::U8x3).ok()?;
    if (frame.width, frame.height) == (width, height) && pixel_aspect.is_square() {
        return Some(frame.rgb);
    }
    let mut target = Image::new(width, height, PixelType::U8x3);
    // Cropping to the target's aspect first, at fractions of a pixel, is the same as cropping afterwards, and less work.
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Lanczos3));
    let options = match pixel_aspect.is_square() {
        true => options.fit_into_destination(None),
        false => {
            let (w, h) = (f64::from(frame.width), f64::from(frame.height));
            let aspect = f64::from(width) / f64::from(height) / pixel_aspect.ratio();
            let (across, down) = (w.min(h * aspect), h.min(w / aspect));
            options.crop((w - across) / 2.0, (h - down) / 2.0, across, down)
        }
    };
    Resizer::new().resize(&source, &mut target, &options).ok()?;
    Some(target.into_vec())
}

/// A clip that is still being filled.
pub(crate) struct Unfinished {
    /// The clip with the pixels so far.
    pub clip: Clip,
    /// Source frame of each of its frames, ascending.
    pub wanted: Vec<usize>,
    /// How many it has.
    pub filled: usize,
}

/// Cuts all windows of one source out of one pass over its frames: at any time only the windows around the current
/// frame are in memory, and decoding stops after the last frame that any of them needs. They share one bucket, so each
/// frame is scaled once and the windows finish in the order in which they start.
pub(crate) struct Cutter {
    pub path: std::path::PathBuf,
    /// Size that every frame must have.
    pub size: (u32, u32),
    /// What is cut off each.
    pub crop: Crop,
    pub pixel_aspect: PixelAspect,
    pub frames: FrameStream,
    pub next_frame: usize,
    /// Sorted by first wanted frame.
    pub unfinished: VecDeque<Unfinished>,
}

impl Iterator for Cutter {
    type Item = Result<Clip>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let first = self.unfinished.front()?;
            if first.filled == first.wanted.len() {
                return self.unfinished.pop_front().map(|done| Ok(done.clip));
            }
            let missing = || {
                let needed = first.wanted.last().map_or(0, |last| last + 1);
                DataError::unreadable(
                    &self.path,
                    format!("it ended after {} frames; {needed} are needed", self.next_frame),
                )
            };
            let frame = match self.frames.next() {
                None => Err(missing()),
                Some(frame) => frame.and_then(|frame| self.take(frame)),
            };
            if let Err(error) = frame {
                self.unfinished.clear();
                return Some(Err(error));
            }
        }
    }
}

impl Cutter {
    fn take(&mut self, frame: Frame) -> Result<()> {
        let index = self.next_frame;
        self.next_frame += 1;
        if (frame.width, frame.height) != self.size {
            let (found, first) =
                (format!("{}x{}", frame.width, frame.height), format!("{}x{}", self.size.0, self.size.1));
            let reason = format!("frame {} is {found} where the first is {first}", index + 1);
            return Err(DataError::unreadable(&self.path, reason));
        }
        let wants = |unfinished: &Unfinished| unfinished.wanted.get(unfinished.filled) == Some(&index);
        let Some(bucket) =
            self.unfinished.iter().find(|unfinished| wants(unfinished)).map(|first| first.clip.bucket)
        else {
            return Ok(());
        };
        let pixels = cover(self.crop.of(frame), self.pixel_aspect, bucket.width, bucket.height);
        let pixels = pixels.ok_or_else(|| DataError::unreadable(&self.path, "a frame is incomplete"))?;
        for unfinished in &mut self.unfinished {
            while wants(unfinished) {
                unfinished.clip.pixels.extend_from_slice(&pixels);
                unfinished.filled += 1;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covering_keeps_the_centre_and_planes_run_from_minus_one_to_one() {
        // Three vertical stripes; a square out of the middle holds only the second.
        let row: Vec<u8> =
            [[255, 0, 0], [0, 255, 0], [0, 0, 255]].iter().flat_map(|rgb| rgb.repeat(8)).collect();
        let frame = Frame { width: 24, height: 8, rgb: row.repeat(8), time: 0.0 };
        let pixels = cover(frame, PixelAspect::SQUARE, 8, 8).unwrap();
        assert!(pixels.chunks(3).all(|pixel| pixel == [0, 255, 0]));
        let bucket = Bucket { width: 8, height: 8, frames: 1 };
        let clip = Clip { source: String::new(), caption: String::new(), bucket, start: 0, pixels };
        let planes = clip.planes();
        assert!(
            planes[..64].iter().all(|&red| red == -1.0) && planes[64..128].iter().all(|&green| green == 1.0)
        );
    }
}
