//! Captions kept in one file per folder: `metadata.jsonl` or `metadata.csv`.
//!
//! Column names of the common layouts are all understood: Hugging Face (`file_name`, `text`), DiffSynth (`video`, `prompt`) and
//! musubi (`video_path`, `caption`), and columns of files that accompany the clip. Other columns are ignored.

use std::path::Path;

use crate::error::{DataError, Result};
use crate::named;

/// Names of the column that holds the clip's path, relative to the metadata file.
pub const FILE_COLUMNS: [&str; 8] =
    ["file_name", "video", "image", "path", "file", "video_path", "image_path", "file_path"];
/// Names of the column that holds the caption.
pub const CAPTION_COLUMNS: [&str; 3] = ["caption", "prompt", "text"];

/// One clip of a metadata file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Line counted from 1.
    pub line: usize,
    /// Path as written, with forward slashes and no leading `./`.
    pub file: String,
    /// The captions, trimmed: one, or those of a list.
    pub captions: Vec<String>,
    /// Files that accompany the clip, as they are written, each with the key of `[data]` whose meaning it has.
    pub companions: Vec<(&'static str, String)>,
}

/// Reads `metadata.jsonl` or `metadata.csv`, by the extension of `path`. Of columns of companions those are read that have the
/// meaning of one of `keys`.
///
/// # Errors
/// [`DataError::Metadata`] naming the line; [`DataError::Io`] when the file cannot be read.
pub fn read(path: &Path, keys: &[&'static str]) -> Result<Vec<Row>> {
    crate::decode::check_regular(path)?;
    let bytes = std::fs::read(path).map_err(DataError::io("read", path))?;
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        let line = bytes[..error.valid_up_to()].iter().filter(|&&byte| byte == b'\n').count() + 1;
        DataError::Metadata { path: path.to_path_buf(), line, reason: "is not UTF-8 text".into() }
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let rows = if path.extension().is_some_and(|extension| extension == "csv") {
        parse_csv(text, keys)
    } else {
        parse_jsonl(text, keys)
    };
    rows.map_err(|(line, reason)| DataError::Metadata { path: path.to_path_buf(), line, reason })
}

/// Names of the columns of a CSV file that are neither file nor caption nor companions of `keys`; none for JSONL, whose rows may all
/// differ.
///
/// # Errors
/// When the file cannot be read.
pub fn other_columns(path: &Path, keys: &[&'static str]) -> Result<Vec<String>> {
    if path.extension().is_none_or(|extension| extension != "csv") {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(path).map_err(DataError::io("read", path))?;
    let heading = text.trim_start_matches('\u{feff}').lines().next().unwrap_or_default();
    let titles = heading.split(',').map(|title| title.trim().trim_matches('"').to_owned());
    let is_other = |title: &String| {
        !title.is_empty()
            && !FILE_COLUMNS.contains(&title.as_str())
            && !CAPTION_COLUMNS.contains(&title.as_str())
            && !named::columns(keys).any(|(column, _)| column == title)
    };
    Ok(titles.filter(is_other).collect())
}

/// Line and reason of a row that cannot be used.
pub type Fault = (usize, String);

/// Parses one JSON object a line; blank lines are skipped.
///
/// # Errors
/// The first line that is not an object with a file and a caption, and why.
pub fn parse_jsonl(text: &str, keys: &[&'static str]) -> std::result::Result<Vec<Row>, Fault> {
    let mut rows = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let line_number = index + 1;
        let object: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line)
            .map_err(|error| (line_number, format!("is not a JSON object: {error}")))?;
        let field = |names: &[&'static str]| {
            let name = names.iter().find(|&&name| object.contains_key(name));
            let name =
                name.ok_or_else(|| (line_number, format!("has none of the keys {}", names.join(", "))))?;
            Ok((*name, &object[*name]))
        };
        let (name, file) = field(&FILE_COLUMNS)?;
        let file = file.as_str().ok_or_else(|| (line_number, format!("\"{name}\" is not a text")))?;
        let (name, captions) = field(&CAPTION_COLUMNS)?;
        let captions = one_or_several(captions);
        let why = || (line_number, format!("\"{name}\" is neither a text nor a list of texts"));
        let mut row = row(line_number, file, captions.ok_or_else(why)?)?;
        for (column, key) in named::columns(keys) {
            let files = match object.get(column) {
                None | Some(serde_json::Value::Null) => continue,
                Some(files) => one_or_several(files),
            };
            let why = || (line_number, format!("\"{column}\" is neither a text nor a list of texts"));
            files.ok_or_else(why)?.iter().try_for_each(|file| row.add(column, key, file))?;
        }
        rows.push(row);
    }
    Ok(rows)
}

/// Parses comma-separated values with a heading line; quoting as in RFC 4180.
///
/// # Errors
/// The first line that does not fit the heading, and why.
pub fn parse_csv(text: &str, keys: &[&'static str]) -> std::result::Result<Vec<Row>, Fault> {
    let mut records = csv_records(text)?.into_iter();
    let Some((_, heading)) = records.next() else { return Ok(Vec::new()) };
    let column = |names: &[&str]| -> std::result::Result<usize, Fault> {
        let found = names.iter().find_map(|name| heading.iter().position(|title| title.trim() == *name));
        found.ok_or_else(|| (1, format!("the heading has none of the columns {}", names.join(", "))))
    };
    let (file, caption) = (column(&FILE_COLUMNS)?, column(&CAPTION_COLUMNS)?);
    let place = |name: &str| heading.iter().position(|title| title.trim() == name);
    let companions: Vec<_> =
        named::columns(keys).filter_map(|(name, key)| Some((name, key, place(name)?))).collect();
    let mut rows = Vec::new();
    for (line, fields) in records {
        if fields.len() != heading.len() {
            let (found, wanted) = (fields.len(), heading.len());
            return Err((
                line,
                format!(
                    "has {found} fields, but the heading has {wanted}; put captions with commas in \"quotes\""
                ),
            ));
        }
        let mut row = row(line, &fields[file], vec![fields[caption].clone()])?;
        companions.iter().try_for_each(|&(name, key, at)| row.add(name, key, &fields[at]))?;
        rows.push(row);
    }
    Ok(rows)
}

/// A text, or a list of at least one.
pub(crate) fn one_or_several(value: &serde_json::Value) -> Option<Vec<String>> {
    match value {
        serde_json::Value::String(text) => Some(vec![text.clone()]),
        serde_json::Value::Array(list) if !list.is_empty() => {
            list.iter().map(|text| text.as_str().map(str::to_owned)).collect()
        }
        _ => None,
    }
}

impl Row {
    /// Adds a file of the column `column`; an empty one is none.
    fn add(&mut self, column: &str, key: &'static str, file: &str) -> std::result::Result<(), Fault> {
        let file = slashed(file);
        if file.is_empty() {
            return Ok(());
        }
        if key != named::REFERENCES && self.companions.iter().any(|(known, _)| *known == key) {
            return Err((
                self.line,
                format!("names several files as data.{key}, one of them as {column}: keep one"),
            ));
        }
        self.companions.push((key, file));
        Ok(())
    }
}

/// A path as written, with forward slashes and no leading `./`.
fn slashed(file: &str) -> String {
    let file = file.trim().replace('\\', "/");
    file.trim_start_matches("./").trim_end_matches('/').to_string()
}

fn row(line: usize, file: &str, captions: Vec<String>) -> std::result::Result<Row, Fault> {
    let file = slashed(file);
    if file.is_empty() {
        return Err((line, "names no file".into()));
    }
    let captions = captions.into_iter().map(|caption| caption.trim().to_owned()).collect();
    Ok(Row { line, file, captions, companions: Vec::new() })
}

/// Records of a CSV text with the line on which each starts; blank lines are skipped.
fn csv_records(text: &str) -> std::result::Result<Vec<(usize, Vec<String>)>, Fault> {
    let mut records = Vec::new();
    let mut fields = Vec::new();
    let mut field = String::new();
    let (mut line, mut record_line) = (1, 1);
    let mut quoted = false;
    let mut was_quoted = false;
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        line += usize::from(character == '\n');
        match character {
            '"' if quoted && characters.peek() == Some(&'"') => {
                field.push('"');
                characters.next();
            }
            '"' if quoted => quoted = false,
            _ if quoted => field.push(character),
            '"' if field.trim().is_empty() && !was_quoted => {
                field.clear();
                (quoted, was_quoted) = (true, true);
            }
            ',' => {
                fields.push(std::mem::take(&mut field));
                was_quoted = false;
            }
            '\n' => {
                end_record(&mut records, record_line, &mut fields, &mut field, was_quoted);
                (was_quoted, record_line) = (false, line);
            }
            '\r' if characters.peek() == Some(&'\n') => {}
            _ => field.push(character),
        }
    }
    if quoted {
        return Err((record_line, "opens a quote that is never closed".into()));
    }
    end_record(&mut records, record_line, &mut fields, &mut field, was_quoted);
    Ok(records)
}

fn end_record(
    records: &mut Vec<(usize, Vec<String>)>,
    line: usize,
    fields: &mut Vec<String>,
    field: &mut String,
    was_quoted: bool,
) {
    let blank = fields.is_empty() && field.trim().is_empty() && !was_quoted;
    fields.push(std::mem::take(field));
    let record = std::mem::take(fields);
    if !blank {
        records.push((line, record));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn csv_quotes_hold_commas_quotes_and_line_breaks() {
        let text = "id,video,prompt\r\n1,a.mp4,\"a cat, \"\"big\"\"\nand red\"\r\n\r\n2,./b\\c.mp4,plain\n";
        let rows = parse_csv(text, &[]).unwrap();
        assert_eq!(rows[0], row(2, "a.mp4", vec!["a cat, \"big\"\nand red".into()]).unwrap());
        assert_eq!(rows[1], row(5, "b/c.mp4", vec!["plain".into()]).unwrap());
        assert_eq!(parse_csv("video,prompt\na.mp4,one, two\n", &[]).unwrap_err().0, 2);
        assert!(parse_csv("video,prompt\na.mp4,\"open", &[]).unwrap_err().1.contains("never closed"));
    }

    #[test]
    fn jsonl_names_the_line_and_the_missing_key() {
        let fault = parse_jsonl("{\"file_name\": \"a.mp4\", \"text\": \"x\"}\n\n{\"video\": \"b.mp4\"}", &[])
            .unwrap_err();
        assert_eq!(fault.0, 3);
        assert!(fault.1.contains("caption, prompt, text"), "{}", fault.1);
    }
}
