//! The dataset of a recipe's `[data]` section: every clip probed, assigned to a bucket and cut into windows.

use std::cmp::Ordering;
use std::collections::VecDeque;
use std::path::Path;

use crate::bucket::{Bucket, BucketTable, Buckets, Window};
use crate::clip::{Clip, Cutter, Unfinished};
use crate::companions::{Accompanying, Companions, check_loss_masks};
use crate::config::{DataConfig, SetFacts, SizeMultiple};
use crate::decode::{self, Probe};
use crate::error::{DataError, Result};
use crate::import::{self, Imported, Set, Short};
use crate::key::Key;
use crate::media::Media;
use crate::order::OrderItem;
use crate::resample::{frame_count, nearest_frames};
use crate::scan::{Item, check_held_out, find, media_at, way_out};
use crate::unusable::{self, Unusable, Why};

/// One clip with what its file was found to contain.
#[derive(Debug, Clone, PartialEq)]
pub struct Source {
    /// Path, caption, repeats.
    pub item: Item,
    /// Size, times (after `source_fps`), codec.
    pub probe: Probe,
    /// Frames at the target rate.
    pub frames: usize,
    /// What accompanies it.
    pub companions: Companions,
}

/// Everything that will be trained on, before a single frame is kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// Clips, sorted by id; those of an imported dataset file in its order.
    pub sources: Vec<Source>,
    /// Training items, in the order of their clips and then of time.
    pub windows: Vec<Window>,
    /// The sets of the clips, at least one.
    pub sets: Vec<SetFacts>,
    /// Frames a second that everything is resampled to.
    pub fps: f64,
    /// Sizes that clips may have, [width, height] in pixels: the recipe's, or those of an imported dataset file.
    pub sizes: Vec<[u32; 2]>,
    /// Lengths that clips may have, in frames.
    pub frames: Vec<u32>,
    /// Of an imported dataset file: what was read, and what has no counterpart.
    pub notes: Vec<String>,
    /// With `bad = "skip"`: each clip that was left out, with the reason.
    pub skipped: Vec<String>,
}

/// Who follows the reading of the clips.
pub struct Watch<'a> {
    /// Called with (done, total) before each clip and once at the end.
    pub progress: &'a mut dyn FnMut(usize, usize),
    /// Asked after each clip whether to stop.
    pub is_stopped: &'a dyn Fn() -> bool,
}

/// How much of the clips' time is trained.
#[derive(Debug, Clone, PartialEq)]
pub struct Footage {
    /// Seconds of all clips that move.
    pub found: f64,
    /// Seconds of them that are in at least one window.
    pub trained: f64,
    /// Clips of which less than half is trained, with the seconds trained and found; those first of which most is left.
    pub cut: Vec<(String, f64, f64)>,
}

/// The clips of all sets, before they are opened.
struct Gathered {
    sets: Vec<Set>,
    facts: Vec<SetFacts>,
    /// Those without a caption.
    unusable: Vec<Unusable>,
    notes: Vec<String>,
}

impl Gathered {
    fn of(config: &DataConfig, multiple: SizeMultiple, fps: f64) -> Result<Self> {
        let mut all = Self { sets: Vec::new(), facts: Vec::new(), unusable: Vec::new(), notes: Vec::new() };
        for (number, (own, facts)) in config.expanded()?.into_iter().enumerate() {
            match &own.import {
                Some(path) => {
                    let Imported { sets, notes } = import::read(path, &own, multiple, (fps, &facts.name))?;
                    all.sets.extend(sets.into_iter().map(|set| Set { set: number, ..set }));
                    all.notes.extend(notes);
                }
                None => {
                    let (items, without_caption) = find(&own, &facts.name)?;
                    all.unusable.extend(without_caption);
                    all.sets.push(Set { config: own, items, short: Short::Refuse, set: number });
                }
            }
            all.facts.push(facts);
        }
        let items: Vec<Item> = all.sets.iter().flat_map(|set| set.items.iter().cloned()).collect();
        if !items.is_empty() {
            check_held_out(config, &items)?;
        }
        Ok(all)
    }
}

impl Dataset {
    /// Scans, probes and buckets. `model_fps` is the model's own rate, used where the recipe names none;
    /// `progress(done, total)` is called before each clip and once at the end.
    ///
    /// # Errors
    /// Whatever is wrong with the recipe or the clips; clips that cannot be used are all named at once.
    pub fn build(
        config: &DataConfig,
        multiple: SizeMultiple,
        model_fps: f64,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        Self::build_watched(config, multiple, model_fps, &mut Watch { progress, is_stopped: &|| false })
    }

    /// [`Dataset::build`] that can be stopped.
    ///
    /// # Errors
    /// As there, and [`DataError::Stopped`].
    pub fn build_watched(
        config: &DataConfig,
        multiple: SizeMultiple,
        model_fps: f64,
        watch: &mut Watch,
    ) -> Result<Self> {
        config.check_source()?;
        let fps = config.fps.unwrap_or(model_fps);
        let Gathered { sets, facts, mut unusable, notes } = Gathered::of(config, multiple, fps)?;
        let total = sets.iter().map(|set| set.items.len()).sum();
        let mut data = Self {
            sources: Vec::with_capacity(total),
            windows: Vec::new(),
            sets: facts,
            fps,
            sizes: Vec::new(),
            frames: Vec::new(),
            notes,
            skipped: Vec::new(),
        };
        let mut done = 0;
        for set in sets {
            data.add(set, multiple, &mut unusable, watch.is_stopped, &mut || {
                (watch.progress)(done, total);
                done += 1;
            })?;
        }
        data.skipped = unusable::settle(unusable, config.bad, way_out(config.captions.source), fps)?;
        if data.windows.is_empty() && !data.skipped.is_empty() {
            return Err(DataError::Unusable { clips: data.skipped });
        }
        let has_masks = data.sources.iter().any(|source| source.companions.loss_mask.is_some());
        if config.loss_masks.is_some() && !has_masks {
            let reason = "finds no mask of any clip; beside a clip NAME it is called NAME.mask.png";
            return Err(DataError::Config { key: "loss_masks", reason: reason.into() });
        }
        (watch.progress)(total, total);
        Ok(data)
    }

    /// Adds the clips of a set, those that cannot be used to `unusable`; `begin` is called before each.
    fn add(
        &mut self,
        set: Set,
        multiple: SizeMultiple,
        unusable: &mut Vec<Unusable>,
        is_stopped: &dyn Fn() -> bool,
        begin: &mut dyn FnMut(),
    ) -> Result<()> {
        let Set { config, items, short, set } = set;
        let buckets = Buckets::new(&config, multiple)?;
        check_loss_masks(&config, &items)?;
        let shortest = buckets.shortest();
        let (sizes, frames) = (&mut self.sizes, &mut self.frames);
        sizes.extend(config.sizes.iter().filter(|size| !sizes.contains(size)).copied().collect::<Vec<_>>());
        frames.extend(
            config.frames.iter().filter(|length| !frames.contains(length)).copied().collect::<Vec<_>>(),
        );
        let mut too_short = Vec::new();
        for mut item in items {
            item.set = set;
            begin();
            let id = item.id.clone();
            let source = Source::open(item, &config, self.fps);
            // Before a verdict: what stops this program may have stopped ffmpeg too.
            if is_stopped() {
                return Err(DataError::Stopped);
            }
            let source = match source {
                Ok(source) => source,
                Err(error) => {
                    unusable.push(Unusable { id, why: Why::Fault(error) });
                    continue;
                }
            };
            let frames = source.frames;
            if let Some(reason) = buckets.too_many(frames) {
                let fault = DataError::unreadable(source.item.media.path(), reason);
                unusable.push(Unusable { id, why: Why::Fault(fault) });
                continue;
            }
            match (self.add_windows(&source, &buckets), short) {
                (true, _) => self.sources.push(source),
                (false, Short::Refuse) => {
                    unusable.push(Unusable { id, why: Why::TooShort { frames, shortest } })
                }
                (false, Short::LeaveOut) => {
                    let noun = if frames == 1 { "frame" } else { "frames" };
                    too_short.push(format!("{id} ({frames} {noun})"));
                }
            }
        }
        if !too_short.is_empty() {
            let (count, names) = (too_short.len(), too_short.join(", "));
            self.notes.push(format!("left out, shorter than {shortest} frames ({count}): {names}"));
        }
        Ok(())
    }

    /// Whether the source fills a bucket; if so its windows are added.
    fn add_windows(&mut self, source: &Source, buckets: &Buckets) -> bool {
        let (width, height) = source.probe.displayed();
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

    /// The table of buckets, for the plan.
    pub fn table(&self) -> BucketTable {
        let sizes: Vec<(u32, u32)> = self.sources.iter().map(|source| source.probe.displayed()).collect();
        BucketTable::new(&self.windows, &sizes)
    }

    /// The source frame of each frame of `window`, for the cache key of the item.
    pub fn source_frames(&self, window: &Window) -> Vec<usize> {
        let times = &self.sources[window.source].probe.times;
        nearest_frames(times, self.fps, window.start, window.bucket.frames as usize)
    }

    /// The cache key of a training item: `content` is the hash of its source's bytes ([`crate::ContentHashes`]), `encoder`
    /// an identity of the encoder.
    pub fn key(&self, window: &Window, content: &str, encoder: &str) -> Key {
        let aspect = self.sources[window.source].probe.pixel_aspect;
        // Square pixels are left out of the key, so that entries of versions that supported no others are still found.
        let content = if aspect.is_square() { content.to_owned() } else { format!("{content} {aspect}") };
        Key::clip(&content, &self.source_frames(window), window.bucket, encoder)
    }

    /// How much of the clips' time is trained.
    pub fn footage(&self) -> Footage {
        let mut spans: Vec<Vec<(usize, usize)>> = vec![Vec::new(); self.sources.len()];
        for window in &self.windows {
            spans[window.source].push((window.start, window.start + window.bucket.frames as usize));
        }
        let mut footage = Footage { found: 0.0, trained: 0.0, cut: Vec::new() };
        for (source, mut spans) in self.sources.iter().zip(spans) {
            if matches!(source.item.media, Media::Still(_)) {
                continue;
            }
            spans.sort_unstable();
            let (mut frames, mut end) = (0, 0);
            for (from, to) in spans {
                frames += to.saturating_sub(from.max(end));
                end = end.max(to);
            }
            let found = source.probe.end;
            let trained = (frames as f64 / self.fps).min(found);
            footage.found += found;
            footage.trained += trained;
            if trained < found / 2.0 {
                footage.cut.push((source.item.id.clone(), trained, found));
            }
        }
        footage.cut.sort_by(|a, b| (b.2 - b.1).total_cmp(&(a.2 - a.1)));
        footage
    }

    /// Indices of the windows that are trained, and of those that only measure the held-out loss.
    pub fn split(&self) -> (Vec<usize>, Vec<usize>) {
        let is_held_out = |&index: &usize| self.sources[self.windows[index].source].item.held_out;
        let (held_out, trained) = (0..self.windows.len()).partition(is_held_out);
        (trained, held_out)
    }

    /// The items of an [`crate::Order`] over the windows `indices`; its batches then index into `indices`.
    pub fn order_items(&self, indices: &[usize]) -> Vec<OrderItem> {
        let item = |&index: &usize| {
            let Window { source, bucket, .. } = self.windows[index];
            let Item { repeats, set, .. } = self.sources[source].item;
            // Sets without a share, an expert or a target of their own are trained as one.
            let SetFacts { share, expert, target, .. } = self.sets[set];
            let is_plain = share.is_none() && expert.is_none() && target.is_clip();
            let pool = if is_plain { 0 } else { set + 1 };
            OrderItem { bucket, repeats, pool, share }
        };
        indices.iter().map(item).collect()
    }

    /// Decodes one source once and gives the clips of `windows` in order of time. All of them must belong to it.
    ///
    /// # Errors
    /// If the file cannot be opened; later damage is an error of the iterator.
    pub fn clips(
        &self,
        source: usize,
        windows: &[Window],
    ) -> Result<impl Iterator<Item = Result<Clip>> + use<>> {
        let known = &self.sources[source];
        self.cut(source, (&known.item.media, &known.probe), windows)
    }

    /// The same stretches of a companion of the source; nothing where it has none.
    ///
    /// # Errors
    /// As [`Dataset::clips`].
    pub fn companion_clips(
        &self,
        source: usize,
        which: Accompanying,
        windows: &[Window],
    ) -> Result<Option<impl Iterator<Item = Result<Clip>> + use<>>> {
        let companion = self.sources[source].companions.get(which);
        companion.map(|own| self.cut(source, (&own.media, &own.probe), windows)).transpose()
    }

    /// The source frame of each frame of `window` of a companion of its source, for the key of what is made of it.
    pub fn companion_frames(&self, window: &Window, which: Accompanying) -> Vec<usize> {
        let companion = self.sources[window.source].companions.get(which);
        companion.map_or_else(Vec::new, |own| {
            nearest_frames(&own.probe.times, self.fps, window.start, window.bucket.frames as usize)
        })
    }

    /// The clips of `windows` out of `media`, which belongs to `source`.
    fn cut(&self, source: usize, (media, probe): (&Media, &Probe), windows: &[Window]) -> Result<Cutter> {
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
                wanted: nearest_frames(&probe.times, self.fps, window.start, window.bucket.frames as usize),
                filled: 0,
            })
            .collect();
        Ok(Cutter {
            path: media.path().to_path_buf(),
            size: (probe.width, probe.height),
            pixel_aspect: probe.pixel_aspect,
            frames: decode::frames(media, probe)?,
            next_frame: 0,
            unfinished,
        })
    }
}

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

impl Source {
    fn open(item: Item, config: &DataConfig, fps: f64) -> Result<Self> {
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
        let companions = Companions::of(&item, (frames, probe.displayed()), config, fps)?;
        Ok(Self { item, probe, frames, companions })
    }
}
