//! What kinds of files and folders clips are.

use std::path::{Path, PathBuf};

/// Extensions taken as video files.
pub const VIDEO_EXTENSIONS: [&str; 6] = ["mp4", "mov", "m4v", "mkv", "webm", "avi"];
/// Extensions taken as pictures, moving or still.
pub const PICTURE_EXTENSIONS: [&str; 6] = ["gif", "webp", "apng", "png", "jpg", "jpeg"];

/// Where the pixels of an item are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Media {
    /// A video file.
    Video(PathBuf),
    /// A GIF, WebP or APNG that moves.
    Animation(PathBuf),
    /// A picture that does not move.
    Still(PathBuf),
    /// A folder of numbered pictures, in the order of their numbers.
    Pictures {
        /// The folder.
        folder: PathBuf,
        /// Its pictures.
        files: Vec<PathBuf>,
    },
}

impl Media {
    /// The file or folder, for messages.
    pub fn path(&self) -> &Path {
        match self {
            Self::Video(path) | Self::Animation(path) | Self::Still(path) => path,
            Self::Pictures { folder, .. } => folder,
        }
    }
}
