//! A clip with what its file contains, and which frames and pixels of it are trained.

use std::cmp::Ordering;
use std::ops::Range;

use crate::companions::{Accompanying, Companions};
use crate::config::DataConfig;
use crate::crop::Crop;
use crate::decode::{self, Probe};
use crate::error::{DataError, Result};
use crate::media::Media;
use crate::resample::{frame_count, nearest_frames};
use crate::scan::Item;

/// One clip with what its file was found to contain.
#[derive(Debug, Clone, PartialEq)]
pub struct Source {
    /// Path, caption, repeats.
    pub item: Item,
    /// Size, times (after `source_fps`), codec.
    pub probe: Probe,
    /// Frames of its file at the target rate.
    pub frames: usize,
    /// What accompanies it.
    pub companions: Companions,
    /// The bars that are cut off its frames.
    pub crop: Crop,
    /// Where it is one scene of its file, which frames those are.
    pub scene: Option<Scene>,
}

/// The frames of a file between two changes of the scene.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scene {
    /// At the target rate.
    pub frames: Range<usize>,
    /// Of the file itself.
    pub own: Range<usize>,
}

impl Source {
    pub(crate) fn open(item: Item, config: &DataConfig, fps: f64) -> Result<Self> {
        let mut probe = decode::probe(&item.media, config.picture_folder_fps.unwrap_or(fps))?;
        if let (Some(rate), Media::Video(_) | Media::Animation(_)) = (config.source_fps, &item.media) {
            probe.times = (0..probe.times.len()).map(|index| index as f64 / rate).collect();
            probe.end = probe.times.len() as f64 / rate;
        }
        let is_back = |pair: &[f64]| pair[0].partial_cmp(&pair[1]).is_none_or(Ordering::is_gt);
        if let Some(at) = probe.times.windows(2).position(is_back) {
            let reason = format!(
                "the times of its frames do not ascend (frame {} is shown at {:.3} s, the next at {:.3} s): convert it with \
                 ffmpeg, or say with data.source_fps how many frames a second it has",
                at + 1,
                probe.times[at],
                probe.times[at + 1]
            );
            return Err(DataError::unreadable(item.media.path(), reason));
        }
        let frames = match item.media {
            Media::Still(_) => 1,
            _ => frame_count(probe.end, fps),
        };
        let companions = Companions::of(&item, (frames, &probe), config, fps)?;
        Ok(Self { item, probe, frames, companions, crop: Crop::NONE, scene: None })
    }

    /// Width and height in square pixels of what is trained: without bars that are cut off.
    pub fn displayed(&self) -> (u32, u32) {
        let (width, height) = self.crop.rest((self.probe.width, self.probe.height));
        self.probe.pixel_aspect.displayed((width, height))
    }

    /// What is cut off a companion: the same shares as of the clip. Face clips are pictures of their own, and keep all.
    pub(crate) fn crop_of(&self, which: Accompanying) -> Crop {
        let size = |probe: &Probe| (probe.width, probe.height);
        match (which, self.companions.get(which)) {
            (Accompanying::Faces, _) | (_, None) => Crop::NONE,
            (_, Some(own)) => self.crop.scaled(size(&self.probe), size(&own.probe)),
        }
    }

    /// Its frames at the target rate: all of its file, or those of its scene.
    pub fn span(&self) -> Range<usize> {
        self.scene.as_ref().map_or(0..self.frames, |scene| scene.frames.clone())
    }

    /// Its frames as its file numbers them.
    pub fn own_frames(&self) -> Range<usize> {
        self.scene.as_ref().map_or(0..self.probe.times.len(), |scene| scene.own.clone())
    }

    /// How long it lasts, in seconds.
    pub fn seconds(&self) -> f64 {
        match &self.scene {
            None => self.probe.end,
            Some(Scene { own, .. }) => {
                let at = |frame: usize| self.probe.times.get(frame).copied().unwrap_or(self.probe.end);
                at(own.end) - at(own.start)
            }
        }
    }

    /// The scenes that begin at the frames `cuts` of its file, and the one before them, at `fps` frames a second. Their names are
    /// its own, with a `#` and a number behind.
    pub(crate) fn split(self, cuts: &[usize], fps: f64) -> Vec<Self> {
        let count = self.probe.times.len();
        let wanted = nearest_frames(&self.probe.times, fps, 0, self.frames);
        let begins = std::iter::once(0).chain(cuts.iter().copied());
        let ends = cuts.iter().copied().chain([count]);
        let scene = |(number, (begin, end)): (usize, (usize, usize))| {
            let first = |own: usize| wanted.partition_point(|frame| *frame < own);
            let frames = first(begin)..first(end);
            let item = Item { id: format!("{}#{}", self.item.id, number + 1), ..self.item.clone() };
            Self { item, scene: Some(Scene { frames, own: begin..end }), ..self.clone() }
        };
        begins.zip(ends).enumerate().map(scene).collect()
    }
}
