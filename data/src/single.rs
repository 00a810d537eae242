//! Clips that are no part of a dataset: files that a request names.

use std::collections::VecDeque;
use std::path::Path;

use crate::bucket::Bucket;
use crate::clip::{Clip, Cutter, Unfinished};
use crate::crop::Crop;
use crate::decode;
use crate::error::{DataError, Result};
use crate::media::Media;
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
