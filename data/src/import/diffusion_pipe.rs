//! diffusion-pipe's dataset config: settings for all, and `[[directory]]` with settings of its own.
//!
//! Source of the meaning of its keys: tdrussell/diffusion-pipe `utils/dataset.py` and its example.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use toml::{Table, Value};

use super::{Reader, Set, Short, caption_of, distinct, files_of, name_of, resolution};
use crate::config::{DataConfig, Extract, Stills};
use crate::error::{DataError, Result};
use crate::media::Media;
use crate::scan::{Item, media_at};

/// Keys that are read; all others are reported.
const KNOWN: [&str; 13] = [
    "path",
    "resolutions",
    "enable_ar_bucket",
    "min_ar",
    "max_ar",
    "num_ar_buckets",
    "ar_buckets",
    "size_buckets",
    "frame_buckets",
    "num_repeats",
    "caption_prefix",
    "skip_empty_caption",
    "directory",
];

/// Captions of a folder in one file: name to a list of captions.
const CAPTIONS: &str = "captions.json";
/// Sides of its buckets are multiples of this.
const STEP: u32 = 32;

/// A `[[directory]]`, with the top level's defaults.
#[derive(Debug, Deserialize)]
struct Section {
    path: String,
    resolutions: Option<Vec<Value>>,
    #[serde(default)]
    enable_ar_bucket: bool,
    min_ar: Option<f64>,
    max_ar: Option<f64>,
    num_ar_buckets: Option<u32>,
    ar_buckets: Option<Vec<Value>>,
    size_buckets: Option<Vec<[i64; 3]>>,
    frame_buckets: Option<Vec<i64>>,
    num_repeats: Option<f64>,
    #[serde(default)]
    caption_prefix: String,
    #[serde(default = "yes")]
    skip_empty_caption: bool,
    control_path: Option<String>,
}

fn yes() -> bool {
    true
}

/// Reads a config with `[[directory]]`.
pub(super) fn read(reader: &mut Reader, mut table: Table) -> Result<Vec<Set>> {
    let directories =
        table.remove("directory").and_then(|value| value.as_array().cloned()).unwrap_or_default();
    let mut sets = Vec::new();
    for (index, directory) in directories.iter().enumerate() {
        let place = format!("directory[{index}]");
        let Some(own) = directory.as_table() else {
            return Err(reader.fault(format!("{place} is not a table")));
        };
        let mut merged = table.clone();
        merged.extend(own.clone());
        let ignored = reader.unknown(&merged, &KNOWN, "control_path");
        reader.ignored(&place, &ignored);
        let section: Section =
            merged.try_into().map_err(|error| reader.fault(format!("{place}: {error}")))?;
        sets.extend(sets_of(reader, &place, index, &section)?);
    }
    match sets.is_empty() {
        true => Err(reader.fault("holds no [[directory]]")),
        false => Ok(sets),
    }
}

fn sets_of(reader: &mut Reader, place: &str, index: usize, section: &Section) -> Result<Vec<Set>> {
    // A bucket of one frame is always there, for pictures.
    let mut lengths = vec![1];
    lengths.extend(section.frame_buckets.clone().unwrap_or_default());
    let mut shapes = Vec::new();
    match &section.size_buckets {
        Some(buckets) => {
            let side = |side: i64| u32::try_from(side).unwrap_or(0);
            let sizes = distinct(buckets.iter().map(|[w, h, _]| [side(*w), side(*h)]));
            lengths.extend(buckets.iter().map(|bucket| bucket[2]));
            reader.note(format!("{place}: size_buckets are read as sizes and lengths, in any combination"));
            shapes.push(sizes);
        }
        None => {
            let listed = section
                .resolutions
                .as_ref()
                .ok_or_else(|| reader.fault(format!("{place}: no resolutions")))?;
            let aspects = aspects(reader, place, section)?;
            for value in listed {
                let [width, height] = resolution(value)
                    .ok_or_else(|| reader.fault(format!("{place}: {value} is not a resolution")))?;
                let step = f64::from(STEP.max(reader.multiple.pixels()));
                let near = |side: f64| ((side / step).round().max(1.0) * step) as u32;
                let area = width * height;
                shapes.push(distinct(
                    aspects.iter().map(|ar| [near((area * ar).sqrt()), near((area / ar).sqrt())]),
                ));
            }
        }
    }
    let frames = reader.lengths(place, &lengths)?;
    let mut sets = Vec::new();
    // Every clip is trained at every resolution.
    for (at, sizes) in shapes.into_iter().enumerate() {
        let (extract, stills) = (Extract::Head, Stills::Train);
        let config = DataConfig {
            sizes,
            frames: frames.clone(),
            extract,
            windows: None,
            stride: None,
            stills,
            ..reader.with_control(reader.config(), section.control_path.as_ref())
        };
        let items = items(reader, place, &format!("{index}-{at}"), section)?;
        let words = format!(
            "{} clips at {} sizes, {frames:?} frames, from their beginning",
            items.len(),
            config.sizes.len()
        );
        reader.note(format!("{place}: {words}"));
        sets.push(Set { config, items, skipped: Vec::new(), short: Short::LeaveOut, set: 0 });
    }
    Ok(sets)
}

/// Aspects, width to height: given ones, evenly spaced in their logarithm, or the square alone.
fn aspects(reader: &Reader, place: &str, section: &Section) -> Result<Vec<f64>> {
    if !section.enable_ar_bucket {
        return Ok(vec![1.0]);
    }
    if let Some(listed) = &section.ar_buckets {
        let aspect = |value: &Value| match value.as_array() {
            Some(_) => resolution(value).map(|[width, height]| width / height),
            None => value.as_float().or(value.as_integer().map(|n| n as f64)),
        };
        let aspects: Option<Vec<f64>> =
            listed.iter().map(|value| aspect(value).filter(|ar| *ar > 0.0)).collect();
        return aspects.ok_or_else(|| {
            reader.fault(format!("{place}: ar_buckets must hold aspects or [width, height]"))
        });
    }
    let (Some(least), Some(most), Some(count)) = (section.min_ar, section.max_ar, section.num_ar_buckets)
    else {
        return Err(reader.fault(format!(
            "{place}: enable_ar_bucket needs ar_buckets, or min_ar, max_ar and num_ar_buckets"
        )));
    };
    if !(least > 0.0 && most >= least && (1..=1000).contains(&count)) {
        return Err(reader.fault(format!("{place}: min_ar, max_ar and num_ar_buckets do not make a range")));
    }
    let share = |i: u32| f64::from(i) / f64::from((count - 1).max(1));
    Ok((0..count).map(|i| least * (most / least).powf(share(i))).collect())
}

fn items(reader: &mut Reader, place: &str, set: &str, section: &Section) -> Result<Vec<Item>> {
    let folder = reader.locate(&section.path);
    let repeats = reader.repeats(place, section.num_repeats)?;
    let listed = listed_captions(reader, &folder)?;
    let (mut items, mut empty) = (Vec::new(), Vec::new());
    for file in files_of(reader, &folder)? {
        if !matches!(media_at(&file)?, Some(Media::Video(_) | Media::Animation(_) | Media::Still(_))) {
            continue;
        }
        let name = name_of(&file);
        let captions = match &listed {
            Some(listed) => listed.get(&name).cloned().unwrap_or_default(),
            None => caption_of(&file.with_extension("txt"))?.into_iter().collect(),
        };
        let mut captions: Vec<String> = captions.into_iter().filter(|caption| !caption.is_empty()).collect();
        if captions.is_empty() {
            empty.push(name.clone());
            if section.skip_empty_caption {
                continue;
            }
            captions.push(String::new());
        }
        // Each of several captions becomes an item of its own.
        for (i, caption) in captions.iter().enumerate() {
            let id = if captions.len() > 1 { format!("{name}#{i}") } else { name.clone() };
            let caption = format!("{}{caption}", section.caption_prefix);
            items.push(reader.item(&file, set, &id, &[caption], repeats)?);
        }
    }
    if !empty.is_empty() {
        let done = if section.skip_empty_caption { "left out" } else { "trained without one" };
        reader.note(format!(
            "{place}: {} clips have no caption and are {done}, as there: {}",
            empty.len(),
            empty.join(", ")
        ));
    }
    match items.is_empty() {
        true => Err(reader.fault(format!("{place}: no clips with captions in {}", folder.display()))),
        false => Ok(items),
    }
}

/// The captions of `captions.json`, where the folder has one.
fn listed_captions(reader: &Reader, folder: &Path) -> Result<Option<BTreeMap<String, Vec<String>>>> {
    let path = folder.join(CAPTIONS);
    if !path.is_file() {
        return Ok(None);
    }
    let bytes = std::fs::read(&path).map_err(DataError::io("read", &path))?;
    let listed = serde_json::from_slice(&bytes);
    listed.map(Some).map_err(|error| {
        reader.fault(format!("{}: names must have lists of captions ({error})", path.display()))
    })
}
