//! The `[data]` section of a recipe: what to train on, and in which sizes and lengths.

mod loss_masks;
mod sets;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, de};

use crate::captions::{self, CaptionRules};
use crate::error::{DataError, Result};
use crate::mask::MaskRule;

pub(crate) use loss_masks::masked_clip;
pub use loss_masks::{LossMasks, MaskPlace, MaskReduction};
pub use sets::{ForExpert, LearnFrom, SetConfig, SetFacts};

/// What to train on. `[data]` with `folder = "clips"` is enough; every other key has a default.
///
/// ```
/// let config: data::DataConfig = serde_json::from_str(r#"{ "folder": "clips" }"#).unwrap();
/// config.check(data::SizeMultiple::new(16)).unwrap();
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Folder of clips, searched recursively, or a list of folders. A tar file, or a pattern of some (`shards/*.tar`), is read as a
    /// folder of its name; `hf://owner/name`, with `@revision` and a folder behind, is a dataset of the hub. No default.
    #[serde(default, deserialize_with = "one_or_many")]
    pub folder: Vec<PathBuf>,
    /// A dataset file of another trainer in place of `folder`: musubi-tuner's TOML or JSONL, diffusion-pipe's TOML,
    /// DiffSynth-Studio's CSV or JSONL. A TOML's sizes, lengths, extraction, rates and repeats take precedence over the
    /// keys here. Default: none.
    #[serde(default)]
    pub import: Option<PathBuf>,
    /// Where captions are read from, and what is made of them. Default: the folder's metadata file if there is one, else text
    /// files, as they are.
    #[serde(
        default,
        deserialize_with = "captions::name_or_table",
        serialize_with = "captions::as_name_or_table"
    )]
    pub captions: CaptionRules,
    /// What happens to clips that cannot be used: damaged ones, those that need an ffmpeg that is not there, those without a
    /// caption, those shorter than every length. Default `refuse`: one error that lists them all.
    #[serde(default)]
    pub bad: Unfit,
    /// Whether a clip may have an empty caption. Default `refuse`.
    #[serde(default)]
    pub empty_captions: EmptyCaptions,
    /// Word put in front of each caption that does not hold it yet, as `trigger, caption`. Default: none.
    #[serde(default)]
    pub trigger: Option<String>,
    /// Text put in front of each caption, before the trigger, exactly as written. Default: none.
    #[serde(default)]
    pub caption_prefix: String,
    /// Target sizes as `[width, height]` in pixels; each clip uses the one of the nearest aspect ratio.
    /// Default `[[832, 480], [480, 832], [640, 640]]`.
    #[serde(default = "default_sizes")]
    pub sizes: Vec<[u32; 2]>,
    /// Target lengths in frames, each 4n+1; a clip uses the longest that it fills. Default `[17, 33, 49]`.
    #[serde(default = "default_frames")]
    pub frames: Vec<u32>,
    /// Frames a second that clips are resampled to. Default: the model's own rate.
    #[serde(default)]
    pub fps: Option<f64>,
    /// Frames a second of the videos, in place of their own timestamps (for files whose timestamps are wrong).
    /// Default: believe the files.
    #[serde(default)]
    pub source_fps: Option<f64>,
    /// Frames a second of a folder of numbered pictures. Default: the target rate, so no picture is skipped.
    #[serde(default)]
    pub picture_folder_fps: Option<f64>,
    /// Which part of a clip that is longer than its bucket is used. Default `head`.
    #[serde(default)]
    pub extract: Extract,
    /// Number of windows per clip with `extract = "uniform"`. Default 4.
    #[serde(default)]
    pub windows: Option<u32>,
    /// Frames (at the target rate) from one window to the next with `extract = "sliding"`.
    /// Default: the bucket's length, so that windows touch without overlapping.
    #[serde(default)]
    pub stride: Option<u32>,
    /// What to do with still pictures. Default `train`, as clips of one frame.
    #[serde(default)]
    pub stills: Stills,
    /// How often a clip is shown per epoch, by pattern over its path, such as `{ "hero/*" = 3 }`; the largest match counts.
    /// Default: once.
    #[serde(default)]
    pub repeats: BTreeMap<String, u32>,
    /// Clips kept out of training to measure the held-out loss, by pattern over their paths. Default: none.
    #[serde(default)]
    pub held_out: Vec<String>,
    /// Clips that are left out, by pattern over their paths. A pattern that matches none is refused. Default: none.
    #[serde(default)]
    pub skip: Vec<String>,
    /// Whether black bars at the edges of clips are cut off before they are scaled. Default `false`.
    #[serde(default)]
    pub crop_bars: bool,
    /// Whether clips are split where the scene changes; what is then too short is left out. Default `false`.
    #[serde(default)]
    pub split_cuts: bool,
    /// Folder of control clips (pose, depth, edges, ...) for Fun-Control and VACE, and of pose clips for Animate and S2V: for each clip
    /// one of the same path below it, with any extension, as long as the clip and of its aspect. Default: none.
    #[serde(default)]
    pub control: Option<PathBuf>,
    /// Folder of masks for VACE, found as control clips are; clips or pictures, white where the clip is to be generated. For
    /// Animate they are white where the character is, and the rest of the clip is given (its replace mode). Default: none;
    /// of VACE `mask_rules` make them.
    #[serde(default)]
    pub masks: Option<PathBuf>,
    /// Masks by which the loss of clips is weighted, for every model. Default: none.
    #[serde(default)]
    pub loss_masks: Option<LossMasks>,
    /// Rules that make masks for VACE from the clips themselves, of which each window gets one: `boxes`, `brush`, `outpaint`,
    /// `first`, `last`, `first-last` (all but these frames are generated), `every-4` (all but every fourth). Default: none.
    #[serde(default)]
    pub mask_rules: Vec<MaskRule>,
    /// Folder of reference pictures for Fun-Control V1.1, A14B and 5B, VACE and Animate: `NAME.png` for the clip `NAME`, or several that end
    /// in `_1`, `_2`, ... Default: none.
    #[serde(default)]
    pub references: Option<PathBuf>,
    /// Folder of face clips for Animate: for each clip a square one of the same path below it, as long as the clip, with the face of
    /// each frame. Default: none.
    #[serde(default)]
    pub faces: Option<PathBuf>,
    /// The speech of clips for S2V, from each clip's first frame on: a folder with an audio file (WAV, FLAC, MP3, M4A, OGG, ...) of the same
    /// path below it for each clip, or `"own"`: an audio file of the clip's name beside it, else the clip's own track. It must be as
    /// long as the clip. Default: `"own"` for S2V, none for other models.
    #[serde(default)]
    pub audio: Option<AudioSource>,
    /// Folder of camera paths for Fun-Control-Camera: `NAME.txt` with a line of 19 numbers for each frame of the clip `NAME`.
    /// Default: none.
    #[serde(default)]
    pub cameras: Option<PathBuf>,
    /// Names of folders of `folder` that stand for something else, an unpacked tar file or a dataset of the hub.
    #[serde(skip)]
    pub folder_names: BTreeMap<PathBuf, String>,
    /// Several folders or dataset files in place of `folder` and `import`, each with settings of its own; what a set leaves out
    /// it takes from here. Default: none.
    #[serde(default)]
    pub sets: Vec<SetConfig>,
}

/// Where the speech of clips is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "PathBuf", into = "PathBuf")]
pub enum AudioSource {
    /// `"own"`: an audio file of the clip's name beside it, or else the clip's own track.
    Own,
    /// A folder with an audio file of the clip's name for each clip.
    Folder(PathBuf),
}

/// How [`AudioSource::Own`] is written.
const OWN: &str = "own";

impl From<PathBuf> for AudioSource {
    fn from(path: PathBuf) -> Self {
        if path.as_os_str() == OWN { Self::Own } else { Self::Folder(path) }
    }
}

impl From<AudioSource> for PathBuf {
    fn from(source: AudioSource) -> Self {
        match source {
            AudioSource::Own => Self::from(OWN),
            AudioSource::Folder(folder) => folder,
        }
    }
}

/// What happens to clips that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unfit {
    /// They are an error, all named at once with the reasons.
    #[default]
    Refuse,
    /// They are left out, and listed with the reasons in the plan and at the start of a run.
    Skip,
}

/// Whether captions may be empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EmptyCaptions {
    /// An empty caption is an error, like a missing one.
    #[default]
    Refuse,
    /// An empty caption is trained as it is.
    Allow,
}

/// Which windows of a long clip become training items.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Extract {
    /// One window from the start.
    #[default]
    Head,
    /// One window from the middle.
    Middle,
    /// `windows` windows, evenly spread from the start to the end.
    Uniform,
    /// A window every `stride` frames for as long as a whole one fits.
    Sliding,
}

/// What happens to still pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stills {
    /// Trained as clips of one frame, independent of `frames`.
    #[default]
    Train,
    /// Left out.
    Skip,
}

/// What both sides of a picture must be a multiple of: the VAE's stride times the patch size (16, or 32 for models of 5B).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SizeMultiple(u32);

impl SizeMultiple {
    /// A multiple in pixels; zero is taken as one.
    pub const fn new(pixels: u32) -> Self {
        Self(if pixels == 0 { 1 } else { pixels })
    }

    /// The multiple in pixels.
    pub const fn pixels(self) -> u32 {
        self.0
    }

    /// The nearest valid sizes to `width` x `height`, as text: at most four, both sides rounded down and up.
    pub fn nearest(self, width: u32, height: u32) -> String {
        let around = |side: u32| {
            let down = side / self.0 * self.0;
            let up = side.div_ceil(self.0).saturating_mul(self.0);
            let mut sides = vec![down, up];
            sides.dedup();
            sides.retain(|&side| side > 0);
            sides
        };
        let mut sizes = Vec::new();
        for w in around(width) {
            for h in around(height) {
                sizes.push(format!("{w}x{h}"));
            }
        }
        if sizes.is_empty() { format!("{0}x{0}", self.0) } else { sizes.join(", ") }
    }
}

/// What a model takes of clips.
#[derive(Debug, Clone, Copy)]
pub struct Takes<'a> {
    /// What both sides must be a multiple of.
    pub multiple: SizeMultiple,
    /// Its own frames a second, used where the recipe names none.
    pub fps: f64,
    /// Keys of the companions that it reads ([`COMPANION_KEYS`](crate::COMPANION_KEYS)). Those that dataset files and metadata name
    /// besides are not looked at.
    pub companions: &'a [&'static str],
}

/// A bound on sizes and lengths, so that a slip of the keyboard is an answer and not an exhausted memory.
const MAX_SIDE: u32 = 8192;
const MAX_FRAMES: u32 = 4097;
const MAX_WINDOWS: u32 = 10_000;
const MAX_STRIDE: u32 = 1_000_000;
/// Repeats of a clip in an epoch at most; a dataset file of another trainer has the same bound.
pub(crate) const MAX_REPEATS: u32 = 10_000;

impl DataConfig {
    /// Checks that the clips are named once; sets are checked where they are expanded.
    pub(crate) fn check_source(&self) -> Result<()> {
        match (self.folder.is_empty(), &self.import) {
            (true, None) if self.sets.is_empty() => refuse("folder", "names no folder".into()),
            (false, Some(_)) => refuse("import", "replaces data.folder; keep one of the two".into()),
            _ => Ok(()),
        }
    }

    /// Checks every value that can be judged without looking at files.
    ///
    /// # Errors
    /// [`DataError::Size`] for a size that is not a multiple of `multiple`, [`DataError::Config`] for everything else.
    pub fn check(&self, multiple: SizeMultiple) -> Result<()> {
        self.check_source()?;
        self.check_sizes(multiple)?;
        self.check_frames()?;
        for (key, rate) in [
            ("fps", self.fps),
            ("source_fps", self.source_fps),
            ("picture_folder_fps", self.picture_folder_fps),
        ] {
            if rate.is_some_and(|fps| !(0.1..=1000.0).contains(&fps)) {
                return refuse(key, "must be between 0.1 and 1000 frames a second".into());
            }
        }
        self.check_extraction()?;
        self.captions.check(self.trigger.as_deref())?;
        self.loss_masks.iter().try_for_each(LossMasks::check)?;
        self.check_companions()?;
        if let Some((pattern, times)) = self.repeats.iter().find(|&(_, &times)| times > MAX_REPEATS) {
            return refuse(
                "repeats",
                format!("\"{pattern}\" has {times} repeats; at most {MAX_REPEATS} are allowed"),
            );
        }
        if let Some((pattern, _)) = self.repeats.iter().find(|&(_, &times)| times == 0) {
            return refuse(
                "repeats",
                format!("\"{pattern}\" has 0 repeats; move those clips elsewhere to leave them out"),
            );
        }
        Ok(())
    }

    fn check_sizes(&self, multiple: SizeMultiple) -> Result<()> {
        if self.sizes.is_empty() {
            return refuse("sizes", "lists no size; an example is [[832, 480]]".into());
        }
        for &[width, height] in &self.sizes {
            if width == 0 || height == 0 || width % multiple.0 != 0 || height % multiple.0 != 0 {
                let nearest = multiple.nearest(width.min(MAX_SIDE), height.min(MAX_SIDE));
                return Err(DataError::Size { width, height, multiple: multiple.0, nearest });
            }
            if width.max(height) > MAX_SIDE {
                return refuse("sizes", format!("{width}x{height} exceeds {MAX_SIDE} pixels a side"));
            }
        }
        Ok(())
    }

    fn check_frames(&self) -> Result<()> {
        if self.frames.is_empty() {
            return refuse("frames", "lists no length; an example is [17, 33, 49]".into());
        }
        for &frames in &self.frames {
            if frames % 4 != 1 || frames > MAX_FRAMES {
                let down = (frames.clamp(1, MAX_FRAMES) - 1) / 4 * 4 + 1;
                return refuse(
                    "frames",
                    format!(
                        "{frames} is not of the form 4n+1 (up to {MAX_FRAMES}); nearest: {down}, {}",
                        down + 4
                    ),
                );
            }
        }
        Ok(())
    }

    fn check_extraction(&self) -> Result<()> {
        match (self.extract, self.windows, self.stride) {
            (_, Some(windows), _) if !(1..=MAX_WINDOWS).contains(&windows) => {
                refuse("windows", format!("is {windows}; it must be between 1 and {MAX_WINDOWS}"))
            }
            (_, _, Some(stride)) if !(1..=MAX_STRIDE).contains(&stride) => {
                refuse("stride", format!("is {stride} frames; it must be between 1 and {MAX_STRIDE}"))
            }
            (Extract::Uniform, _, None) | (Extract::Sliding, None, _) => Ok(()),
            (_, None, None) => Ok(()),
            (_, Some(_), _) => refuse("windows", "only has a meaning with extract = \"uniform\"".into()),
            (_, _, Some(_)) => refuse("stride", "only has a meaning with extract = \"sliding\"".into()),
        }
    }

    /// Repeats per epoch of the clip `id`.
    pub fn repeats_of(&self, id: &str) -> u32 {
        let matching = self.repeats.iter().filter(|(pattern, _)| crate::glob::matches(pattern, id));
        matching.map(|(_, &times)| times).max().unwrap_or(1)
    }

    /// Whether the clip `id` is kept out of training.
    pub fn is_held_out(&self, id: &str) -> bool {
        self.held_out.iter().any(|pattern| crate::glob::matches(pattern, id))
    }
}

fn refuse<T>(key: &'static str, reason: String) -> Result<T> {
    Err(DataError::Config { key, reason })
}

fn default_sizes() -> Vec<[u32; 2]> {
    vec![[832, 480], [480, 832], [640, 640]]
}

fn default_frames() -> Vec<u32> {
    vec![17, 33, 49]
}

fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Vec<PathBuf>, D::Error> {
    struct Folders;
    impl<'de> de::Visitor<'de> for Folders {
        type Value = Vec<PathBuf>;

        fn expecting(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
            formatter.write_str("a folder, or a list of folders")
        }

        fn visit_str<E: de::Error>(self, folder: &str) -> std::result::Result<Self::Value, E> {
            Ok(vec![PathBuf::from(folder)])
        }

        fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Self::Value, A::Error> {
            let mut folders = Vec::new();
            while let Some(folder) = list.next_element()? {
                folders.push(folder);
            }
            Ok(folders)
        }
    }
    deserializer.deserialize_any(Folders)
}
