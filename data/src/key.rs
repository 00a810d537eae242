//! Names of cache entries: a hash of everything that an entry depends on, so that a stale entry is never found.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::bucket::Bucket;

/// Part of every key. Raised whenever decoding, resampling, scaling or the layout of an entry changes its contents.
pub const FORMAT_VERSION: u32 = 1;

/// Name of one cache entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key([u8; 32]);

impl Key {
    /// The entry of one training item: `content` is the hash of the source ([`crate::hashes`]), `source_frames` the index of
    /// the source frame at each of its frames, `encoder` an identity of the encoder's weights, precision and settings.
    pub fn clip(content: &str, source_frames: &[usize], bucket: Bucket, encoder: &str) -> Self {
        let frames: Vec<String> = source_frames.iter().map(usize::to_string).collect();
        Self::of(&["clip", content, &frames.join(","), &bucket.to_string(), encoder])
    }

    /// The entry of one prompt.
    pub fn text(prompt: &str, encoder: &str) -> Self {
        Self::of(&["text", prompt, encoder])
    }

    /// The entry of anything else: every part counts, and so do the borders between them.
    pub fn of(parts: &[&str]) -> Self {
        let mut hash = Sha256::new();
        hash.update(FORMAT_VERSION.to_le_bytes());
        for part in parts {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        Self(hash.finalize().into())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(&hex(&self.0))
    }
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_and_every_border_counts() {
        let bucket = Bucket { width: 64, height: 48, frames: 5 };
        let key = Key::clip("c", &[0, 1, 2, 3, 4], bucket, "vae");
        assert_eq!(key, Key::clip("c", &[0, 1, 2, 3, 4], bucket, "vae"));
        assert_ne!(key, Key::clip("d", &[0, 1, 2, 3, 4], bucket, "vae"));
        assert_ne!(key, Key::clip("c", &[0, 1, 2, 3, 5], bucket, "vae"));
        assert_ne!(key, Key::clip("c", &[0, 1, 2, 3, 4], Bucket { frames: 9, ..bucket }, "vae"));
        assert_ne!(key, Key::clip("c", &[0, 1, 2, 3, 4], bucket, "vae2"));
        assert_ne!(Key::of(&["ab", "c"]), Key::of(&["a", "bc"]));
    }
}
