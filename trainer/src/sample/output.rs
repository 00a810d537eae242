//! From latents to files: decoded, written as clips, and a contact sheet of them all.

use std::path::{Path, PathBuf};

use data::{Film, SheetRow, SheetStyle};
use kernels::Tensor;
use models::vae::{Bands, Tiling};

use super::ClipFormat;
use super::pieces::Piece;
use super::writer::{self, Written};
use crate::error::{Error, Result};
use crate::watch::ui::Ui;

/// The picture of a set of clips.
pub const CONTACT_SHEET: &str = "contact-sheet.png";
/// Frames of each clip on a contact sheet.
const SHEET_COLUMNS: u32 = 8;
/// Width of a frame on a contact sheet, in pixels.
const SHEET_CELL: u32 = 192;
/// Letters of a prompt that go into a file name.
const NAME_LENGTH: usize = 40;

/// A sampled clip on its way to its files.
#[derive(Debug, Clone)]
pub struct Sampled {
    /// Name of its files, without their ending.
    pub name: String,
    /// What stands above it on the contact sheet.
    pub title: String,
    /// How it differs from what the model makes in all of its steps, if it does: in the metadata of its files, and on the
    /// contact sheet.
    pub label: Option<String>,
    /// What it is decoded from, in order.
    pub pieces: Vec<Piece>,
}

/// How clips are written.
#[derive(Debug, Clone, Copy)]
pub struct ClipFiles<'a> {
    /// How they are decoded.
    pub tiling: Tiling,
    /// Devices that decode them together, at most, a band of rows each.
    pub bands: usize,
    /// Frames a second.
    pub fps: f64,
    /// Files of each.
    pub formats: &'a [ClipFormat],
}

/// Decodes each clip and writes it as `<folder>/<name>.<format>`, with a contact sheet `<folder>/contact-sheet.png` of all
/// of them. The paths written, the sheet last.
///
/// # Errors
/// Latents that the VAE does not fit, a clip that is not finite, and files that cannot be written.
pub fn write_clips(
    folder: &Path,
    vae: &Bands,
    clips: &[Sampled],
    files: ClipFiles,
    ui: &Ui,
) -> Result<Vec<PathBuf>> {
    let Written { films, files: mut written } = writer::write(folder, vae, clips, files, ui)?;
    let sheet = folder.join(CONTACT_SHEET);
    let cell_width = films.iter().map(Film::width).max().unwrap_or(SHEET_CELL).min(SHEET_CELL);
    let columns = films.iter().map(Film::len).max().unwrap_or(1).min(SHEET_COLUMNS as usize) as u32;
    let titles = clips.iter().map(|Sampled { title, label, .. }| match label {
        Some(label) => format!("{title}  [{label}]"),
        None => title.clone(),
    });
    let titles: Vec<String> = titles.collect();
    let rows = titles.iter().zip(&films).map(|(title, film)| SheetRow { title, film });
    data::titled_sheet(&sheet, &rows.collect::<Vec<_>>(), SheetStyle { columns, cell_width, gap: 2 })?;
    written.push(sheet);
    Ok(written)
}

/// The files that [`write_clips`] writes into `folder` for clips of these names.
pub fn clip_files(folder: &Path, names: &[String], formats: &[ClipFormat]) -> Vec<PathBuf> {
    let clips =
        names.iter().flat_map(|name| formats.iter().map(move |format| clip_file(folder, name, *format)));
    clips.chain([folder.join(CONTACT_SHEET)]).collect()
}

pub(super) fn clip_file(folder: &Path, name: &str, format: ClipFormat) -> PathBuf {
    folder.join(format!("{name}.{}", format.extension()))
}

/// The film of a video [1,3,t,h,w] in -1..1 on the CPU.
pub(super) fn film(video: &Tensor) -> Result<Film> {
    let (_, _, _, height, width) = video.dims5()?;
    let planes: Vec<f32> = video.flatten_all()?.to_vec1()?;
    Film::from_planes(width as u32, height as u32, &planes)
        .ok_or_else(|| Error::Tensor(kernels::Error::msg("the VAE gave no whole frames")))
}

/// A file name for the clip `index` of `prompt`: its number, and the beginning of the prompt in plain letters.
pub fn clip_name(index: usize, prompt: &str) -> String {
    let mut name = format!("{index:02}");
    for word in prompt.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()) {
        if name.len() + word.len() > NAME_LENGTH {
            break;
        }
        name.push('-');
        name.push_str(&word.to_lowercase());
    }
    name
}
