//! What can be wrong with clips, captions, the cache or the output folder; every message says what to do.

use std::io;
use std::path::{Path, PathBuf};

/// Anything that stops data from being read, cached or written.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The operating system refused a file operation.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being attempted, as a verb: "read", "write", "list".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's own reason.
        source: io::Error,
    },
    /// A value of the `[data]` section that cannot work.
    #[error("data.{key}: {reason}")]
    Config {
        /// The key as written in the recipe, without `data.`.
        key: &'static str,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// A target size that the model cannot take.
    #[error(
        "data.sizes: {width}x{height} does not work, both sides must be multiples of {multiple}; nearest valid: {nearest}"
    )]
    Size {
        /// Width as written, in pixels.
        width: u32,
        /// Height as written, in pixels.
        height: u32,
        /// What both sides must be a multiple of.
        multiple: u32,
        /// The nearest valid sizes, ready to paste.
        nearest: String,
    },
    /// No file that could be trained on.
    #[error(
        "no clips in {}: put videos ({}), pictures or folders of numbered pictures there, or correct data.folder",
        folder.display(),
        crate::media::VIDEO_EXTENSIONS.join(", ")
    )]
    Empty {
        /// The folder that was searched.
        folder: PathBuf,
    },
    /// Clips without a caption.
    #[error("{} without a caption:{}\n{way_out}", count(files.len(), "clip"), bullets(files))]
    NoCaption {
        /// Every clip concerned, by its id.
        files: Vec<String>,
        /// Where captions are looked for, and what to do.
        way_out: &'static str,
    },
    /// A `metadata.jsonl` or `metadata.csv` that cannot be used.
    #[error("{}, line {line}: {reason}", path.display())]
    Metadata {
        /// The metadata file.
        path: PathBuf,
        /// Line counted from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A dataset file of another trainer that cannot be used.
    #[error("{}: {reason}", path.display())]
    Import {
        /// The dataset file.
        path: PathBuf,
        /// What is wrong, and with which of its keys.
        reason: String,
    },
    /// A media file that is damaged, empty or not of the type of its name.
    #[error(
        "{} cannot be used: {reason}. Replace it, take it out of the data folder, or leave out such clips with \
         data.bad = \"skip\"",
        path.display()
    )]
    Unreadable {
        /// The media file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A codec that is not built in, and no ffmpeg program to hand it to.
    #[error(
        "{} holds {codec}, which needs the ffmpeg program, and none was found on PATH. \
         Either install ffmpeg (apt install ffmpeg, brew install ffmpeg), or convert the clip to H.264 MP4 or GIF",
        path.display()
    )]
    NoDecoder {
        /// The media file.
        path: PathBuf,
        /// Codec or container, in plain words.
        codec: String,
    },
    /// Clips shorter than every frame bucket.
    #[error(
        "{} shorter than the shortest bucket of {shortest} frames (at {fps} frames a second):{}\n\
         remove them, lengthen them, or add a smaller number to data.frames",
        count(clips.len(), "clip"),
        bullets(clips)
    )]
    TooShort {
        /// Each clip with its frame count at the target rate.
        clips: Vec<String>,
        /// Frames of the shortest bucket.
        shortest: u32,
        /// Target frames a second.
        fps: f64,
    },
    /// Several clips that cannot be used, for different reasons.
    #[error(
        "{} cannot be used:{}\nreplace them, take them out of the data folder, or leave them out with data.bad = \"skip\"",
        count(clips.len(), "clip"),
        bullets(clips)
    )]
    Unusable {
        /// Each clip with what is wrong with it.
        clips: Vec<String>,
    },
    /// The user asked to stop while clips were read.
    #[error("stopped while the clips were read")]
    Stopped,
    /// The cache folder takes no new entries.
    #[error(
        "the cache folder {} cannot be written to ({source}): make it writable, or choose another one",
        folder.display()
    )]
    CacheReadOnly {
        /// The cache folder.
        folder: PathBuf,
        /// The system's own reason.
        source: io::Error,
    },
    /// Frames that cannot be encoded as the requested file.
    #[error("cannot write {}: {reason}", path.display())]
    Encode {
        /// The file that was to be written; it does not exist.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
}

/// Result of everything in this crate.
pub type Result<T> = std::result::Result<T, DataError>;

impl DataError {
    /// Builds an [`DataError::Io`]; meant for `map_err`.
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { action, path, source }
    }

    /// Builds an [`DataError::Unreadable`].
    pub fn unreadable(path: impl AsRef<Path>, reason: impl ToString) -> Self {
        Self::Unreadable { path: path.as_ref().to_path_buf(), reason: reason.to_string() }
    }

    /// Builds an [`DataError::Encode`].
    pub(crate) fn encode(path: impl AsRef<Path>, reason: impl ToString) -> Self {
        Self::Encode { path: path.as_ref().to_path_buf(), reason: reason.to_string() }
    }
}

fn count(number: usize, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

fn bullets(names: &[String]) -> String {
    names.iter().map(|name| format!("\n  {name}")).collect()
}
