//! A recipe's `[data]` section made concrete: every clip probed, assigned to a bucket and cut into windows.

use std::collections::VecDeque;

use crate::bucket::{BucketTable, Buckets, Window};
use crate::clip::{Clip, Cutter, Unfinished};
use crate::config::{DataConfig, SizeMultiple};
use crate::decode::{self, Probe};
use crate::error::{DataError, Result};
use crate::resample::{frame_count, nearest_frames};
use crate::scan::{Item, Media, scan};

/// One clip with what is known about its file.
#[derive(Debug, Clone, PartialEq)]
pub struct Source {
    /// Path, caption, repeats.
    pub item: Item,
    /// Size, times (after `source_fps`), codec.
    pub probe: Probe,
    /// Frames at the target rate.
    pub frames: usize,
}

/// Everything that will be trained on, before a single frame is kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// Clips, sorted by id.
    pub sources: Vec<Source>,
    /// Training items, in the order of their clips and then of time.
    pub windows: Vec<Window>,
    /// Frames a second that everything is resampled to.
    pub fps: f64,
}

impl Dataset {
    /// Scans, probes and buckets. `model_fps` is the model's own rate, used where the recipe names none;
    /// `progress(done, total)` is called before each clip and once at the end.
    ///
    /// # Errors
    /// Whatever is wrong with the recipe or the clips; clips that are too short are all named at once.
    pub fn build(
        config: &DataConfig,
        multiple: SizeMultiple,
        model_fps: f64,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        let buckets = Buckets::new(config, multiple)?;
        let fps = config.fps.unwrap_or(model_fps);
        let items = scan(config)?;
        let total = items.len();
        let mut data = Self { sources: Vec::with_capacity(total), windows: Vec::new(), fps };
        let mut too_short = Vec::new();
        for (index, item) in items.into_iter().enumerate() {
            progress(index, total);
            let source = Source::open(item, config, fps)?;
            if !data.add_windows(&source, &buckets) {
                let noun = if source.frames == 1 { "frame" } else { "frames" };
                too_short.push(format!("{} ({} {noun})", source.item.id, source.frames));
            }
            data.sources.push(source);
        }
        progress(total, total);
        if too_short.is_empty() {
            Ok(data)
        } else {
            Err(DataError::TooShort { clips: too_short, shortest: buckets.shortest(), fps })
        }
    }

    /// Whether the source fills a bucket; if so its windows are added.
    fn add_windows(&mut self, source: &Source, buckets: &Buckets) -> bool {
        let (width, height) = (source.probe.width, source.probe.height);
        let bucket = match source.item.media {
            Media::Still(_) => buckets.of_still(width, height),
            _ => buckets.of_clip(width, height, source.frames),
        };
        let Some(bucket) = bucket else { return false };
        let starts = buckets.starts(source.frames, bucket.frames as usize);
        let index = self.sources.len();
        self.windows.extend(starts.into_iter().map(|start| Window { source: index, bucket, start }));
        true
    }

    /// What goes where, for the plan.
    pub fn table(&self) -> BucketTable {
        let sizes: Vec<(u32, u32)> =
            self.sources.iter().map(|source| (source.probe.width, source.probe.height)).collect();
        BucketTable::new(&self.windows, &sizes)
    }

    /// The source frame that stands at each frame of `window`: what the cache key of the item is made of.
    pub fn source_frames(&self, window: &Window) -> Vec<usize> {
        let times = &self.sources[window.source].probe.times;
        nearest_frames(times, self.fps, window.start, window.bucket.frames as usize)
    }

    /// Decodes one source once and gives the clips of `windows` in order of time. All of them must belong to it.
    ///
    /// # Errors
    /// When the file cannot be opened; damage further in comes out of the iterator.
    pub fn clips(
        &self,
        source: usize,
        windows: &[Window],
    ) -> Result<impl Iterator<Item = Result<Clip>> + use<>> {
        let known = &self.sources[source];
        let mut windows: Vec<&Window> = windows.iter().filter(|window| window.source == source).collect();
        windows.sort_by_key(|window| window.start);
        let unfinished: VecDeque<Unfinished> = windows
            .into_iter()
            .map(|window| Unfinished {
                clip: Clip {
                    source: known.item.id.clone(),
                    caption: known.item.caption.clone(),
                    bucket: window.bucket,
                    start: window.start,
                    pixels: Vec::new(),
                },
                wanted: self.source_frames(window),
                filled: 0,
            })
            .collect();
        Ok(Cutter {
            path: known.item.media.path().to_path_buf(),
            size: (known.probe.width, known.probe.height),
            frames: decode::frames(&known.item.media, &known.probe)?,
            next_frame: 0,
            unfinished,
        })
    }
}

impl Source {
    fn open(item: Item, config: &DataConfig, fps: f64) -> Result<Self> {
        let mut probe = decode::probe(&item.media, config.picture_folder_fps.unwrap_or(fps))?;
        if let (Some(rate), Media::Video(_) | Media::Animation(_)) = (config.source_fps, &item.media) {
            probe.times = (0..probe.times.len()).map(|index| index as f64 / rate).collect();
            probe.end = probe.times.len() as f64 / rate;
        }
        let frames = match item.media {
            Media::Still(_) => 1,
            _ => frame_count(probe.end, fps),
        };
        Ok(Self { item, probe, frames })
    }
}
