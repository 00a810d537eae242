//! A PNG that shows a film, or several, at one glance.

use std::io::Cursor;
use std::path::Path;

use image::imageops::{self, FilterType};
use image::{ImageFormat, Rgb, RgbImage};

use super::{Film, save};
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

/// Writes a grid with one row for each film, in the order given.
///
/// # Errors
/// [`DataError::Encode`] when there is no film, [`DataError::Io`] when it cannot be written.
pub fn contact_sheet(path: &Path, films: &[Film], style: SheetStyle) -> Result<()> {
    if films.is_empty() {
        return Err(DataError::encode(path, "there is no film to show"));
    }
    let (columns, cell, gap) =
        (style.columns.clamp(1, 64), style.cell_width.clamp(8, 4096), style.gap.min(256));
    let row_height =
        |film: &Film| (u64::from(film.height()) * u64::from(cell) / u64::from(film.width())).max(1) as u32;
    let width = columns * (cell + gap) + gap;
    let height =
        films.iter().try_fold(gap, |height, film| height.checked_add(row_height(film))?.checked_add(gap));
    let height = height.filter(|&height| u64::from(height) * u64::from(width) <= crate::decode::MAX_PIXELS);
    let height = height.ok_or_else(|| DataError::encode(path, "too many films for one sheet"))?;
    let mut sheet = RgbImage::from_pixel(width, height, PAPER);
    let mut top = gap;
    for film in films {
        for (column, index) in evenly(film.len(), columns as usize).into_iter().enumerate() {
            let frame = film.frames().nth(index).map(<[u8]>::to_vec);
            let picture = frame.and_then(|rgb| RgbImage::from_raw(film.width(), film.height(), rgb));
            let picture = picture.ok_or_else(|| DataError::encode(path, "a frame is incomplete"))?;
            let scaled = imageops::resize(&picture, cell, row_height(film), FilterType::Lanczos3);
            imageops::replace(
                &mut sheet,
                &scaled,
                i64::from(gap + column as u32 * (cell + gap)),
                i64::from(top),
            );
        }
        top += row_height(film) + gap;
    }
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
