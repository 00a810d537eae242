//! musubi-tuner's dataset config (`[general]`, `[[datasets]]`), and the JSONL files that it names.
//!
//! Source of the meaning of its keys: kohya-ss/musubi-tuner `dataset/image_video_dataset.py` and its documentation.

use std::path::Path;

use serde::Deserialize;
use toml::{Table, Value};

use super::{Reader, Set, Short, caption_of, distinct, files_of, name_of, resolution, unknown};
use crate::config::{DataConfig, Extract, SizeMultiple, Stills};
use crate::error::Result;
use crate::media::Media;
use crate::metadata;
use crate::scan::{Item, media_at};

/// Keys that are read; all others are reported.
const KNOWN: [&str; 17] = [
    "resolution",
    "caption_extension",
    "num_repeats",
    "enable_bucket",
    "image_directory",
    "image_jsonl_file",
    "video_directory",
    "video_jsonl_file",
    "target_frames",
    "frame_extraction",
    "frame_stride",
    "frame_sample",
    "max_frames",
    "source_fps",
    // Settings of that program's own cache and batches.
    "cache_directory",
    "batch_size",
    "bucket_no_upscale",
];

/// One of `[[datasets]]`, with the defaults of `[general]`.
#[derive(Debug, Deserialize)]
struct Section {
    resolution: Option<Value>,
    caption_extension: Option<String>,
    num_repeats: Option<f64>,
    #[serde(default)]
    enable_bucket: bool,
    image_directory: Option<String>,
    image_jsonl_file: Option<String>,
    video_directory: Option<String>,
    video_jsonl_file: Option<String>,
    target_frames: Option<Vec<i64>>,
    #[serde(default = "head")]
    frame_extraction: String,
    frame_stride: Option<u32>,
    frame_sample: Option<u32>,
    max_frames: Option<i64>,
    source_fps: Option<f64>,
    batch_size: Option<i64>,
    #[serde(default)]
    bucket_no_upscale: bool,
    control_directory: Option<String>,
}

fn head() -> String {
    "head".into()
}

/// What musubi-tuner takes where no resolution is given.
const RESOLUTION: [f64; 2] = [960.0, 544.0];
/// Sides of its buckets are multiples of this.
const STEP: u32 = 16;
/// Default limit of frames with `frame_extraction = "full"`.
const FULL: i64 = 129;

/// Reads a config with `[[datasets]]`.
pub(super) fn read(reader: &mut Reader, table: Table) -> Result<Vec<Set>> {
    reader.ignored("top level", &unknown(&table, &["general", "datasets"]));
    let general = table.get("general").and_then(Value::as_table).cloned().unwrap_or_default();
    let datasets = table.get("datasets").and_then(Value::as_array).cloned().unwrap_or_default();
    let mut sets = Vec::new();
    for (index, dataset) in datasets.iter().enumerate() {
        let place = format!("datasets[{index}]");
        let Some(own) = dataset.as_table() else {
            return Err(reader.fault(format!("{place} is not a table")));
        };
        let mut merged = general.clone();
        merged.extend(own.clone());
        let ignored = reader.unknown(&merged, &KNOWN, "control_directory");
        reader.ignored(&place, &ignored);
        let section: Section =
            merged.try_into().map_err(|error| reader.fault(format!("{place}: {error}")))?;
        sets.extend(sets_of(reader, &place, index, &section)?);
    }
    if sets.is_empty() {
        return Err(reader.fault("holds no [[datasets]]"));
    }
    Ok(sets)
}

fn sets_of(reader: &mut Reader, place: &str, index: usize, section: &Section) -> Result<Vec<Set>> {
    let sizes = sizes(reader, place, section)?;
    let base = reader.with_control(reader.config(), section.control_directory.as_ref());
    let base = DataConfig { sizes, stills: Stills::Train, ..base };
    let is_video = section.video_directory.is_some() || section.video_jsonl_file.is_some();
    tell_what_differs(reader, place, section, is_video);
    // The same file may be in several sets, so each set has a name.
    let items = |reader: &Reader, set: &str| items(reader, place, set, section, is_video);
    if !is_video {
        let config = DataConfig { frames: vec![1], ..base };
        let items = items(reader, &index.to_string())?;
        reader.note(format!("{place}: {} pictures at {} sizes", items.len(), config.sizes.len()));
        return Ok(vec![Set { config, items, skipped: Vec::new(), short: Short::Refuse, set: 0 }]);
    }
    let config = extraction(reader, place, section, base)?;
    let lengths = match section.frame_extraction.as_str() {
        "full" => {
            let most = reader.lengths(place, &[section.max_frames.unwrap_or(FULL)])?[0];
            vec![(1..=most).step_by(4).collect()]
        }
        // Every clip is trained at every length that it fills.
        _ => {
            let listed = section.target_frames.clone().unwrap_or_else(|| vec![1]);
            reader.lengths(place, &listed)?.into_iter().map(|length| vec![length]).collect::<Vec<_>>()
        }
    };
    let mut sets = Vec::new();
    for frames in lengths {
        let longest = frames.last().copied().unwrap_or(1);
        let items = items(reader, &format!("{index}-{longest}"))?;
        let words = format!("{} clips of {longest} frames", items.len());
        reader.note(format!(
            "{place}: {words}, {}, at {} sizes",
            section.frame_extraction,
            config.sizes.len()
        ));
        sets.push(Set {
            config: DataConfig { frames, ..config.clone() },
            items,
            skipped: Vec::new(),
            short: Short::LeaveOut,
            set: 0,
        });
    }
    Ok(sets)
}

/// Which part of a clip is taken, and how its frames are counted.
fn extraction(reader: &Reader, place: &str, section: &Section, base: DataConfig) -> Result<DataConfig> {
    let (extract, windows, stride) = match section.frame_extraction.as_str() {
        "head" | "full" => (Extract::Head, None, None),
        "chunk" => (Extract::Sliding, None, None),
        "slide" => (Extract::Sliding, None, Some(section.frame_stride.unwrap_or(10))),
        "uniform" => (Extract::Uniform, Some(section.frame_sample.unwrap_or(1)), None),
        other => return Err(reader.fault(format!("{place}: frame_extraction = \"{other}\" is not known"))),
    };
    // Without source_fps the file's own rate is ignored: every frame counts as one at the target rate.
    let source_fps = Some(section.source_fps.unwrap_or(reader.fps));
    Ok(DataConfig { extract, windows, stride, source_fps, ..base })
}

fn tell_what_differs(reader: &mut Reader, place: &str, section: &Section, is_video: bool) {
    if section.batch_size.is_some_and(|size| size > 1) {
        reader.note(format!("{place}: batch_size is not taken over; set train.batch"));
    }
    if section.bucket_no_upscale && !is_video {
        reader.note(format!("{place}: bucket_no_upscale has no counterpart; small pictures are enlarged"));
    }
    if is_video && section.source_fps.is_none() {
        let fps = reader.fps;
        reader.note(format!(
            "{place}: no source_fps, so every frame counts as one of {fps} a second, as there"
        ));
    }
}

/// The sizes of the bucket selector: of about the area of the resolution, in steps of 16, portrait and landscape; for videos
/// always, for pictures where buckets are enabled.
fn sizes(reader: &Reader, place: &str, section: &Section) -> Result<Vec<[u32; 2]>> {
    let listed = section.resolution.as_ref().map_or(Some(RESOLUTION), resolution);
    let listed = listed
        .ok_or_else(|| reader.fault(format!("{place}: resolution is neither a side nor [width, height]")))?;
    let [width, height] = listed.map(|side| side as u32);
    let is_video = section.video_directory.is_some() || section.video_jsonl_file.is_some();
    if !is_video && !section.enable_bucket {
        return Ok(vec![[width, height]]);
    }
    Ok(area_buckets(width, height, reader.multiple))
}

/// All sizes of about the area of `width` x `height`, that of the nearest aspect first.
fn area_buckets(width: u32, height: u32, multiple: SizeMultiple) -> Vec<[u32; 2]> {
    let step = STEP.max(multiple.pixels());
    let down = |side: u32| side / step * step;
    let area = width * height;
    let root = area.isqrt();
    let sides = (down(root / 2).max(step)..root + step).step_by(step as usize);
    let pairs = sides.map(|side| [side, down(area / side)]).filter(|size| size[1] > 0);
    let mut sizes: Vec<[u32; 2]> = pairs.flat_map(|[a, b]| [[a, b], [b, a]]).collect();
    let far = |size: &[u32; 2]| u64::from(size[0].abs_diff(width)) + u64::from(size[1].abs_diff(height));
    sizes.sort_by_key(|size| (far(size), *size));
    distinct(sizes)
}

fn items(reader: &Reader, place: &str, set: &str, section: &Section, is_video: bool) -> Result<Vec<Item>> {
    let repeats = reader.repeats(place, section.num_repeats)?;
    let (folder, list) = match is_video {
        true => (&section.video_directory, &section.video_jsonl_file),
        false => (&section.image_directory, &section.image_jsonl_file),
    };
    match (folder, list) {
        (Some(folder), None) => {
            in_folder(reader, place, set, section, &reader.locate(folder), is_video, repeats)
        }
        (None, Some(list)) => {
            let list = reader.locate(list);
            let rows = metadata::read(&list, reader.keys)?;
            let place = |file: &str| beside(reader, &list, file);
            rows.iter().map(|row| reader.item_of_row(row, set, repeats, place)).collect()
        }
        _ => Err(reader.fault(format!(
            "{place} must name one of image_directory, image_jsonl_file, video_directory, video_jsonl_file"
        ))),
    }
}

/// A path of a list: from the list's folder, or as the dataset file's own paths are taken.
fn beside(reader: &Reader, list: &Path, named: &str) -> std::path::PathBuf {
    let near = list.parent().unwrap_or(Path::new("")).join(named);
    if near.exists() { near } else { reader.locate(named) }
}

fn in_folder(
    reader: &Reader,
    place: &str,
    set: &str,
    section: &Section,
    folder: &Path,
    is_video: bool,
    repeats: u32,
) -> Result<Vec<Item>> {
    let extension = section.caption_extension.as_deref().unwrap_or(".txt").trim_start_matches('.').to_owned();
    let (mut items, mut uncaptioned) = (Vec::new(), Vec::new());
    for file in files_of(reader, folder)? {
        // Folders of pictures are clips in lists only.
        let is_kind = match media_at(&file)? {
            Some(Media::Video(_) | Media::Animation(_)) => is_video,
            Some(Media::Still(_)) => !is_video,
            _ => false,
        };
        if !is_kind {
            continue;
        }
        match caption_of(&file.with_extension(&extension))? {
            Some(caption) => items.push(reader.item(&file, set, &name_of(&file), &[caption], repeats)?),
            None => uncaptioned.push(file.display().to_string()),
        }
    }
    if !uncaptioned.is_empty() {
        let reason = format!("{place}: no .{extension} file next to {}", uncaptioned.join(", "));
        return Err(reader.fault(reason));
    }
    match items.is_empty() {
        true => Err(reader.fault(format!(
            "{place}: no {} in {}",
            if is_video { "videos" } else { "pictures" },
            folder.display()
        ))),
        false => Ok(items),
    }
}
