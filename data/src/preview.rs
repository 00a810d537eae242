//! The exact clips that will be trained, as files to look at.

use std::path::{Path, PathBuf};

use crate::audio::{SPEECH_RATE, read_speech};
use crate::bucket::{Bucket, Window};
use crate::clip::Clip;
use crate::companions::Accompanying;
use crate::dataset::Dataset;
use crate::error::{DataError, Result};
use crate::key::Key;
use crate::out::{Film, SheetStyle, contact_sheet, save, write_mp4};
use crate::waveform::waveform;

/// Writes every training item of `data` to `folder`: an MP4 (a PNG for a still) and a text file with its caption, as trained. A
/// control clip, a mask, a face clip and the waveform of speech are shown to the right of their clip.
/// `progress(done, total)` is called before each item and once at the end. Gives the files, in training-item order.
///
/// # Errors
/// Whatever is wrong with a clip, or with the folder.
pub fn write_preview(
    folder: &Path,
    data: &Dataset,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<PathBuf>> {
    std::fs::create_dir_all(folder).map_err(DataError::io("create the folder", folder))?;
    let total = data.windows.len();
    let mut written = Vec::with_capacity(total);
    for source in 0..data.sources.len() {
        let control = data.companion_clips(source, Accompanying::Control, &data.windows)?;
        let mask = data.companion_clips(source, Accompanying::Mask, &data.windows)?;
        // As tall as the clip that they stand beside.
        let square = |window: &Window| Window {
            bucket: Bucket { width: window.bucket.height, ..window.bucket },
            ..*window
        };
        let squares: Vec<Window> = data.windows.iter().map(square).collect();
        let faces = data.companion_clips(source, Accompanying::Faces, &squares)?;
        let speech = data.sources[source].companions.speech.as_ref();
        let sound = speech.map(|track| read_speech(&track.path)).transpose()?;
        let mut companions = [control, mask, faces];
        for clip in data.clips(source, &data.windows)? {
            progress(written.len(), total);
            let (mut shown, clip) = (Vec::new(), clip?);
            for companion in companions.iter_mut().flatten() {
                shown.extend(companion.next().transpose()?);
            }
            if let Some(samples) = &sound {
                let rate = f64::from(SPEECH_RATE);
                let first = (clip.start as f64 / data.fps * rate) as usize;
                let own = samples.get(first..).unwrap_or_default();
                shown.push(waveform(own, rate, &clip, data.fps));
            }
            written.push(write_clip(folder, clip, &shown, data.fps)?);
        }
    }
    progress(total, total);
    Ok(written)
}

/// Bytes of a clip's name that a preview takes over: file systems allow 255 in all.
const NAME_BYTES: usize = 200;

/// A name that is not too long and still unique.
fn shortened(name: &str) -> String {
    if name.len() <= NAME_BYTES {
        return name.to_owned();
    }
    let digest = Key::of(&[name]).to_string();
    format!("{}-{}", &name[..name.floor_char_boundary(NAME_BYTES)], &digest[..8])
}

/// `clip` with `others` of the same height to its right.
fn side_by_side(clip: Clip, others: &[Clip]) -> Clip {
    if others.is_empty() {
        return clip;
    }
    let stride = |one: &Clip| one.bucket.width as usize * 3;
    let all = || std::iter::once(&clip).chain(others);
    let row = |row: usize| all().flat_map(move |one| &one.pixels[row * stride(one)..(row + 1) * stride(one)]);
    let pixels = (0..clip.pixels.len() / stride(&clip)).flat_map(row).copied().collect();
    let width = all().map(|one| one.bucket.width).sum();
    Clip { pixels, bucket: Bucket { width, ..clip.bucket }, ..clip.clone() }
}

fn write_clip(folder: &Path, clip: Clip, others: &[Clip], fps: f64) -> Result<PathBuf> {
    let flat: String =
        clip.source.chars().map(|letter| if "/\\:".contains(letter) { '_' } else { letter }).collect();
    let stem = format!("{}_{:05}_{}", shortened(&flat), clip.start, clip.bucket);
    let caption = clip.caption.clone();
    let still = clip.bucket.frames == 1;
    let film = Film::from(side_by_side(clip, others));
    let path = folder.join(format!("{stem}.{}", if still { "png" } else { "mp4" }));
    if still {
        let whole = SheetStyle { columns: 1, cell_width: film.width(), gap: 0 };
        contact_sheet(&path, std::slice::from_ref(&film), whole)?;
    } else {
        write_mp4(&path, &film, fps)?;
    }
    let beside = path.with_extension("txt");
    save(&beside, caption.as_bytes())?;
    Ok(path)
}
