//! The dataset of a recipe's `[data]` section: every clip probed, assigned to a bucket and cut into windows.

use std::collections::VecDeque;
use std::path::Path;

use crate::bucket::{BucketTable, Buckets, Window};
use crate::clip::{Clip, Cutter, Unfinished};
use crate::companions::{Accompanying, Companion, check_loss_masks};
use crate::config::{DataConfig, MaskPlace, SetFacts, SizeMultiple, Takes};
use crate::crop::Crop;
use crate::decode::{self, Channel, Probe};
use crate::error::{DataError, Result};
use crate::fixes::Fixes;
use crate::import::{self, Imported, Set, Short};
use crate::key::Key;
use crate::media::Media;
use crate::order::OrderItem;
use crate::resample::nearest_frames;
use crate::scan::{Found, Item, check_held_out, find, way_out};
use crate::shards;
use crate::skips::Skips;
use crate::source::Source;
use crate::unusable::{self, Unusable, Why};

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
    /// Folder of the cache, in which is kept what `crop_bars` and `split_cuts` saw in clips, and into which tar files are unpacked.
    /// Without it, clips are decoded each time, and tar files refused.
    pub cache: Option<&'a Path>,
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
    /// Those that are left out by name.
    skips: Skips,
    notes: Vec<String>,
}

impl Gathered {
    fn of(config: &DataConfig, model: &Takes, cache: Option<&Path>) -> Result<Self> {
        let mut all = Self {
            sets: Vec::new(),
            facts: Vec::new(),
            unusable: Vec::new(),
            skips: Skips::default(),
            notes: Vec::new(),
        };
        for (number, (own, facts)) in config.expanded()?.into_iter().enumerate() {
            match &own.import {
                Some(path) => {
                    let Imported { sets, notes } = import::read(path, &own, model, &facts.name)?;
                    let skips = &mut all.skips;
                    let kept = |set: Set| {
                        let is_left_out = |item: &Item| skips.take(&own, &item.id, &facts.name);
                        let (skipped, items): (Vec<Item>, Vec<Item>) =
                            set.items.into_iter().partition(is_left_out);
                        let skipped = skipped.into_iter().map(|item| item.media).collect();
                        Set { items, skipped, set: number, ..set }
                    };
                    all.sets.extend(sets.into_iter().map(kept));
                    all.notes.extend(notes);
                }
                None => {
                    let own = shards::unpacked(own, cache)?;
                    let Found { items, unusable, skipped } =
                        find(&own, (&facts.name, model.companions), &mut all.skips)?;
                    all.unusable.extend(unusable);
                    all.sets.push(Set { config: own, items, skipped, short: Short::Refuse, set: number });
                }
            }
            all.facts.push(facts);
        }
        let items: Vec<Item> = all.sets.iter().flat_map(|set| set.items.iter().cloned()).collect();
        // What a pattern with # is for is only known when clips were split.
        let is_late =
            |pattern: &str| pattern.contains('#') && all.sets.iter().any(|set| set.config.split_cuts);
        all.skips.check(config, &is_late, items.iter().map(|item| item.id.as_str()))?;
        if !items.is_empty() {
            check_held_out(config, &items)?;
        }
        Ok(all)
    }
}

/// Which scenes of a clip fill a bucket.
struct Filled {
    /// Whether one does, or none was left.
    is_any: bool,
    /// Frames of the longest.
    longest: usize,
    /// Those that do not, with their lengths.
    too_short: Vec<String>,
}

/// What windows are cut out of.
struct Track<'a> {
    media: &'a Media,
    probe: &'a Probe,
    crop: Crop,
    channel: Channel,
}

/// What is gathered while clips are read.
struct Reading {
    unusable: Vec<Unusable>,
    skips: Skips,
    fixes: Fixes,
}

impl Dataset {
    /// Scans, probes and buckets. `model_fps` is the model's own rate, used where the recipe names none;
    /// `progress(done, total)` is called before each clip and once at the end. Companions that dataset files and metadata name are not
    /// looked at.
    ///
    /// # Errors
    /// Whatever is wrong with the recipe or the clips; clips that cannot be used are all named at once.
    pub fn build(
        config: &DataConfig,
        multiple: SizeMultiple,
        model_fps: f64,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        let mut watch = Watch { progress, is_stopped: &|| false, cache: None };
        let model = Takes { multiple, fps: model_fps, companions: &[] };
        Self::build_watched(config, &model, &mut watch)
    }

    /// [`Dataset::build`] for a model of which more is known, that can be stopped.
    ///
    /// # Errors
    /// As there, and [`DataError::Stopped`].
    pub fn build_watched(config: &DataConfig, model: &Takes, watch: &mut Watch) -> Result<Self> {
        config.check_source()?;
        let fps = config.fps.unwrap_or(model.fps);
        let Gathered { sets, facts, unusable, skips, notes } = Gathered::of(config, model, watch.cache)?;
        let looks = sets.iter().any(|set| set.config.crop_bars || set.config.split_cuts);
        let fixes = Fixes::open(watch.cache.filter(|_| looks))?;
        let mut reading = Reading { unusable, skips, fixes };
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
            let added = data.add(set, model.multiple, &mut reading, watch.is_stopped, &mut || {
                (watch.progress)(done, total);
                done += 1;
            });
            if let Err(error) = added {
                // What stopped is what is told; that nothing could be kept is told by the next start.
                let _ = reading.fixes.keep();
                return Err(error);
            }
        }
        let names = data.sources.iter().map(|source| source.item.id.as_str());
        reading.skips.check(config, &|_| false, names)?;
        data.notes.extend(reading.skips.note());
        data.notes.extend(reading.fixes.notes());
        data.skipped = unusable::settle(reading.unusable, config.bad, way_out(config.captions.source), fps)?;
        if data.windows.is_empty() && !data.skipped.is_empty() {
            return Err(DataError::Unusable { clips: data.skipped });
        }
        let has_masks = data.sources.iter().any(|source| source.companions.loss_mask.is_some());
        if config.loss_masks.is_some() && !has_masks {
            let reason = match config.loss_masks.as_ref().map(|masks| &masks.from) {
                Some(MaskPlace::Alpha) => "finds no clip with an alpha channel",
                _ => "finds no mask of any clip; beside a clip NAME it is called NAME.mask.png",
            };
            return Err(DataError::Config { key: "loss_masks", reason: reason.into() });
        }
        (watch.progress)(total, total);
        Ok(data)
    }

    /// Adds the clips of a set, those that cannot be used to what `reading` gathers; `begin` is called before each.
    fn add(
        &mut self,
        set: Set,
        multiple: SizeMultiple,
        reading: &mut Reading,
        is_stopped: &dyn Fn() -> bool,
        begin: &mut dyn FnMut(),
    ) -> Result<()> {
        let Set { config, items, skipped, short, set } = set;
        let buckets = Buckets::new(&config, multiple)?;
        check_loss_masks(&config, items.iter().map(|item| &item.media).chain(&skipped))?;
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
            let opened = Source::open(item, &config, self.fps);
            let fixed = opened.and_then(|source| reading.fixes.of(source, &config, self.fps));
            // Before a verdict: what stops this program may have stopped ffmpeg too.
            if is_stopped() {
                return Err(DataError::Stopped);
            }
            let scenes = fixed.and_then(|mut scenes| {
                let set = &self.sets[set].name;
                scenes.retain(|scene| {
                    scene.scene.is_none() || !reading.skips.take(&config, &scene.item.id, set)
                });
                self.add_scenes(scenes, &buckets)
            });
            match (scenes, short) {
                (Err(error), _) => reading.unusable.push(Unusable { id, why: Why::Fault(error) }),
                (Ok(Filled { is_any: false, longest, .. }), Short::Refuse) => {
                    reading.unusable.push(Unusable { id, why: Why::TooShort { frames: longest, shortest } })
                }
                (Ok(Filled { too_short: names, .. }), _) => too_short.extend(names),
            }
        }
        if !too_short.is_empty() {
            let (count, names) = (too_short.len(), too_short.join(", "));
            self.notes.push(format!("left out, shorter than {shortest} frames ({count}): {names}"));
        }
        Ok(())
    }

    /// Adds a clip, or the scenes of one, and the windows of those that fill a bucket.
    fn add_scenes(&mut self, scenes: Vec<Source>, buckets: &Buckets) -> Result<Filled> {
        let mut filled = Filled { is_any: scenes.is_empty(), longest: 0, too_short: Vec::new() };
        for source in scenes {
            let frames = source.span().len();
            if let Some(reason) = buckets.too_many(frames) {
                return Err(DataError::unreadable(source.item.media.path(), reason));
            }
            filled.longest = filled.longest.max(frames);
            if self.add_windows(&source, buckets) {
                filled.is_any = true;
                self.sources.push(source);
            } else {
                let noun = if frames == 1 { "frame" } else { "frames" };
                filled.too_short.push(format!("{} ({frames} {noun})", source.item.id));
            }
        }
        Ok(filled)
    }

    /// Whether the source fills a bucket; if so its windows are added.
    fn add_windows(&mut self, source: &Source, buckets: &Buckets) -> bool {
        let ((width, height), span) = (source.displayed(), source.span());
        let bucket = match source.item.media {
            Media::Still(_) => buckets.of_still(width, height),
            _ => buckets.of_clip(width, height, span.len()),
        };
        let Some(bucket) = bucket else { return false };
        let starts = buckets.starts(span.len(), bucket.frames as usize);
        let index = self.sources.len();
        let window = |start: usize| Window { source: index, bucket, start: span.start + start };
        self.windows.extend(starts.into_iter().map(window));
        true
    }

    /// The table of buckets, for the plan.
    pub fn table(&self) -> BucketTable {
        let sizes: Vec<(u32, u32)> = self.sources.iter().map(Source::displayed).collect();
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
        let source = &self.sources[window.source];
        let aspect = source.probe.pixel_aspect;
        // Square pixels are left out of the key, so that entries of versions that supported no others are still found.
        let content = if aspect.is_square() { content.to_owned() } else { format!("{content} {aspect}") };
        let content = without_bars(content, source.crop);
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
            let found = source.seconds();
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
        let (media, probe) = (&known.item.media, &known.probe);
        self.cut(source, Track { media, probe, crop: known.crop, channel: Channel::Colour }, windows)
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
        let crop = self.sources[source].crop_of(which);
        let cut = |own: &Companion| {
            let Companion { media, probe, channel } = own;
            self.cut(source, Track { media, probe, crop, channel: *channel }, windows)
        };
        companion.map(cut).transpose()
    }

    /// The source frame of each frame of `window` of a companion of its source, for the key of what is made of it.
    pub fn companion_frames(&self, window: &Window, which: Accompanying) -> Vec<usize> {
        let companion = self.sources[window.source].companions.get(which);
        companion.map_or_else(Vec::new, |own| {
            nearest_frames(&own.probe.times, self.fps, window.start, window.bucket.frames as usize)
        })
    }

    /// The key of what `encoder` makes of `window` of a companion of its source, whose bytes have the hash `content`.
    pub fn companion_key(&self, window: &Window, which: Accompanying, content: &str, encoder: &str) -> Key {
        let source = &self.sources[window.source];
        let is_alpha = source.companions.get(which).is_some_and(|own| own.channel == Channel::Alpha);
        let content = if is_alpha { format!("{content} alpha") } else { content.to_owned() };
        let content = without_bars(content, source.crop_of(which));
        Key::clip(&content, &self.companion_frames(window, which), window.bucket, encoder)
    }

    /// The clips of `windows` out of what belongs to `source`.
    fn cut(&self, source: usize, track: Track, windows: &[Window]) -> Result<Cutter> {
        let Track { media, probe, crop, channel } = track;
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
            crop,
            pixel_aspect: probe.pixel_aspect,
            frames: decode::frames_of(media, probe, channel)?,
            next_frame: 0,
            unfinished,
        })
    }
}

/// `content`, and what is cut off it: nothing, where that is nothing, so that entries of earlier versions are found.
fn without_bars(content: String, crop: Crop) -> String {
    if crop.is_none() { content } else { format!("{content} without {crop}") }
}
