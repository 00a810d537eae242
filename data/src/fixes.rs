//! What `data.crop_bars` and `data.split_cuts` change of clips. Whole clips are decoded for it; what was seen is kept in the cache's
//! folder by the content of files.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::atomic;
use crate::cache::Cache;
use crate::config::DataConfig;
use crate::crop::Crop;
use crate::decode;
use crate::error::{DataError, Result};
use crate::hashes::ContentHashes;
use crate::look::Look;
use crate::media::Media;
use crate::source::Source;

/// Raised whenever [`Look`] finds other bars or scenes in the same clip.
const VERSION: u32 = 1;
/// Share of a side that bars must leave: what leaves less is a dark clip with a light in it.
const LEAST_REST: f64 = 0.2;

/// What was seen of clips, and what is changed of them.
pub(crate) struct Fixes {
    /// Where it is kept; nowhere without a cache.
    kept: Option<Kept>,
    cropped: Vec<String>,
    split: Vec<String>,
}

/// What was seen of a clip.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Seen {
    bars: Crop,
    /// Frames of the file that begin another scene.
    cuts: Vec<usize>,
}

/// The file in which it is kept.
struct Kept {
    path: PathBuf,
    hashes: ContentHashes,
    /// By the hash of a clip's content.
    clips: BTreeMap<String, Seen>,
    is_changed: bool,
}

#[derive(Serialize, Deserialize)]
struct KeptFile {
    version: u32,
    clips: BTreeMap<String, Seen>,
}

impl Fixes {
    /// With what is kept in the cache's folder `cache`. A file that is missing or damaged only costs time.
    ///
    /// # Errors
    /// A cache that is not there and cannot be made.
    pub fn open(cache: Option<&Path>) -> Result<Self> {
        let kept = |folder: &Path| -> Result<Kept> {
            let cache = Cache::open(folder)?;
            let path = cache.folder().join("bars-and-scenes.json");
            let file = std::fs::read(&path).ok();
            let file = file.and_then(|bytes| serde_json::from_slice::<KeptFile>(&bytes).ok());
            let clips = file.filter(|file| file.version == VERSION).map(|file| file.clips);
            let hashes = ContentHashes::open(&cache);
            Ok(Kept { path, hashes, clips: clips.unwrap_or_default(), is_changed: false })
        };
        Ok(Self { kept: cache.map(kept).transpose()?, cropped: Vec::new(), split: Vec::new() })
    }

    /// `source` as `config` wants it: without bars, and as many scenes, at `fps` frames a second.
    ///
    /// # Errors
    /// A clip that cannot be decoded, one that is nearly all bars, or one with a camera path that would lose its bars.
    pub fn of(&mut self, mut source: Source, config: &DataConfig, fps: f64) -> Result<Vec<Source>> {
        if !config.crop_bars && !config.split_cuts {
            return Ok(vec![source]);
        }
        let Seen { bars, cuts } = self.seen(&source)?;
        if config.crop_bars && !bars.is_none() {
            check_bars(&source, bars)?;
            source.crop = bars;
            let (width, height) = source.displayed();
            self.cropped.push(format!("{} ({bars}: {width}x{height} are left)", source.item.id));
        }
        if !config.split_cuts || cuts.is_empty() || matches!(source.item.media, Media::Still(_)) {
            return Ok(vec![source]);
        }
        let seconds = |frame: &usize| source.probe.times.get(*frame).copied().unwrap_or(source.probe.end);
        let times: Vec<String> = cuts.iter().map(|frame| format!("{:.2} s", seconds(frame))).collect();
        self.split.push(format!("{} (at {})", source.item.id, times.join(", ")));
        Ok(source.split(&cuts, fps))
    }

    fn seen(&mut self, source: &Source) -> Result<Seen> {
        let Some(kept) = &mut self.kept else { return look(source) };
        let content = kept.hashes.of(&source.item.media)?;
        if let Some(seen) = kept.clips.get(&content) {
            return Ok(seen.clone());
        }
        let seen = look(source)?;
        kept.clips.insert(content, seen.clone());
        kept.is_changed = true;
        Ok(seen)
    }

    /// Keeps what was seen in the cache's folder.
    ///
    /// # Errors
    /// A folder that cannot be written to.
    pub fn keep(&mut self) -> Result<()> {
        self.kept.as_mut().map_or(Ok(()), Kept::save)
    }

    /// Keeps what was seen, and gives lines about what is changed.
    pub fn notes(mut self) -> Vec<String> {
        let mut notes = Vec::new();
        if let Err(error) = self.keep() {
            notes.push(format!("{error}; every start decodes all clips to find bars and scene changes"));
        }
        for (what, clips) in [
            ("bars cut off by data.crop_bars", &self.cropped),
            ("split at scene changes by data.split_cuts", &self.split),
        ] {
            if !clips.is_empty() {
                notes.push(format!("{what} ({}): {}", clips.len(), clips.join(", ")));
            }
        }
        notes
    }
}

impl Kept {
    fn save(&mut self) -> Result<()> {
        if !self.is_changed {
            return Ok(());
        }
        self.hashes.save()?;
        let file = KeptFile { version: VERSION, clips: std::mem::take(&mut self.clips) };
        let text = serde_json::to_vec(&file).map_err(|error| DataError::encode(&self.path, error))?;
        atomic::write(&self.path, |file| file.write_all(&text)).map_err(DataError::io("write", &self.path))
    }
}

/// Looks at all frames of the clip.
fn look(source: &Source) -> Result<Seen> {
    let mut look = Look::new(source.probe.times.len());
    for frame in decode::frames(&source.item.media, &source.probe)? {
        look.at(&frame?);
    }
    Ok(Seen { bars: look.bars(), cuts: look.cuts().into_iter().map(|(frame, _)| frame).collect() })
}

fn check_bars(source: &Source, bars: Crop) -> Result<()> {
    let size = (source.probe.width, source.probe.height);
    let (width, height) = bars.rest(size);
    let is_little = |rest: u32, side: u32| f64::from(rest) < LEAST_REST * f64::from(side);
    if is_little(width, size.0) || is_little(height, size.1) {
        let reason = format!(
            "data.crop_bars would leave {width}x{height} of its {}x{} pixels: it is dark at its edges; leave it out with data.skip",
            size.0, size.1
        );
        return Err(DataError::unreadable(source.item.media.path(), reason));
    }
    match &source.companions.camera {
        Some(path) => {
            let reason = format!(
                "data.crop_bars would cut {bars} off its clip {}, and a camera path is of the whole picture: leave data.crop_bars out",
                source.item.id
            );
            Err(DataError::unreadable(path, reason))
        }
        None => Ok(()),
    }
}
