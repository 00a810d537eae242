//! Lists of clips with captions: DiffSynth-Studio's `metadata.csv`, and JSONL files of DiffSynth-Studio or musubi-tuner.
//!
//! They have no sizes and lengths, which are taken from the recipe.

use super::{Reader, Set, Short};
use crate::error::Result;
use crate::metadata;

/// Reads the list.
pub(super) fn read(reader: &mut Reader) -> Result<Set> {
    let rows = metadata::read(reader.path, reader.keys)?;
    if rows.is_empty() {
        return Err(reader.fault("lists no clip"));
    }
    let item = |row: &metadata::Row| {
        let repeats = reader.recipe.repeats_of(&row.file);
        reader.item_of_row(row, "", repeats, |file| reader.locate(file))
    };
    let items = rows.iter().map(item).collect::<Result<Vec<_>>>()?;
    let mut config = reader.config();
    let columns = metadata::other_columns(reader.path, reader.keys)?;
    reader.note(format!("{} clips; sizes, lengths and extraction are the recipe's", items.len()));
    let with = |key: &&'static str| {
        rows.iter().filter(|row| row.companions.iter().any(|(own, _)| own == key)).count()
    };
    let read: Vec<String> = reader
        .keys
        .iter()
        .map(|key| (key, with(key)))
        .filter(|(_, count)| *count > 0)
        .map(|(key, count)| format!("data.{key} of {count}"))
        .collect();
    if !read.is_empty() {
        reader.note(format!("columns are read as {}", read.join(", ")));
    }
    reader.ignored("columns", &columns);
    if config.source_fps.is_none() {
        // Every frame is used; the file's own rate is ignored.
        config.source_fps = Some(reader.fps);
        reader.note(format!(
            "every frame counts as one of {} a second, as in DiffSynth-Studio; set data.source_fps to change that",
            reader.fps
        ));
    }
    Ok(Set { config, items, skipped: Vec::new(), short: Short::Refuse, set: 0 })
}
