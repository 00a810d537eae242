//! Dataset files of other trainers, read unchanged: musubi-tuner's TOML and JSONL, diffusion-pipe's TOML, DiffSynth-Studio's
//! CSV and JSONL.
//!
//! Each becomes sets of listed clips with sizes, lengths and extraction of their own. What was read, and what has no
//! counterpart here, is reported in notes.

mod diffusion_pipe;
mod musubi;
mod table;

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use crate::config::{DataConfig, MAX_REPEATS, SizeMultiple, Takes};
use crate::error::{DataError, Result};
use crate::media::Media;
use crate::metadata::Row;
use crate::named::{CONTROL, Named};
use crate::scan::{Item, caption_of, item_of, media_at};

/// Clips with settings in common.
#[derive(Debug, Clone)]
pub(crate) struct Set {
    /// Sizes, lengths, extraction and rates; its folders are not used.
    pub config: DataConfig,
    /// The clips.
    pub items: Vec<Item>,
    /// Those of its folders that are left out by name.
    pub skipped: Vec<Media>,
    /// What happens to clips that are shorter than every length.
    pub short: Short,
    /// Which of the recipe's sets they belong to.
    pub set: usize,
}

/// What happens to clips that are shorter than every length of their set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Short {
    /// They are an error, all named at once.
    Refuse,
    /// They are left out and reported.
    LeaveOut,
}

/// A dataset file, read.
#[derive(Debug)]
pub(crate) struct Imported {
    pub sets: Vec<Set>,
    /// What was read, and what has no counterpart.
    pub notes: Vec<String>,
}

/// The context of all readers.
struct Reader<'a> {
    /// The dataset file.
    path: &'a Path,
    /// The recipe's `[data]`.
    recipe: &'a DataConfig,
    multiple: SizeMultiple,
    /// Target frames a second.
    fps: f64,
    notes: Vec<String>,
    /// Keys of the companions that the model reads, of those that the file names.
    keys: &'a [&'static str],
    /// The name of the recipe's set, in front of the names of its clips; empty where there are no sets.
    set: &'a str,
}

/// Reads the dataset file at `path`, as the recipe's set `set`, for a model that takes this; its kind is recognised by its extension and its tables.
///
/// # Errors
/// If the file is none of these, names clips that do not exist, or has invalid values.
pub(crate) fn read(
    path: &Path,
    recipe: &DataConfig,
    &Takes { multiple, fps, companions: keys }: &Takes,
    set: &str,
) -> Result<Imported> {
    let mut reader =
        Reader { path, recipe, multiple, fps: recipe.fps.unwrap_or(fps), notes: Vec::new(), keys, set };
    let sets = match path.extension().and_then(|extension| extension.to_str()) {
        Some("toml") => {
            let text = std::fs::read_to_string(path).map_err(DataError::io("read", path))?;
            let table: Table = toml::from_str(&text).map_err(|error| reader.fault(error.to_string()))?;
            match (table.contains_key("datasets"), table.contains_key("directory")) {
                (true, false) => musubi::read(&mut reader, table)?,
                (false, true) => diffusion_pipe::read(&mut reader, table)?,
                _ => {
                    return Err(reader.fault(
                        "has neither [[datasets]] (musubi-tuner) nor [[directory]] (diffusion-pipe), or both: name the dataset \
                         file, not the training config",
                    ));
                }
            }
        }
        Some("csv" | "jsonl") => vec![table::read(&mut reader)?],
        _ => {
            return Err(reader.fault(
                "is not a .toml, .csv or .jsonl file: those are the dataset files that can be imported",
            ));
        }
    };
    Ok(Imported { sets, notes: reader.notes })
}

impl Reader<'_> {
    fn fault(&self, reason: impl Into<String>) -> DataError {
        DataError::Import { path: self.path.to_owned(), reason: reason.into() }
    }

    fn note(&mut self, note: String) {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.notes.push(format!("{name}: {note}"));
    }

    /// Reports keys that have no meaning here.
    fn ignored(&mut self, place: &str, keys: &[String]) {
        if !keys.is_empty() {
            self.note(format!("{place}: no counterpart for {}; not used", keys.join(", ")));
        }
    }

    /// A path in the file: relative to its own folder, or if that does not exist, to the current one, as in those trainers.
    fn locate(&self, named: &str) -> PathBuf {
        let named = Path::new(named);
        let beside = self.path.parent().unwrap_or(Path::new("")).join(named);
        if !beside.exists() && named.exists() { named.to_owned() } else { beside }
    }

    /// The settings of a set: the recipe's, for clips that are listed.
    fn config(&self) -> DataConfig {
        DataConfig { folder: Vec::new(), import: Some(self.path.to_owned()), ..self.recipe.clone() }
    }

    /// A clip, its caption prefixed with `prefix`. Several sets may have the same file, so its name is prefixed with `set`.
    fn item(&self, file: &Path, set: &str, name: &str, captions: &[String], repeats: u32) -> Result<Item> {
        let media = media_at(file)?.ok_or_else(|| {
            self.fault(format!("names {}, which is not a clip or does not exist", file.display()))
        })?;
        let places = [self.set, set, name];
        let id = places.into_iter().filter(|place| !place.is_empty()).collect::<Vec<_>>().join("/");
        let item = item_of(self.recipe, (&id, media), captions, repeats);
        item.map_err(|reason| self.fault(format!("{}: {reason}", file.display())))
    }

    /// [`Self::item`] of a row of a list, whose files are where `place` says.
    fn item_of_row(
        &self,
        row: &Row,
        set: &str,
        repeats: u32,
        place: impl Fn(&str) -> PathBuf,
    ) -> Result<Item> {
        let item = self.item(&place(&row.file), set, &row.file, &row.captions, repeats)?;
        Ok(Item { named: Named::of(&row.companions, place), ..item })
    }

    /// The settings `config` with the folder of control clips that the file names, where the model reads them.
    fn with_control(&self, config: DataConfig, folder: Option<&String>) -> DataConfig {
        match folder.filter(|_| self.keys.contains(&CONTROL)) {
            Some(folder) => DataConfig { control: Some(self.locate(folder)), ..config },
            None => config,
        }
    }

    /// Keys of `table` that are not `known`; `control`, the key of control clips, is known where the model reads them.
    fn unknown(&self, table: &Table, known: &[&str], control: &str) -> Vec<String> {
        let reads_control = self.keys.contains(&CONTROL);
        let mut keys = unknown(table, known);
        keys.retain(|key| key != control || !reads_control);
        keys
    }

    /// Repeats as a whole number of at least one.
    fn repeats(&self, place: &str, repeats: Option<f64>) -> Result<u32> {
        match repeats.unwrap_or(1.0) {
            times if times >= 1.0 && times.fract() == 0.0 && times <= f64::from(MAX_REPEATS) => {
                Ok(times as u32)
            }
            times => Err(self.fault(format!(
                "{place}: num_repeats = {times}; only whole numbers from 1 to {MAX_REPEATS} work here"
            ))),
        }
    }

    /// Lengths in frames, each cut to 4n+1.
    fn lengths(&self, place: &str, frames: &[i64]) -> Result<Vec<u32>> {
        let mut lengths = Vec::new();
        for &frames in frames {
            let length = u32::try_from(frames).ok().filter(|frames| *frames > 0);
            let length =
                length.ok_or_else(|| self.fault(format!("{place}: {frames} is not a number of frames")))?;
            lengths.push((length - 1) / 4 * 4 + 1);
        }
        lengths.sort_unstable();
        lengths.dedup();
        Ok(lengths)
    }
}

/// The files of a folder itself, by name; not of folders below.
fn files_of(reader: &Reader, folder: &Path) -> Result<Vec<PathBuf>> {
    let listed = std::fs::read_dir(folder).map_err(|error| {
        reader.fault(format!("names the folder {}, which cannot be read ({error})", folder.display()))
    })?;
    let mut files = Vec::new();
    for entry in listed {
        files.push(entry.map_err(DataError::io("list", folder))?.path());
    }
    files.sort();
    Ok(files)
}

/// `file` as its name in the set.
fn name_of(file: &Path) -> String {
    file.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A resolution as it is written: a side of a square, or width and height.
fn resolution(value: &Value) -> Option<[f64; 2]> {
    let number =
        |value: &Value| value.as_float().or(value.as_integer().map(|n| n as f64)).filter(|n| *n >= 1.0);
    match value.as_array().map(Vec::as_slice) {
        Some([width, height]) => Some([number(width)?, number(height)?]),
        Some([side]) => number(side).map(|side| [side, side]),
        Some(_) => None,
        None => number(value).map(|side| [side, side]),
    }
}

/// What is left of a table after its known keys were taken out.
fn unknown(table: &Table, known: &[&str]) -> Vec<String> {
    table.keys().filter(|key| !known.contains(&key.as_str())).cloned().collect()
}

/// Keeps the first of equal sizes.
fn distinct(sizes: impl IntoIterator<Item = [u32; 2]>) -> Vec<[u32; 2]> {
    let mut kept: Vec<[u32; 2]> = Vec::new();
    for size in sizes {
        if !kept.contains(&size) {
            kept.push(size);
        }
    }
    kept
}
