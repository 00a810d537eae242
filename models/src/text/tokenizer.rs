//! The tokenizer of UMT5, read from its `tokenizer.json`.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// Tokens of a caption at most, with `</s>`: longer ones are cut.
pub const MAX_TOKENS: usize = 512;

/// Ends every sequence.
const END: &str = "</s>";

/// Where `tokenizer.json` lies inside a folder: the folder itself, an official checkpoint, a diffusers checkpoint.
const PLACES: [&str; 3] = ["tokenizer.json", "google/umt5-xxl/tokenizer.json", "tokenizer/tokenizer.json"];

/// Splits cleaned text into token ids.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    end: u32,
    fingerprint: String,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("fingerprint", &self.fingerprint).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Loads a `tokenizer.json`, or the one in a folder: the folder itself, its `google/umt5-xxl` or its `tokenizer`.
    ///
    /// # Errors
    /// If there is none (the text says where it was looked for) or it is no tokenizer with `</s>`.
    pub fn load(path: &Path) -> Result<Self> {
        let file = find(path)?;
        let fail = |e: &dyn std::fmt::Display| Error::Mismatch(format!("{}: {e}", file.display()));
        let bytes = std::fs::read(&file).map_err(|e| fail(&e))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|e| fail(&format!("this is no tokenizer.json ({e}); fetch it again")))?;
        // A file may carry settings of its own for these: lengths are this module's business.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| fail(&e))?;
        let end =
            inner.token_to_id(END).ok_or_else(|| fail(&"this tokenizer has no </s>, so it is not UMT5's"))?;
        let fingerprint = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        Ok(Self { inner, end, fingerprint })
    }

    /// The ids of a cleaned text, ending in `</s>`, at most [`MAX_TOKENS`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_up_to(text, MAX_TOKENS)
    }

    /// The ids of a cleaned text, cut so that with `</s>` they are at most `limit`.
    pub fn encode_up_to(&self, text: &str, limit: usize) -> Result<Vec<u32>> {
        let encoding =
            self.inner.encode(text, false).map_err(|e| Error::Mismatch(format!("tokenizer: {e}")))?;
        let mut ids: Vec<u32> = encoding.get_ids().iter().copied().take(limit.saturating_sub(1)).collect();
        ids.push(self.end);
        Ok(ids)
    }

    /// A text that identifies this tokenizer, for the keys of caches.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

fn find(path: &Path) -> Result<PathBuf> {
    if path.is_file() && path.extension().is_some_and(|e| e == "json") {
        return Ok(path.to_owned());
    }
    let places: Vec<PathBuf> = PLACES.iter().map(|place| path.join(place)).collect();
    if let Some(found) = places.iter().find(|p| p.is_file()) {
        return Ok(found.clone());
    }
    let listed: Vec<String> = places.iter().map(|p| format!("\n  {}", p.display())).collect();
    Err(Error::Mismatch(format!(
        "no tokenizer for the text encoder. Looked for:{}\nDownload tokenizer.json of google/umt5-xxl (it comes with every \
         Wan checkpoint; a spiece.model alone is not enough) to one of these places, or name the file",
        listed.concat()
    )))
}
