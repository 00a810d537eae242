//! Where the captions of clips are, and where those that are missing would be.

use std::path::PathBuf;

use crate::captions::CaptionSource;
use crate::config::{DataConfig, MaskPlace, Stills};
use crate::error::{DataError, Result};
use crate::media::Media;
use crate::named::COMPANION_KEYS;
use crate::scan::{Captions, Listing, beside};
use crate::skips::Skips;

/// A clip, and the text file of its caption.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptionFile {
    /// The clip's name, as [`crate::Item::id`].
    pub id: String,
    /// Where its pixels are.
    pub media: Media,
    /// Its text file, which need not be there.
    pub path: PathBuf,
    /// Whether it has a caption.
    pub has: HasCaption,
}

/// Whether a clip has a caption.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HasCaption {
    /// It has none.
    No,
    /// Its text file is there, even if it is empty.
    InTextFile,
    /// In metadata or in a JSON file.
    Elsewhere,
}

/// The clips of the configured folders, without those that are left out, each with its text file.
///
/// # Errors
/// Folders that cannot be listed, captions that cannot be read, and data whose captions are not in text files: dataset files, and
/// `captions = "metadata"`.
pub fn caption_files(config: &DataConfig) -> Result<Vec<CaptionFile>> {
    config.check_source()?;
    let (mut files, mut skips) = (Vec::new(), Skips::default());
    for (own, facts) in config.expanded()? {
        let refuse = |key, reason: &str| Err(DataError::Config { key, reason: reason.into() });
        if own.import.is_some() {
            return refuse(
                "import",
                "has captions of its own; they are only written beside the clips of folders",
            );
        }
        if own.captions.source == CaptionSource::Metadata {
            return refuse(
                "captions",
                "are read from metadata alone, so none is written: set \"auto\" or \"txt\"",
            );
        }
        if own.folder.iter().any(|folder| folder.extension().is_some_and(|ending| ending == "tar")) {
            return refuse("folder", "has tar files; captions are only written beside the clips of folders");
        }
        for folder in &own.folder {
            let mut listing = Listing::of(folder)?;
            if own.loss_masks.as_ref().is_some_and(|masks| masks.from == MaskPlace::Beside) {
                listing.leave_out_masks(folder)?;
            }
            let captions = Captions::read(folder, &mut listing, &own.captions, &COMPANION_KEYS)?;
            for (relative, media) in listing.clips {
                let id = own.id_of(folder, &relative, &facts.name);
                let is_left_out = own.stills == Stills::Skip && matches!(media, Media::Still(_));
                if is_left_out || skips.take(&own, &id, &facts.name) {
                    continue;
                }
                let path = beside(&media, "txt");
                let has = match (captions.is_in_metadata(&relative), path.exists()) {
                    (false, true) => HasCaption::InTextFile,
                    (true, _) => HasCaption::Elsewhere,
                    (false, false) if beside(&media, "json").exists() => HasCaption::Elsewhere,
                    (false, false) => HasCaption::No,
                };
                files.push(CaptionFile { id, media, path, has });
            }
        }
    }
    skips.check(config, &|pattern| pattern.contains('#'), files.iter().map(|file| file.id.as_str()))?;
    files.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(files)
}
