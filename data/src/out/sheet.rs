//! PNGs that show films at one glance: contact sheets and tables.

use std::io::Cursor;
use std::path::Path;

use image::imageops::{self, FilterType};
use image::{ImageFormat, Rgb, RgbImage};

use super::{Film, letters, save};
use crate::error::{DataError, Result};

/// How a contact sheet looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SheetStyle {
    /// Frames a row, evenly spaced from the first to the last. Shorter films leave cells empty.
    pub columns: u32,
    /// Width of a cell in pixels; frames are scaled to it.
    pub cell_width: u32,
    /// Pixels between cells and around them.
    pub gap: u32,
}

impl Default for SheetStyle {
    /// Six frames of 208 pixels with a gap of 4: 1276 pixels, which fits a page.
    fn default() -> Self {
        Self { columns: 6, cell_width: 208, gap: 4 }
    }
}

const PAPER: Rgb<u8> = Rgb([24, 24, 27]);

/// A row of a contact sheet.
#[derive(Debug, Clone, Copy)]
pub struct SheetRow<'a> {
    /// The text above it; none if empty.
    pub title: &'a str,
    /// The film.
    pub film: &'a Film,
}

/// Writes a grid with one row for each film, in the order given.
///
/// # Errors
/// [`DataError::Encode`] if there is no film, [`DataError::Io`] if it cannot be written.
pub fn contact_sheet(path: &Path, films: &[Film], style: SheetStyle) -> Result<()> {
    let rows: Vec<SheetRow> = films.iter().map(|film| SheetRow { title: "", film }).collect();
    titled_sheet(path, &rows, style)
}

/// [`contact_sheet`] with a title above each row.
///
/// # Errors
/// As there.
pub fn titled_sheet(path: &Path, rows: &[SheetRow], style: SheetStyle) -> Result<()> {
    let (columns, cell, gap) =
        (style.columns.clamp(1, 64), style.cell_width.clamp(8, 4096), style.gap.min(256));
    let cells = rows.iter().map(|row| {
        let frames = evenly(row.film.len(), columns as usize).into_iter();
        Ok((row.title, frames.map(|index| scaled(path, row.film, index, cell)).collect::<Result<_>>()?))
    });
    let sheet = Grid { columns, cell, gap }.draw(path, &cells.collect::<Result<Vec<_>>>()?)?;
    write_png(path, &sheet)
}

/// Writes a table of the first frames of films with one row for each of `rows`: its title, and its films from left to right;
/// `heads` are the texts above the columns. All pictures are scaled to `cell_width` pixels.
///
/// # Errors
/// As [`contact_sheet`].
pub fn picture_table(
    path: &Path,
    heads: &[String],
    rows: &[(String, Vec<Option<Film>>)],
    cell_width: u32,
) -> Result<()> {
    let columns = heads.len().max(1) as u32;
    let cell = cell_width.clamp(8, 4096);
    let head = |text: &String| {
        let mut strip = RgbImage::from_pixel(cell, letters::height(cell * columns), PAPER);
        letters::write(&mut strip, (0, 0), letters::scale(cell * columns), text);
        strip
    };
    let mut drawn: Vec<(&str, Vec<RgbImage>)> = vec![("", heads.iter().map(head).collect())];
    for (title, pictures) in rows {
        let cells = pictures.iter().map(|picture| match picture {
            Some(film) => scaled(path, film, 0, cell),
            None => Ok(RgbImage::from_pixel(cell, 1, PAPER)),
        });
        drawn.push((title, cells.collect::<Result<_>>()?));
    }
    write_png(path, &Grid { columns, cell, gap: 4 }.draw(path, &drawn)?)
}

/// The frame `index` of a film, `cell` pixels wide.
fn scaled(path: &Path, film: &Film, index: usize, cell: u32) -> Result<RgbImage> {
    let height = (u64::from(film.height()) * u64::from(cell) / u64::from(film.width())).max(1);
    let height =
        u32::try_from(height).map_err(|_| DataError::encode(path, "a film is too tall for a sheet"))?;
    let frame = film.frames().nth(index).map(<[u8]>::to_vec);
    let picture = frame.and_then(|rgb| RgbImage::from_raw(film.width(), film.height(), rgb));
    let picture = picture.ok_or_else(|| DataError::encode(path, "a frame is incomplete"))?;
    Ok(imageops::resize(&picture, cell, height, FilterType::Lanczos3))
}

/// Cells of one width in rows of their own heights.
#[derive(Clone, Copy)]
struct Grid {
    columns: u32,
    cell: u32,
    gap: u32,
}

impl Grid {
    fn draw(self, path: &Path, rows: &[(&str, Vec<RgbImage>)]) -> Result<RgbImage> {
        let Self { columns, cell, gap } = self;
        if rows.is_empty() {
            return Err(DataError::encode(path, "there are no clips to show"));
        }
        let width = columns * (cell + gap) + gap;
        let title_height = |title: &str| if title.is_empty() { 0 } else { letters::height(width) };
        let picture_height = |cells: &[RgbImage]| cells.iter().map(RgbImage::height).max().unwrap_or(1);
        let height = rows.iter().try_fold(gap, |height: u32, (title, cells)| {
            height.checked_add(title_height(title))?.checked_add(picture_height(cells))?.checked_add(gap)
        });
        let fits = |height: &u32| u64::from(*height) * u64::from(width) <= crate::decode::MAX_PIXELS;
        let height =
            height.filter(fits).ok_or_else(|| DataError::encode(path, "too many films for one sheet"))?;
        let mut sheet = RgbImage::from_pixel(width, height, PAPER);
        let mut top = gap;
        for (title, cells) in rows {
            letters::write(&mut sheet, (gap, top), letters::scale(width), title);
            top += title_height(title);
            for (column, picture) in cells.iter().enumerate() {
                let left = gap + column as u32 * (cell + gap);
                imageops::replace(&mut sheet, picture, i64::from(left), i64::from(top));
            }
            top += picture_height(cells) + gap;
        }
        Ok(sheet)
    }
}

fn write_png(path: &Path, sheet: &RgbImage) -> Result<()> {
    let mut bytes = Cursor::new(Vec::new());
    sheet.write_to(&mut bytes, ImageFormat::Png).map_err(|error| DataError::encode(path, error))?;
    save(path, bytes.get_ref())
}

/// At most `wanted` of `count` indices, from first to last.
fn evenly(count: usize, wanted: usize) -> Vec<usize> {
    if count <= wanted || wanted == 1 {
        return (0..count.min(wanted)).collect();
    }
    (0..wanted).map(|index| (index * (count - 1) + (wanted - 1) / 2) / (wanted - 1)).collect()
}
