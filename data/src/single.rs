//! Clips that are no part of a dataset: files that a request names.

use std::collections::VecDeque;
use std::path::Path;

use crate::bucket::Bucket;
use crate::clip::{Clip, Cutter, Unfinished};
use crate::crop::Crop;
use crate::decode;
use crate::error::{DataError, Result};
use crate::media::Media;
use crate::picture::Picture;
use crate::resample::{frame_count, nearest_frames};
use crate::scan::media_at;

/// The first frames of the file or folder of pictures `path` at `fps` frames a second, scaled and cut to `bucket`. A still is shown
/// in every frame.
///
/// # Errors
/// A path that is no clip, one that cannot be read, or a clip that is shorter than `bucket`.
pub fn read_clip(path: &Path, fps: f64, bucket: Bucket) -> Result<Clip> {
    let media = media_at(path)?.ok_or_else(|| DataError::unreadable(path, "there is no clip or picture"))?;
    let probe = decode::probe(&media, fps)?;
    let length = bucket.frames as usize;
    let frames = if matches!(media, Media::Still(_)) { length } else { frame_count(probe.end, fps) };
    if frames < length {
        let reason = format!("it has {frames} frames at {fps} frames a second, and {length} are needed");
        return Err(DataError::unreadable(path, reason));
    }
    let clip = Clip {
        source: path.display().to_string(),
        caption: String::new(),
        bucket,
        start: 0,
        pixels: Vec::new(),
    };
    let wanted = nearest_frames(&probe.times, fps, 0, length);
    let mut cutter = Cutter {
        path: path.to_path_buf(),
        size: (probe.width, probe.height),
        crop: Crop::NONE,
        pixel_aspect: probe.pixel_aspect,
        frames: decode::frames(&media, &probe)?,
        next_frame: 0,
        unfinished: VecDeque::from([Unfinished { clip, wanted, filled: 0 }]),
    };
    cutter.next().ok_or_else(|| DataError::unreadable(path, "it holds no frame"))?
}

/// How many frames the file or folder of pictures `path` has at `fps` frames a second; nothing for a still.
///
/// # Errors
/// As [`read_clip`].
pub fn clip_frames(path: &Path, fps: f64) -> Result<Option<usize>> {
    let media = media_at(path)?.ok_or_else(|| DataError::unreadable(path, "there is no clip or picture"))?;
    let probe = decode::probe(&media, fps)?;
    Ok((!matches!(media, Media::Still(_))).then(|| frame_count(probe.end, fps)))
}

/// `count` pictures of a clip, in the middle of each of as many equal parts, or all frames of a shorter one; none of their sides is
/// longer than `longest` pixels.
///
/// # Errors
/// A clip that cannot be decoded.
pub fn pictures_of(media: &Media, count: usize, longest: u32) -> Result<Vec<Picture>> {
    // The rate of numbered pictures does not matter: frames are counted.
    let probe = decode::probe(media, 1.0)?;
    let frames = probe.times.len();
    let count = count.clamp(1, frames);
    let mut wanted: VecDeque<usize> = (0..count).map(|part| (2 * part + 1) * frames / (2 * count)).collect();
    let (width, height) = probe.displayed();
    let scale = (f64::from(longest) / f64::from(width.max(height))).min(1.0);
    let [width, height] = [width, height].map(|side| (f64::from(side) * scale).round().max(1.0) as u32);
    let mut pictures = Vec::with_capacity(count);
    for (number, frame) in decode::frames(media, &probe)?.enumerate() {
        let frame = frame?;
        if wanted.front() != Some(&number) {
            continue;
        }
        wanted.pop_front();
        let picture = Picture::new(frame.width, frame.height, frame.rgb);
        let picture = picture.and_then(|picture| picture.stretched(width, height));
        pictures.push(picture.ok_or_else(|| DataError::unreadable(media.path(), "a frame is incomplete"))?);
        if wanted.is_empty() {
            break;
        }
    }
    Ok(pictures)
}
