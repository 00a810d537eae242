//! `[[data.sets]]`: several folders or dataset files, each with settings of its own.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{AudioSource, DataConfig, Extract, MAX_REPEATS, Stills, one_or_many, refuse};
use crate::captions::{self, CaptionRules};
use crate::error::Result;

/// A loss counts this often at most.
const MAX_WEIGHT: f64 = 100.0;
/// Share of the micro-batches that sets may claim together, at most.
const MAX_SHARE: f64 = 0.95;

/// Clips with settings of their own. What a set leaves out it takes from `[data]`.
///
/// ```
/// let text = r#"{ "sets": [{ "folder": "hero", "repeats": 3 }, { "folder": "others", "share": 0.2, "trigger": "" }] }"#;
/// let config: data::DataConfig = serde_json::from_str(text).unwrap();
/// assert_eq!(config.expanded().unwrap()[1].0.trigger, None);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetConfig {
    /// Its name, in front of the names of its clips. Default: the name of its folder or dataset file.
    #[serde(default)]
    pub name: Option<String>,
    /// Folder of clips, or a list of folders.
    #[serde(default, deserialize_with = "one_or_many")]
    pub folder: Vec<PathBuf>,
    /// A dataset file of another trainer in place of `folder`.
    #[serde(default)]
    pub import: Option<PathBuf>,
    /// How often each of its clips is shown in an epoch, 1 to 10,000. Default: as `data.repeats` says.
    #[serde(default)]
    pub repeats: Option<u32>,
    /// What the loss of its samples is multiplied by, above 0 to 100. Default 1.
    #[serde(default = "one")]
    pub weight: f64,
    /// Fraction of the micro-batches that are taken from it, however many clips it has; above 0, and 0.95 for all sets
    /// together. Default: each clip is trained once an epoch, or as often as it repeats.
    #[serde(default)]
    pub share: Option<f64>,
    /// The expert that it is trained on, of a model with two. Default: both.
    #[serde(default)]
    pub expert: Option<ForExpert>,
    /// What the network is to predict for its samples. Default `clip`.
    #[serde(default, skip_serializing_if = "LearnFrom::is_clip")]
    pub target: LearnFrom,
    /// Target sizes as `[width, height]` in pixels.
    #[serde(default)]
    pub sizes: Option<Vec<[u32; 2]>>,
    /// Target lengths in frames, each 4n+1.
    #[serde(default)]
    pub frames: Option<Vec<u32>>,
    /// Frames a second of its videos, in place of their timestamps.
    #[serde(default)]
    pub source_fps: Option<f64>,
    /// Which part of a longer clip is used.
    #[serde(default)]
    pub extract: Option<Extract>,
    /// Number of windows, with `uniform`.
    #[serde(default)]
    pub windows: Option<u32>,
    /// Frames from one window to the next, with `sliding`.
    #[serde(default)]
    pub stride: Option<u32>,
    /// What happens to stills.
    #[serde(default)]
    pub stills: Option<Stills>,
    /// Where its captions are read from and what is made of them.
    #[serde(
        default,
        deserialize_with = "captions::some_name_or_table",
        serialize_with = "captions::as_some_name_or_table"
    )]
    pub captions: Option<CaptionRules>,
    /// Its trigger; `""` for none.
    #[serde(default)]
    pub trigger: Option<String>,
    /// Text in front of its captions.
    #[serde(default)]
    pub caption_prefix: Option<String>,
    /// Those of its clips that are left out, by pattern.
    #[serde(default)]
    pub skip: Option<Vec<String>>,
    /// Whether black bars are cut off its clips.
    #[serde(default)]
    pub crop_bars: Option<bool>,
    /// Whether its clips are split where the scene changes.
    #[serde(default)]
    pub split_cuts: Option<bool>,
    /// Folder of its control clips.
    #[serde(default)]
    pub control: Option<PathBuf>,
    /// Folder of its masks.
    #[serde(default)]
    pub masks: Option<PathBuf>,
    /// Folder of its face clips.
    #[serde(default)]
    pub faces: Option<PathBuf>,
    /// Folder of its reference pictures.
    #[serde(default)]
    pub references: Option<PathBuf>,
    /// Folder of its speech, or `"own"`.
    #[serde(default)]
    pub audio: Option<AudioSource>,
    /// Folder of its camera paths.
    #[serde(default)]
    pub cameras: Option<PathBuf>,
}

/// One of the two experts of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ForExpert {
    /// For high noise.
    High,
    /// For low noise.
    Low,
}

/// Where the target of a prediction is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LearnFrom {
    /// The clip: noise minus its latents.
    #[default]
    Clip,
    /// The base model: what it predicts without the adapter, so that the adapter changes nothing there.
    Base,
}

impl LearnFrom {
    /// Whether it is the clip.
    pub fn is_clip(&self) -> bool {
        *self == Self::Clip
    }
}

/// What training has to know of a set.
#[derive(Debug, Clone, PartialEq)]
pub struct SetFacts {
    /// In front of the names of its clips; empty where there are no sets.
    pub name: String,
    /// What the loss of its samples is multiplied by.
    pub weight: f64,
    /// Fraction of the micro-batches that are taken from it.
    pub share: Option<f64>,
    /// The expert that it is trained on, where that is one alone.
    pub expert: Option<ForExpert>,
    /// Where the targets of its samples are from.
    pub target: LearnFrom,
    /// Its trigger.
    pub trigger: Option<String>,
}

impl Default for SetFacts {
    fn default() -> Self {
        let (share, expert, trigger) = (None, None, None);
        Self { name: String::new(), weight: 1.0, share, expert, target: LearnFrom::Clip, trigger }
    }
}

fn one() -> f64 {
    1.0
}

impl SetConfig {
    /// `name`, or the last part of its first folder, or its dataset file's name.
    fn name(&self) -> String {
        let place = self.folder.first().or(self.import.as_ref());
        let last = place.and_then(|place| place.file_stem()).map(|name| name.to_string_lossy().into_owned());
        self.name.clone().or(last).unwrap_or_default()
    }

    /// Every folder and file that it names.
    pub fn places_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let Self { folder, control, masks, faces, references, cameras, audio, .. } = self;
        let companions = [control, masks, faces, references, cameras];
        let audio = match audio {
            Some(AudioSource::Folder(folder)) => Some(folder),
            Some(AudioSource::Own) | None => None,
        };
        folder.iter_mut().chain(companions.into_iter().flatten()).chain(audio)
    }

    /// `base` with what this set says.
    fn over(&self, base: &DataConfig) -> DataConfig {
        let own = self.clone();
        let base = base.clone();
        let trigger = own.trigger.map_or(base.trigger, |word| (!word.is_empty()).then_some(word));
        // The number of windows and the stride belong to the way of extraction.
        let (extract, windows, stride) = match own.extract {
            Some(extract) => (extract, own.windows, own.stride),
            None => (base.extract, own.windows.or(base.windows), own.stride.or(base.stride)),
        };
        DataConfig {
            folder: own.folder,
            import: own.import,
            repeats: own.repeats.map_or(base.repeats, |times| [("*".to_owned(), times)].into()),
            sizes: own.sizes.unwrap_or(base.sizes),
            frames: own.frames.unwrap_or(base.frames),
            source_fps: own.source_fps.or(base.source_fps),
            stills: own.stills.unwrap_or(base.stills),
            captions: own.captions.unwrap_or(base.captions),
            caption_prefix: own.caption_prefix.unwrap_or(base.caption_prefix),
            skip: own.skip.unwrap_or(base.skip),
            crop_bars: own.crop_bars.unwrap_or(base.crop_bars),
            split_cuts: own.split_cuts.unwrap_or(base.split_cuts),
            control: own.control.or(base.control),
            masks: own.masks.or(base.masks),
            faces: own.faces.or(base.faces),
            references: own.references.or(base.references),
            audio: own.audio.or(base.audio),
            cameras: own.cameras.or(base.cameras),
            sets: Vec::new(),
            trigger,
            extract,
            windows,
            stride,
            ..base
        }
    }
}

impl DataConfig {
    /// The settings of each set, and what training has to know of it. Without sets, these settings alone.
    ///
    /// # Errors
    /// Sets that contradict each other or `[data]`.
    pub fn expanded(&self) -> Result<Vec<(Self, SetFacts)>> {
        if self.sets.is_empty() {
            let trigger = self.trigger.clone();
            return Ok(vec![(self.clone(), SetFacts { trigger, ..SetFacts::default() })]);
        }
        self.check_sets()?;
        let with_facts = |set: &SetConfig| {
            let own = set.over(self);
            let facts = SetFacts {
                name: set.name(),
                weight: set.weight,
                share: set.share,
                expert: set.expert,
                target: set.target,
                trigger: own.trigger.clone(),
            };
            (own, facts)
        };
        Ok(self.sets.iter().map(with_facts).collect())
    }

    fn check_sets(&self) -> Result<()> {
        if !self.folder.is_empty() || self.import.is_some() {
            let key = if self.import.is_some() { "import" } else { "folder" };
            return refuse(key, "is named beside data.sets: make it a set of its own".into());
        }
        for (index, set) in self.sets.iter().enumerate() {
            let name = set.name();
            let fault = |reason: String| refuse("sets", format!("{} (\"{name}\"): {reason}", index + 1));
            if set.folder.is_empty() == set.import.is_none() {
                return fault("names a folder or an import, one of the two".into());
            }
            if name.is_empty() || name.contains(['/', '*', '?']) {
                return fault("needs a name without / * ?".into());
            }
            if self.sets[..index].iter().any(|other| other.name() == name) {
                return fault("another set has this name: set name".into());
            }
            if !(f64::MIN_POSITIVE..=MAX_WEIGHT).contains(&set.weight) {
                return fault(format!(
                    "weight is {}; it must be above 0 and at most {MAX_WEIGHT}",
                    set.weight
                ));
            }
            if set.share.is_some_and(|share| !(f64::MIN_POSITIVE..=MAX_SHARE).contains(&share)) {
                return fault(format!("share must be above 0 and at most {MAX_SHARE}"));
            }
            if let Some(times) = set.repeats.filter(|times| !(1..=MAX_REPEATS).contains(times)) {
                return fault(format!("repeats is {times}; it must be between 1 and {MAX_REPEATS}"));
            }
            if set.share.is_some() && set.repeats.is_some() {
                return fault("has both share and repeats: keep one of the two".into());
            }
        }
        let shares: f64 = self.sets.iter().filter_map(|set| set.share).sum();
        match self.sets.iter().all(|set| set.share.is_some()) {
            _ if shares > MAX_SHARE => {
                refuse("sets", format!("claim {shares} of the micro-batches together; at most {MAX_SHARE}"))
            }
            true => refuse("sets", "all have a share: an epoch is counted by the sets that have none".into()),
            false => Ok(()),
        }
    }
}
