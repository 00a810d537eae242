//! The format of a weights file by its first bytes, which are more reliable than its name.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::error::{Result, WeightsError};

/// The kind of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// safetensors, or unknown: its header decides.
    Safetensors,
    /// PyTorch's zip format, `.pth` and `.pt`.
    TorchZip,
    /// PyTorch's format before 1.6: a bare pickle.
    TorchLegacy,
    /// llama.cpp's format.
    Gguf,
    /// A git LFS pointer, in place of a large file that was not fetched.
    LfsPointer,
    /// An HTML page.
    WebPage,
    /// No bytes at all.
    Empty,
}

impl FileKind {
    /// Reads the first bytes of `path`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn of(path: &Path) -> Result<Self> {
        let mut start = Vec::new();
        let handle = File::open(path).map_err(WeightsError::io("open", path))?;
        handle.take(64).read_to_end(&mut start).map_err(WeightsError::io("read", path))?;
        Ok(match start.as_slice() {
            // The length of a header may look like the beginning of another format.
            [_, _, _, _, 0, 0, 0, 0, b'{', ..] => Self::Safetensors,
            [b'P', b'K', 3, 4, ..] => Self::TorchZip,
            [] => Self::Empty,
            [0x80, 2..=5, ..] => Self::TorchLegacy,
            [b'G', b'G', b'U', b'F', ..] => Self::Gguf,
            s if s.starts_with(b"version https://git-lfs") => Self::LfsPointer,
            s if s.starts_with(b"<!DOCTYPE") || s.starts_with(b"<html") => Self::WebPage,
            _ => Self::Safetensors,
        })
    }

    /// Why tensors cannot be read from such a file, and what to do; `None` if they can.
    pub fn refusal(self) -> Option<&'static str> {
        Some(match self {
            Self::Safetensors | Self::TorchZip => return None,
            Self::Empty => "the file is empty; fetch it again",
            Self::TorchLegacy => {
                "this is PyTorch's old, non-zip format, which cannot be read safely; load it in PyTorch 1.6 or newer \
                 and save it again, best as .safetensors"
            }
            Self::Gguf => "GGUF files cannot be trained from; use the .safetensors of the same model",
            Self::LfsPointer => {
                "this is a Git LFS pointer, not the file itself; run `git lfs pull`, or download the file"
            }
            Self::WebPage => {
                "this is a web page, not a checkpoint: the download failed, perhaps for want of a login"
            }
        })
    }
}

impl std::fmt::Display for FileKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Safetensors => "safetensors file",
            Self::TorchZip => "PyTorch file",
            Self::TorchLegacy => "PyTorch file of before version 1.6",
            Self::Gguf => "GGUF file",
            Self::LfsPointer => "Git LFS pointer",
            Self::WebPage => "web page",
            Self::Empty => "empty file",
        })
    }
}
