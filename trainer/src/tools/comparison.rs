//! Clips of the same prompts by several adapters, side by side: a table of pictures, a film, and a page.

use std::fs;
use std::path::{Path, PathBuf};

use data::{Bucket, Clip, Mp4Writer, read_clip};
use serde_json::json;

use crate::error::{Error, Result};
use crate::report::html::{escaped, filled};

const TEMPLATE: &str = include_str!("comparison.html");
const TABLE: &str = "grid.png";
const FILM: &str = "grid.mp4";
const PAGE: &str = "index.html";
/// Width of a picture of the table.
const CELL: u32 = 240;
/// The film is at most this wide and high, as players and H.264 take it.
const WIDEST: [u32; 2] = [3840, 2160];

/// How clips of a column were made.
#[derive(Debug, Clone, PartialEq)]
pub struct Column {
    /// What stands above it.
    pub label: String,
    /// Its folder, below that of all.
    pub folder: String,
    /// The number of the adapter; none for the base alone.
    pub adapter: Option<usize>,
    /// What it is multiplied by; 0 of the base.
    pub strength: f64,
}

/// What is compared: for each column and prompt there is a clip `<folder>/<name>.mp4`.
#[derive(Debug, Clone, Copy)]
pub struct Comparison<'a> {
    /// The base first, then each adapter at each strength.
    pub columns: &'a [Column],
    /// The prompts.
    pub prompts: &'a [String],
    /// Names of the clips, one for each prompt.
    pub clips: &'a [String],
    /// Frames a second of the clips.
    pub fps: f64,
}

/// What [`Comparison::write`] writes into `folder`.
pub fn files(folder: &Path) -> [PathBuf; 3] {
    [TABLE, FILM, PAGE].map(|name| folder.join(name))
}

impl Comparison<'_> {
    /// Writes the table of middle frames, the film of all clips, and the page into `folder`.
    ///
    /// # Errors
    /// Clips that cannot be read, more of them than fit a picture, and files that cannot be written.
    pub fn write(&self, folder: &Path) -> Result<Vec<PathBuf>> {
        let [table, film, page] = files(folder);
        let heads: Vec<String> = self.columns.iter().map(|column| column.label.clone()).collect();
        let mut rows = Vec::new();
        for (prompt, clip) in self.prompts.iter().zip(self.clips) {
            let middle = |column: &Column| Ok(Some(data::middle_frame(&path(folder, column, clip))?));
            rows.push((prompt.clone(), self.columns.iter().map(middle).collect::<Result<_>>()?));
        }
        data::picture_table(&table, &heads, &rows, CELL)?;
        self.write_film(&film, folder)?;
        fs::write(&page, self.page()?).map_err(|source| Error::Io {
            action: "write",
            path: page.clone(),
            source,
        })?;
        Ok(vec![table, film, page])
    }

    /// All clips at once: a row for each prompt, as small as they must be. A clip that is shorter than others stands still at its end.
    fn write_film(&self, film: &Path, folder: &Path) -> Result<()> {
        let first = self.columns.first().zip(self.clips.first()).ok_or_else(nothing)?;
        let size = data::middle_frame(&path(folder, first.0, first.1))?;
        let count = [self.columns.len() as u32, self.clips.len() as u32];
        let share = [0, 1].map(|axis| {
            f64::from(WIDEST[axis] / count[axis]) / f64::from([size.width(), size.height()][axis])
        });
        let scale = share[0].min(share[1]).min(1.0);
        // H.264 has no odd sides.
        let even = |side: u32| ((f64::from(side) * scale) as u32 & !1).max(2);
        let (width, height) = (even(size.width()), even(size.height()));
        let mut cells = Vec::new();
        for clip in self.clips {
            for column in self.columns {
                cells.push(self.cell(&path(folder, column, clip), (width, height))?);
            }
        }
        let frames = cells.iter().map(|cell| cell.bucket.frames as usize).max().unwrap_or(1);
        let (line, lines) = (3 * width as usize, height as usize);
        let whole = line * self.columns.len();
        let mut writer = Mp4Writer::new(film, width * count[0], height * count[1], self.fps)?;
        let mut rgb = vec![0; whole * lines * self.clips.len()];
        for frame in 0..frames {
            for (index, cell) in cells.iter().enumerate() {
                let (left, top) = (index % self.columns.len() * line, index / self.columns.len() * lines);
                let last = (cell.bucket.frames as usize).saturating_sub(1);
                let Some(picture) = cell.frames().nth(frame.min(last)) else { continue };
                for (number, pixels) in picture.chunks_exact(line).enumerate() {
                    let at = (top + number) * whole + left;
                    rgb[at..at + line].copy_from_slice(pixels);
                }
            }
            writer.push(&rgb)?;
        }
        Ok(writer.finish(None)?)
    }

    fn cell(&self, path: &Path, (width, height): (u32, u32)) -> Result<Clip> {
        let frames = data::clip_frames(path, self.fps)?.unwrap_or(1) as u32;
        Ok(read_clip(path, self.fps, Bucket { width, height, frames })?)
    }

    fn page(&self) -> Result<String> {
        let strengths =
            self.columns.iter().filter(|column| column.adapter == Some(0)).map(|column| column.strength);
        let strengths: Vec<f64> = strengths.collect();
        let mut rows = String::new();
        for (prompt, clip) in self.prompts.iter().zip(self.clips) {
            rows.push_str(&format!("<section><h2>{}</h2>\n<div class=\"row\">\n", escaped(prompt)));
            for column in self.columns {
                let source = format!("{}/{clip}.mp4", column.folder);
                let strength = column
                    .adapter
                    .map_or_else(String::new, |_| format!(" data-strength=\"{}\"", column.strength));
                rows.push_str(&format!(
                    "<figure{strength}><video src=\"{}\" muted loop playsinline preload=\"auto\"></video><figcaption>{}</figcaption></figure>\n",
                    escaped(&source),
                    escaped(&column.label)
                ));
            }
            rows.push_str("</div></section>\n");
        }
        let strengths = serde_json::to_string(&json!(strengths))
            .map_err(|error| Error::PlanText { why: error.to_string() })?;
        Ok(filled(TEMPLATE, &[("rows", rows), ("strengths", strengths)]))
    }
}

fn path(folder: &Path, column: &Column, clip: &str) -> PathBuf {
    folder.join(&column.folder).join(format!("{clip}.mp4"))
}

fn nothing() -> Error {
    kernels::Error::msg("there is no clip to compare").into()
}
