//! The hash of a file in the hub's listing, and of the downloaded bytes.

use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::bytes::hex;

/// What the hub announces of a file's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HashKind {
    /// Of a large file: the SHA-256 of its bytes.
    Sha256,
    /// Of a small one: git's, the SHA-1 of `blob`, its length, a zero and its bytes.
    GitBlob,
}

impl HashKind {
    /// What people call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "SHA-256",
            Self::GitBlob => "git's SHA-1",
        }
    }

    /// Hexadecimal digits of one.
    pub fn digits(self) -> usize {
        match self {
            Self::Sha256 => 64,
            Self::GitBlob => 40,
        }
    }
}

/// The hash of the bytes received so far.
#[derive(Debug, Clone)]
pub(super) enum Running {
    Sha256(Sha256),
    GitBlob(Sha1),
}

impl Running {
    /// Of a file of `size` bytes, before the first is received.
    pub fn new(kind: HashKind, size: u64) -> Self {
        match kind {
            HashKind::Sha256 => Self::Sha256(Sha256::new()),
            HashKind::GitBlob => Self::GitBlob(Sha1::new_with_prefix(format!("blob {size}\0"))),
        }
    }

    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::GitBlob(hash) => hash.update(bytes),
        }
    }

    /// In lower-case hexadecimal digits.
    pub fn digits(self) -> String {
        match self {
            Self::Sha256(hash) => hex(&hash.finalize()),
            Self::GitBlob(hash) => hex(&hash.finalize()),
        }
    }
}
