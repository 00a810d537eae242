//! Files that belong to a clip: a control clip, a mask, a face clip, reference pictures, a camera path, speech.
//!
//! Each kind has a folder of its own, in which a file has the path of its clip in the data folder, with an extension of its own.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::audio::SpeechTrack;
use crate::config::{AudioSource, DataConfig, LossMasks, MaskPlace, Stills};
use crate::decode::{self, Alpha, Channel, Probe};
use crate::error::{DataError, Result};
use crate::media::{Media, PICTURE_EXTENSIONS, VIDEO_EXTENSIONS};
use crate::named::{AUDIO, CAMERAS, CONTROL, FACES, MASKS, REFERENCES};
use crate::resample::frame_count;
use crate::scan::{Item, Listing, beside, media_at};

/// Aspects that differ by less are the same: sides are whole pixels.
const SAME_ASPECT: f64 = 0.01;
/// Reference pictures of a clip at most.
const MAX_REFERENCES: usize = 8;

/// What accompanies a clip, found and probed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Companions {
    /// The control clip, as long as the clip and of its aspect.
    pub control: Option<Companion>,
    /// The mask, a clip or a picture: white is to be generated.
    pub mask: Option<Companion>,
    /// The mask by which its loss is weighted, a clip as long as the clip or a picture.
    pub loss_mask: Option<Companion>,
    /// The face clip, as long as the clip and square.
    pub faces: Option<Companion>,
    /// Reference pictures, in their order.
    pub references: Vec<PathBuf>,
    /// The file of camera poses.
    pub camera: Option<PathBuf>,
    /// The speech, as long as the clip.
    pub speech: Option<SpeechTrack>,
}

/// A clip or a picture that goes along with another clip.
#[derive(Debug, Clone, PartialEq)]
pub struct Companion {
    /// Where its pixels are.
    pub media: Media,
    /// What its file contains.
    pub probe: Probe,
    /// Which of its channels is meant.
    pub channel: Channel,
}

/// Which of a clip's companions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Accompanying {
    /// The control clip.
    Control,
    /// The mask.
    Mask,
    /// The face clip.
    Faces,
    /// The mask of the loss.
    LossMask,
}

/// The key of masks of the loss.
const LOSS_MASKS: &str = "loss_masks";

/// What a companion must be shaped like.
#[derive(Debug, Clone, Copy)]
enum Shape {
    /// A clip of this displayed size.
    Of((u32, u32)),
    Square,
}

impl Companions {
    /// Of the clip `item`, which contains `own` and has `frames` frames, in the folders of `config`, at `fps` frames a second.
    ///
    /// # Errors
    /// A file that is missing, that cannot be read, or a control clip or mask of another length or aspect than the clip.
    pub(crate) fn of(
        item: &Item,
        (frames, own): (usize, &Probe),
        config: &DataConfig,
        fps: f64,
    ) -> Result<Self> {
        let size = own.displayed();
        let stem = stem(&item.media, config);
        let clip = |key: &'static str, folder: &Option<PathBuf>| -> Result<Option<Companion>> {
            let companion = match (item.named.one(key), folder) {
                (Some(path), _) => Companion::named(path, (key, &item.id), config, fps)?,
                (None, Some(folder)) => Companion::open(&folder.join(&stem), (key, &item.id), config, fps)?,
                (None, None) => return Ok(None),
            };
            let shape = if key == FACES { Shape::Square } else { Shape::Of(size) };
            companion.check((&item.id, frames, shape), key, fps)?;
            Ok(Some(companion))
        };
        let loss_mask = match &config.loss_masks {
            Some(LossMasks { from: MaskPlace::Alpha, .. }) => Companion::opaque(item, own)?,
            Some(masks) => {
                let found = Companion::find(&mask_stem(masks, item, &stem), config, fps)?;
                found
                    .iter()
                    .try_for_each(|mask| mask.check((&item.id, frames, Shape::Of(size)), LOSS_MASKS, fps))?;
                found
            }
            None => None,
        };
        Ok(Self {
            loss_mask,
            control: clip(CONTROL, &config.control)?,
            mask: clip(MASKS, &config.masks)?,
            faces: clip(FACES, &config.faces)?,
            references: match (item.named.all(REFERENCES), &config.references) {
                ([], None) => Vec::new(),
                ([], Some(folder)) => references(&folder.join(&stem), &item.id)?,
                (named, _) => named_pictures(named, &item.id)?,
            },
            camera: match (item.named.one(CAMERAS), &config.cameras) {
                (None, None) => None,
                (None, Some(folder)) => Some(camera(&folder.join(&stem), &item.id)?),
                (Some(path), _) => Some(camera_at(path.to_owned(), &item.id)?),
            },
            speech: config
                .audio
                .as_ref()
                .map(|source| SpeechTrack::of(item, &stem, source, (frames, fps)))
                .transpose()?,
        })
    }

    /// The control clip, the mask or the face clip.
    pub fn get(&self, which: Accompanying) -> Option<&Companion> {
        match which {
            Accompanying::Control => self.control.as_ref(),
            Accompanying::Mask => self.mask.as_ref(),
            Accompanying::Faces => self.faces.as_ref(),
            Accompanying::LossMask => self.loss_mask.as_ref(),
        }
    }
}

impl Companion {
    fn open(stem: &Path, (key, clip): (&str, &str), config: &DataConfig, fps: f64) -> Result<Self> {
        let reason =
            || format!("there is none for {clip}: data.{key} needs a clip of this name with any extension");
        Self::find(stem, config, fps)?.ok_or_else(|| DataError::unreadable(stem, reason()))
    }

    /// The alpha channel of the clip `item` itself; nothing where it has none.
    fn opaque(item: &Item, own: &Probe) -> Result<Option<Self>> {
        let companion = || Self { media: item.media.clone(), probe: own.clone(), channel: Channel::Alpha };
        match own.alpha {
            Alpha::None => Ok(None),
            Alpha::Channel => Ok(Some(companion())),
            Alpha::Unread => {
                let reason = format!(
                    "the alpha of {} is a stream of its own, which ffmpeg does not decode: convert it to ProRes 4444 or animated WebP, or \
                     put a mask beside it",
                    own.codec
                );
                Err(DataError::unreadable(item.media.path(), reason))
            }
        }
    }

    /// The clip or picture at `path`, which a list names.
    fn named(path: &Path, (key, clip): (&str, &str), config: &DataConfig, fps: f64) -> Result<Self> {
        let reason =
            || format!("it is named as data.{key} of {clip}, and there is no clip or picture of this name");
        Self::at(path, config, fps)?.ok_or_else(|| DataError::unreadable(path, reason()))
    }

    /// The clip or picture called `stem`, with any extension; nothing where there is none.
    fn find(stem: &Path, config: &DataConfig, fps: f64) -> Result<Option<Self>> {
        let extensions = VIDEO_EXTENSIONS.iter().chain(&PICTURE_EXTENSIONS);
        let files = extensions.map(|extension| with_extension(stem, extension));
        for place in files.chain([stem.to_path_buf()]) {
            if let Some(found) = Self::at(&place, config, fps)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// The clip or picture at `place`; nothing where there is none.
    fn at(place: &Path, config: &DataConfig, fps: f64) -> Result<Option<Self>> {
        let Some(media) = media_at(place)? else { return Ok(None) };
        let mut probe = decode::probe(&media, config.picture_folder_fps.unwrap_or(fps))?;
        if let (Some(rate), Media::Video(_) | Media::Animation(_)) = (config.source_fps, &media) {
            probe.times = (0..probe.times.len()).map(|index| index as f64 / rate).collect();
            probe.end = probe.times.len() as f64 / rate;
        }
        Ok(Some(Self { media, probe, channel: Channel::Colour }))
    }

    /// Checks that it is as long as its clip, or a picture, and of this shape.
    fn check(&self, (clip, length, shape): (&str, usize, Shape), key: &str, fps: f64) -> Result<()> {
        let refuse = |reason: String| Err(DataError::unreadable(self.media.path(), reason));
        let frames = match self.media {
            Media::Still(_) => length,
            _ => frame_count(self.probe.end, fps),
        };
        if frames != length {
            return refuse(format!(
                "it has {frames} frames at {fps} frames a second and its clip {clip} has {length}: data.{key} must be as long as the clips"
            ));
        }
        let aspect = |(width, height): (u32, u32)| f64::from(width) / f64::from(height);
        let own = self.probe.displayed();
        let is_like = |other| (aspect(own) / aspect(other) - 1.0).abs() <= SAME_ASPECT;
        match shape {
            Shape::Of(other) if !is_like(other) => refuse(format!(
                "it is {}x{} and its clip {clip} is {}x{}: data.{key} must have the clips' aspect",
                own.0, own.1, other.0, other.1
            )),
            Shape::Square if !is_like((1, 1)) => {
                refuse(format!("it is {}x{}: data.{key} must be square, the face alone", own.0, own.1))
            }
            _ => Ok(()),
        }
    }
}

/// Checks that each mask in the folder of `config` is that of one of `clips`.
pub(crate) fn check_loss_masks<'a>(
    config: &DataConfig,
    clips: impl Iterator<Item = &'a Media>,
) -> Result<()> {
    let Some(MaskPlace::Folder(folder)) = config.loss_masks.as_ref().map(|masks| &masks.from) else {
        return Ok(());
    };
    let stems: BTreeSet<PathBuf> = clips.map(|media| stem(media, config)).collect();
    let listing = Listing::of(folder)?;
    let strays = listing.stems().filter(|stem| !stems.contains(stem));
    let strays: Vec<String> = strays.map(|stem| stem.display().to_string()).collect();
    match strays.is_empty() {
        true => Ok(()),
        false => {
            let names = strays.join(", ");
            let reason = format!("{}: there is no clip of this name for {names}", folder.display());
            Err(DataError::Config { key: LOSS_MASKS, reason })
        }
    }
}

/// Where the mask of the loss of `item`, whose path below its data folder is `stem`, would be.
fn mask_stem(masks: &LossMasks, item: &Item, stem: &Path) -> PathBuf {
    match &masks.from {
        MaskPlace::Folder(folder) => folder.join(stem),
        MaskPlace::Beside | MaskPlace::Alpha => beside(&item.media, "mask"),
    }
}

/// The path of a clip below its data folder, without its extension; of an imported clip its name.
fn stem(media: &Media, config: &DataConfig) -> PathBuf {
    let path = media.path();
    let below = config.folder.iter().find_map(|folder| path.strip_prefix(folder).ok());
    let below =
        below.map(Path::to_path_buf).or_else(|| path.file_name().map(PathBuf::from)).unwrap_or_default();
    match media {
        Media::Pictures { .. } => below,
        _ => below.with_extension(""),
    }
}

/// `stem` followed by a dot and `extension`; the stem may have dots itself.
fn with_extension(stem: &Path, extension: &str) -> PathBuf {
    let mut name = stem.as_os_str().to_os_string();
    name.push(".");
    name.push(extension);
    PathBuf::from(name)
}

/// `NAME.png`, or `NAME_1.png`, `NAME_2.png`, ... in their order.
fn references(stem: &Path, clip: &str) -> Result<Vec<PathBuf>> {
    let picture = |stem: &Path| {
        PICTURE_EXTENSIONS.iter().map(|extension| with_extension(stem, extension)).find(|path| path.is_file())
    };
    let numbered = |number: usize| {
        let mut name = stem.as_os_str().to_os_string();
        name.push(format!("_{number}"));
        picture(Path::new(&name))
    };
    let found: Vec<PathBuf> = match picture(stem) {
        Some(one) => vec![one],
        None => (1..=MAX_REFERENCES).map_while(numbered).collect(),
    };
    if found.is_empty() {
        let reason = format!(
            "there is none for {clip}: data.references needs a picture of this name, or several that end in _1, _2, ..."
        );
        return Err(DataError::unreadable(stem, reason));
    }
    Ok(found)
}

/// Reference pictures that a list names.
fn named_pictures(named: &[PathBuf], clip: &str) -> Result<Vec<PathBuf>> {
    if named.len() > MAX_REFERENCES {
        let reason =
            format!("{} reference pictures are named, and {MAX_REFERENCES} are the most", named.len());
        return Err(DataError::unreadable(clip, reason));
    }
    match named.iter().find(|path| !path.is_file()) {
        Some(path) => {
            let reason = format!("it is named as a reference picture of {clip}, and there is no such file");
            Err(DataError::unreadable(path, reason))
        }
        None => Ok(named.to_vec()),
    }
}

/// `NAME.txt`.
fn camera(stem: &Path, clip: &str) -> Result<PathBuf> {
    camera_at(with_extension(stem, "txt"), clip)
}

fn camera_at(path: PathBuf, clip: &str) -> Result<PathBuf> {
    match path.is_file() {
        true => Ok(path),
        false => {
            let reason = format!("there is none for {clip}: data.cameras needs a file of poses of this name");
            Err(DataError::unreadable(&path, reason))
        }
    }
}

impl DataConfig {
    /// The folders of companions that are named, each with its key.
    pub fn companions(&self) -> impl Iterator<Item = (&'static str, &PathBuf)> {
        let all = [
            (CONTROL, &self.control),
            (MASKS, &self.masks),
            (FACES, &self.faces),
            (REFERENCES, &self.references),
            (CAMERAS, &self.cameras),
        ];
        let audio = match &self.audio {
            Some(AudioSource::Folder(folder)) => Some((AUDIO, folder)),
            Some(AudioSource::Own) | None => None,
        };
        all.into_iter().filter_map(|(key, folder)| Some((key, folder.as_ref()?))).chain(audio)
    }

    /// Checks that the folders of companions are there, and that stills are not to be trained with them.
    pub(crate) fn check_companions(&self) -> Result<()> {
        if self.masks.is_some() && !self.mask_rules.is_empty() {
            let reason = "makes what data.masks has; keep one of the two".into();
            return Err(DataError::Config { key: "mask_rules", reason });
        }
        if self.audio.is_some() && self.stills == Stills::Train {
            let reason = "a picture has no speech: set data.stills = \"skip\"".into();
            return Err(DataError::Config { key: AUDIO, reason });
        }
        for (key, folder) in self.companions() {
            if !folder.is_dir() {
                let reason = format!("there is no folder {}", folder.display());
                return Err(DataError::Config { key, reason });
            }
            if key == CAMERAS && self.stills == Stills::Train {
                let reason = "a picture has no camera path: set data.stills = \"skip\"".into();
                return Err(DataError::Config { key, reason });
            }
        }
        Ok(())
    }
}
