//! A first, commented recipe for a model, a folder of clips and the devices of this machine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use data::{DataConfig, Dataset, Media, SizeMultiple};
use models::dit::{DitConfig, Pictures};
use models::expert::{Expert, Networks};
use toml::Value;

use crate::base::hub::{Hub, HubError, HubSettings};
use crate::base::{Clips, ModelConfig};
use crate::error::Result;
use crate::machine::precision::Processor;
use models::published::{Beside, Defaults, Published};

/// Width of a 14B model: from here up quantised weights pay on a card of 24 GB.
const LARGE: usize = 5120;
/// Sizes of clips that a recipe lists at most.
const SIZES: usize = 3;

/// Aspects whose quotient's logarithm is smaller count as equal.
const NEAR: f64 = 0.1;

/// The basis of a recipe.
#[derive(Debug)]
pub struct Draft {
    /// The model, as the recipe names it.
    folder: String,
    /// What it is, in words.
    title: String,
    dit: DitConfig,
    networks: Networks,
    data: String,
    clips: Option<Seen>,
    /// One device for each stage.
    stages: Vec<String>,
    /// What could not be examined, one per line.
    pub notes: Vec<String>,
}

/// A summary of the clips.
#[derive(Debug)]
struct Seen {
    count: usize,
    /// `[width, height]` of each.
    sizes: Vec<[u32; 2]>,
    /// Frames of those that move, at the model's rate: the fewest and the most.
    frames: Option<(usize, usize)>,
    caption: String,
}

impl Draft {
    /// Examines the model `folder` and the clips in `data`, and uses the GPUs `gpus`, of which a small model gets the first. The
    /// recipe will be in the folder `beside`.
    ///
    /// # Errors
    /// If the model neither exists here nor is a published one.
    pub fn new(folder: &Path, data: &Path, beside: &Path, gpus: &[String]) -> Result<Self> {
        let processor = if gpus.is_empty() { Processor::Cpu } else { Processor::Gpu };
        let (dit, networks, title) = look_at(folder, processor)?;
        let defaults = dit.defaults(networks);
        let mut notes = Vec::new();
        let clips = match seen(data, defaults) {
            Ok(clips) => Some(clips),
            Err(error) => {
                notes.push(format!("the clips could not be read yet, so sizes are the model's own: {error}"));
                None
            }
        };
        let is_path = folder.exists();
        let stages = match (gpus, dit.dim >= LARGE) {
            ([], _) => vec!["cpu".to_owned()],
            ([first, ..], false) => vec![first.clone()],
            (gpus, true) => gpus.to_vec(),
        };
        Ok(Self {
            folder: if is_path { from(beside, folder) } else { folder.display().to_string() },
            title,
            dit,
            networks,
            data: from(beside, data),
            clips,
            stages,
            notes,
        })
    }

    /// The recipe.
    pub fn recipe(&self) -> String {
        let sections = [
            format!(
                "# {} on {}, written by `tandem new`. Next: `tandem plan` this file.\n# Every key is explained in \
                 recipes/README.md; paths are taken from the folder of this file.",
                self.title,
                self.stages.join(" + ")
            ),
            self.model(),
            self.data(),
            "[adapter]\nrank = 32                        # half of it is enough for a single face".to_owned(),
            self.train(),
            "[optimizer]\nlr = 1e-4                        # lower it where clips fall apart, raise it where nothing is learnt\n\
             warmup = 50"
                .to_owned(),
            format!("[devices]\nstages = {}", list(&self.stages)),
            "[checkpoint]\nevery_steps = 250                # an adapter file each time, so that the best can be picked by eye"
                .to_owned(),
            self.sample(),
        ];
        sections.join("\n\n") + "\n"
    }

    fn model(&self) -> String {
        let mut lines = vec!["[model]".to_owned(), format!("folder = {}", quoted(&self.folder))];
        if self.networks == Networks::Pair {
            lines.push(
                "expert = \"both\"                  # or \"high\", \"low\": one of the two alone".to_owned(),
            );
        }
        let base = match (self.stages.as_slice(), self.dit.dim >= LARGE) {
            ([only], _) if only == "cpu" => {
                "base = \"bf16\"                    # on GPUs; a CPU computes in f32"
            }
            ([_, _, ..], true)
                if self.networks == Networks::Whole && self.dit.pictures() == Pictures::None =>
            {
                "base = \"bf16\"                    # \"fp8\" halves the memory of the weights"
            }
            (_, true) => {
                "base = \"fp8\"                     # 8 bits a weight; \"bf16\" takes twice the memory"
            }
            (_, false) => "base = \"bf16\"                    # \"fp8\" halves the memory of the weights",
        };
        lines.push(base.to_owned());
        lines.join("\n")
    }

    fn data(&self) -> String {
        let defaults = self.dit.defaults(self.networks);
        let seen = match &self.clips {
            None => "clips with a .txt of the same name next to each".to_owned(),
            Some(clips) => format!("{} clips, each with its caption", clips.count),
        };
        let (sizes, frames) = match &self.clips {
            None => (default_sizes(defaults), default_frames(defaults)),
            Some(clips) => (clips.sizes(defaults), clips.lengths(defaults)),
        };
        let sizes: Vec<String> = sizes.iter().map(|[width, height]| format!("[{width}, {height}]")).collect();
        let mut lines = vec![
            "[data]".to_owned(),
            format!("folder = {}  # {seen}", quoted(&self.data)),
            "# trigger = \"sks\"                # a word of your own, put in front of each caption"
                .to_owned(),
            format!("sizes = [{}]  # a clip uses the nearest aspect ratio", sizes.join(", ")),
            format!(
                "frames = {}  # a clip uses the longest that it fills; at {} frames a second",
                list(&frames),
                defaults.fps
            ),
        ];
        if self.dit.pictures() != Pictures::None {
            lines.push(
                "stills = \"skip\"                  # a clip of one frame teaches no motion".to_owned(),
            );
        }
        lines.extend(self.companions());
        lines.join("\n")
    }

    /// The lines of what accompanies clips.
    fn companions(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let facts = self.dit.kind.facts();
        if facts.beside.contains(&Beside::Control) {
            lines.push(
                "control = \"control\"              # a control clip of the same name for each clip: pose, depth, edges".to_owned(),
            );
        }
        if facts.side_chain {
            lines.push(
                "# control = \"control\"            # a control clip of the same name for each clip"
                    .to_owned(),
            );
            lines.push(
                "mask_rules = [\"boxes\", \"brush\"]  # what is to be generated of each clip; or masks = \"masks\"".to_owned(),
            );
        }
        if facts.faces {
            lines.push(
                "control = \"control\"              # a pose clip of the same name for each clip".to_owned(),
            );
            lines.push(
                "faces = \"faces\"                  # a square clip of the face of each, as long".to_owned(),
            );
            lines.push(
                "references = \"references\"        # NAME.png: the character of the clip NAME".to_owned(),
            );
            lines.push(
                "# masks = \"masks\"                # white where the character is, to learn the replace mode".to_owned(),
            );
        }
        if self.dit.control.reference.is_some() || facts.side_chain {
            lines.push(
                "# references = \"references\"      # a picture of the same name for each clip".to_owned(),
            );
        }
        if facts.camera {
            lines.push(
                "cameras = \"cameras\"              # NAME.txt with the camera's pose in each frame"
                    .to_owned(),
            );
        }
        if facts.speech {
            lines.push(
                "# audio = \"audio\"                # an audio file of the same name for each clip, in place of its own track".to_owned(),
            );
            lines.push(
                "# control = \"control\"            # a pose clip of the same name for each clip".to_owned(),
            );
        }
        lines
    }

    fn train(&self) -> String {
        let accumulate = match (self.stages.len(), self.networks) {
            (1, _) => "accumulate = 2                   # clips a step: one alone is a noisy gradient",
            (_, Networks::Whole) => {
                "accumulate = 4                   # clips a step; with two or more all devices work at once"
            }
            (_, Networks::Pair) => {
                "accumulate = 8                   # clips a step, dealt to the experts by their noise"
            }
        };
        let is_three = self.networks == Networks::Whole
            && (self.dit.pictures() == Pictures::None || self.dit.kind.facts().speech);
        let shift = if is_three { 3.0 } else { 5.0 };
        format!(
            "[train]\nsteps = 2000                     # or epochs = 20\n{accumulate}\ntimesteps = {{ distribution = \"shift\", \
             shift = {shift:.1} }}"
        )
    }

    fn sample(&self) -> String {
        let caption = self.clips.as_ref().map(|clips| clips.caption.as_str()).filter(|text| !text.is_empty());
        // " --" in a caption would be read as an option.
        let prompt = caption.unwrap_or("a person walks along a beach at sunset").replace(" --", " ");
        let every = "every = 250";
        match self.dit.pictures() {
            Pictures::Condition => {
                let facts = self.dit.kind.facts();
                let with = match (facts.camera, facts.side_chain) {
                    _ if facts.speech => "--au speech.wav --ref speaker.png",
                    _ if facts.faces => "--cv pose.mp4 --fc face.mp4 --ref character.png",
                    (true, _) => "--i first.png --cam left",
                    (false, true) => "--cv clip.mp4 --mk mask.png",
                    (false, false) => "--cv pose.mp4",
                };
                let prompt = first_line(&prompt);
                format!(
                    "# Each prompt needs its conditions; paths are relative to this file:\n# [sample]\n# prompts = [{}]\n# {every}",
                    quoted(&format!("{prompt} {with}"))
                )
            }
            Pictures::Beside => {
                let last = if self.dit.image.is_some_and(|image| image.positions.is_some()) {
                    " --ei last.png"
                } else {
                    ""
                };
                format!(
                    "# Each prompt needs a picture; its path is relative to this file:\n# [sample]\n# prompts = [{}]\n# {every}",
                    quoted(&format!("{} --i first.png{last}", first_line(&prompt)))
                )
            }
            _ => format!(
                "[sample]\nprompts = [{}]\n{every}                      # steps between two sets of clips",
                quoted(&first_line(&prompt))
            ),
        }
    }
}

impl Seen {
    /// The model's sizes; if every clip is smaller, the clips' own, most frequent first.
    fn sizes(&self, defaults: &Defaults) -> Vec<[u32; 2]> {
        let area = |[width, height]: [u32; 2]| u64::from(width) * u64::from(height);
        if self.sizes.iter().any(|size| area(*size) >= area(defaults.size)) {
            return default_sizes(defaults);
        }
        let multiple = defaults.multiple();
        let down = |side: u32| (side / multiple * multiple).max(multiple);
        let mut counts: BTreeMap<[u32; 2], usize> = BTreeMap::new();
        for [width, height] in &self.sizes {
            *counts.entry([down(*width), down(*height)]).or_default() += 1;
        }
        let mut sizes: Vec<_> = counts.into_iter().collect();
        sizes.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        // One size for each aspect.
        let mut kept: Vec<[u32; 2]> = Vec::new();
        let aspect = |[width, height]: [u32; 2]| f64::from(width) / f64::from(height);
        for (size, _) in sizes {
            let is_new = kept.iter().all(|other| (aspect(*other) / aspect(size)).ln().abs() > NEAR);
            if is_new && kept.len() < SIZES {
                kept.push(size);
            }
        }
        kept
    }

    /// The usual lengths that a clip fills, and one that the shortest clip fills.
    fn lengths(&self, defaults: &Defaults) -> Vec<u32> {
        let Some((fewest, most)) = self.frames else { return default_frames(defaults) };
        let mut lengths: Vec<u32> =
            default_frames(defaults).into_iter().filter(|length| *length as usize <= most).collect();
        if lengths.iter().all(|length| *length as usize > fewest) {
            lengths.insert(0, (fewest.max(1) as u32 - 1) / 4 * 4 + 1);
        }
        lengths
    }
}

/// Sizes of the DiT, whether there are two of them, and the model's name.
fn look_at(folder: &Path, processor: Processor) -> Result<(DitConfig, Networks, String)> {
    let mut config = ModelConfig { folder: Some(folder.to_owned()), ..ModelConfig::default() };
    if let Some(id) = config.hub_id("".as_ref()) {
        match (
            Hub::new(HubSettings::from_environment()).cached(&id),
            Published::in_repository(&id.repository),
        ) {
            (Some(cached), _) => config.folder = Some(cached),
            (None, Some(published)) => {
                return Ok((published.dit(), published.networks, published.title.to_owned()));
            }
            (None, None) => return Err(HubError::NotFetched { id: id.to_string() }.into()),
        }
        debug_assert!(config.wanted(Clips::None).len() > 1, "nothing but the folder is named");
    }
    let model = config.settle("".as_ref(), processor)?;
    let (dit, _) = model.dits.of(Expert::High).open()?;
    Ok((dit, model.dits.networks(), model.name))
}

fn seen(data: &Path, defaults: &Defaults) -> Result<Seen> {
    let text = format!("folder = {}\nframes = [1]", quoted(&data.display().to_string()));
    let config: DataConfig =
        toml::from_str(&text).map_err(|error| crate::Error::PlanText { why: error.to_string() })?;
    let dataset =
        Dataset::build(&config, SizeMultiple::new(defaults.multiple()), defaults.fps, &mut |_, _| {})?;
    let moving = dataset.sources.iter().filter(|source| !matches!(source.item.media, Media::Still(_)));
    let frames: Vec<usize> = moving.map(|source| source.frames).collect();
    Ok(Seen {
        count: dataset.sources.len(),
        sizes: dataset.sources.iter().map(|clip| [clip.probe.width, clip.probe.height]).collect(),
        frames: frames.iter().min().copied().zip(frames.iter().max().copied()),
        caption: dataset.sources.first().map(|source| source.item.caption.clone()).unwrap_or_default(),
    })
}

fn default_sizes(defaults: &Defaults) -> Vec<[u32; 2]> {
    let [width, height] = defaults.size;
    match defaults.stride {
        8 => vec![[width, height], [height, width], [640, 640]],
        _ => vec![[width, height], [height, width]],
    }
}

fn default_frames(defaults: &Defaults) -> Vec<u32> {
    match defaults.stride {
        8 => vec![17, 33, 49],
        _ => vec![25, 49, 81],
    }
}

/// `path`, which is relative to the current folder, as written in a recipe in the folder `beside`.
fn from(beside: &Path, path: &Path) -> String {
    let path = match beside.as_os_str().is_empty() || path.is_absolute() {
        true => path.to_owned(),
        false => std::path::absolute(path).unwrap_or_else(|_| PathBuf::from(path)),
    };
    path.display().to_string()
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().trim().to_owned()
}

/// A text as TOML writes it.
fn quoted(text: &str) -> String {
    Value::String(text.to_owned()).to_string()
}

/// A list as TOML writes it.
fn list<T: Clone>(values: &[T]) -> String
where
    Value: From<Vec<T>>,
{
    Value::from(values.to_vec()).to_string()
}
