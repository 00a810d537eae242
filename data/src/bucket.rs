//! In which size and length a clip is trained, and which windows of it. Pure: no file is touched here.

use std::collections::BTreeMap;

use crate::config::{DataConfig, Extract, SizeMultiple};
use crate::error::Result;

/// The shape in which clips are trained together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Bucket {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Frames, 4n+1. 1 for stills.
    pub frames: u32,
}

impl Bucket {
    /// Pixels over all frames: what memory and time grow with.
    pub fn volume(self) -> u64 {
        u64::from(self.width) * u64::from(self.height) * u64::from(self.frames)
    }
}

impl std::fmt::Display for Bucket {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(formatter, "{}x{}x{}", self.width, self.height, self.frames)
    }
}

/// One stretch of one clip: a training item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Index of the clip in the data set.
    pub source: usize,
    /// Size and length.
    pub bucket: Bucket,
    /// First frame, counted at the target rate.
    pub start: usize,
}

/// Every shape that a recipe allows, and how clips are assigned to them.
#[derive(Debug, Clone, PartialEq)]
pub struct Buckets {
    sizes: Vec<[u32; 2]>,
    /// Ascending.
    frames: Vec<u32>,
    extract: Extract,
    windows: u32,
    stride: Option<u32>,
}

/// Windows of one clip at most.
const MAX_WINDOWS: usize = 1_000_000;
/// Windows of `extract = "uniform"` where the recipe gives no number.
const DEFAULT_WINDOWS: u32 = 4;

impl Buckets {
    /// The buckets of a recipe.
    ///
    /// # Errors
    /// As [`DataConfig::check`].
    pub fn new(config: &DataConfig, multiple: SizeMultiple) -> Result<Self> {
        config.check(multiple)?;
        let mut frames = config.frames.clone();
        frames.sort_unstable();
        frames.dedup();
        Ok(Self {
            sizes: config.sizes.clone(),
            frames,
            extract: config.extract,
            windows: config.windows.unwrap_or(DEFAULT_WINDOWS),
            stride: config.stride,
        })
    }

    /// Frames of the shortest bucket.
    pub fn shortest(&self) -> u32 {
        self.frames.first().copied().unwrap_or(1)
    }

    /// The bucket of a clip of `frames` frames at the target rate: the nearest aspect, the longest length that it fills.
    /// `None` when it is shorter than every bucket.
    pub fn of_clip(&self, width: u32, height: u32, frames: usize) -> Option<Bucket> {
        let frames = *self.frames.iter().rev().find(|&&length| length as usize <= frames)?;
        let [width, height] = self.size_for(width, height)?;
        Some(Bucket { width, height, frames })
    }

    /// The bucket of a still picture: the nearest aspect, one frame.
    pub fn of_still(&self, width: u32, height: u32) -> Option<Bucket> {
        let [width, height] = self.size_for(width, height)?;
        Some(Bucket { width, height, frames: 1 })
    }

    /// The size nearest in log aspect. Of several with that aspect: the largest that needs no enlarging, else the smallest.
    fn size_for(&self, width: u32, height: u32) -> Option<[u32; 2]> {
        let log_aspect = |[width, height]: [u32; 2]| (f64::from(width) / f64::from(height)).ln();
        let distance = |size: [u32; 2]| (log_aspect(size) - log_aspect([width, height])).abs();
        let nearest = self.sizes.iter().map(|&size| distance(size)).fold(f64::INFINITY, f64::min);
        // Sizes meant to share an aspect differ by the rounding to the model's multiple: 832x480 and 1280x720 by 2.5 %.
        const SAME_ASPECT: f64 = 0.03;
        let near = || self.sizes.iter().copied().filter(|&size| distance(size) <= nearest + SAME_ASPECT);
        let area = |[width, height]: [u32; 2]| u64::from(width) * u64::from(height);
        let covered = near().filter(|size| size[0] <= width && size[1] <= height);
        covered.max_by_key(|&size| area(size)).or_else(|| near().min_by_key(|&size| area(size)))
    }

    /// What is wrong with a clip of `frames` frames that gives more windows than are kept in memory.
    pub(crate) fn too_many(&self, frames: usize) -> Option<String> {
        let step = self.stride.unwrap_or_else(|| self.shortest()).max(1) as usize;
        let windows = match self.extract {
            Extract::Sliding => frames / step,
            _ => 1,
        };
        (windows > MAX_WINDOWS).then(|| {
            format!(
                "its {frames} frames give {windows} windows, and at most {MAX_WINDOWS} are taken from one clip: set a larger \
                 data.stride"
            )
        })
    }

    /// First frames of the windows of `length` frames in a clip of `frames` frames, ascending and distinct.
    /// Empty when not even one fits.
    pub fn starts(&self, frames: usize, length: usize) -> Vec<usize> {
        let Some(room) = frames.checked_sub(length) else { return Vec::new() };
        let mut starts = match self.extract {
            Extract::Head => vec![0],
            Extract::Middle => vec![room / 2],
            Extract::Uniform if self.windows == 1 => vec![room / 2],
            Extract::Uniform => {
                let gaps = (self.windows as usize - 1).min(room).max(1);
                (0..=gaps).map(|index| (index * room + gaps / 2) / gaps).collect()
            }
            Extract::Sliding => {
                (0..=room).step_by(self.stride.map_or(length, |stride| stride as usize).max(1)).collect()
            }
        };
        starts.dedup();
        starts
    }
}

/// One line of the bucket table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BucketRow {
    /// Size and length.
    pub bucket: Bucket,
    /// Clips that go there.
    pub clips: usize,
    /// Windows cut from those clips.
    pub windows: usize,
    /// Clips that are smaller than the bucket and are therefore enlarged.
    pub enlarged: usize,
}

/// A table of the buckets and their clips, to look at before training. Rows are ordered from the largest bucket to the smallest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BucketTable {
    /// One row per bucket in use.
    pub rows: Vec<BucketRow>,
}

impl BucketTable {
    /// Counts `windows`; `sizes[source]` is the width and height of each clip.
    pub fn new(windows: &[Window], sizes: &[(u32, u32)]) -> Self {
        let mut rows: BTreeMap<Bucket, BucketRow> = BTreeMap::new();
        let mut last = None;
        for window in windows {
            let bucket = window.bucket;
            let row = rows.entry(bucket).or_insert(BucketRow { bucket, clips: 0, windows: 0, enlarged: 0 });
            row.windows += 1;
            if last != Some(window.source) {
                row.clips += 1;
                let (width, height) = sizes.get(window.source).copied().unwrap_or((u32::MAX, u32::MAX));
                row.enlarged += usize::from(width < bucket.width || height < bucket.height);
            }
            last = Some(window.source);
        }
        let mut rows: Vec<BucketRow> = rows.into_values().collect();
        rows.sort_by_key(|row| (std::cmp::Reverse(row.bucket.volume()), row.bucket));
        Self { rows }
    }
}

impl std::fmt::Display for BucketTable {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        writeln!(
            formatter,
            "{:>11} {:>6} {:>6} {:>8} {:>9}",
            "size", "frames", "clips", "windows", "enlarged"
        )?;
        for row in &self.rows {
            let size = format!("{}x{}", row.bucket.width, row.bucket.height);
            let (frames, clips, windows, enlarged) =
                (row.bucket.frames, row.clips, row.windows, row.enlarged);
            writeln!(formatter, "{size:>11} {frames:>6} {clips:>6} {windows:>8} {enlarged:>9}")?;
        }
        Ok(())
    }
}
