//! The tokenizer of UMT5, read from its `tokenizer.json`, or from its `spiece.model`, which may be embedded in a weights file.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::spiece;
use crate::umt5::SPIECE_TENSOR;
use crate::weights::Checkpoint;
use crate::{Error, Result};

/// Tokens of a caption at most, with `</s>`: longer ones are cut.
pub const MAX_TOKENS: usize = 512;

/// Ends every sequence.
const END: &str = "</s>";

/// Where the tokenizer is in a folder: the folder itself, an official checkpoint, a diffusers checkpoint.
const PLACES: [&str; 3] = [".", "google/umt5-xxl", "tokenizer"];
/// The names of its file, the one that loads faster first.
const FILES: [&str; 2] = ["tokenizer.json", "spiece.model"];

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
    /// Loads a `tokenizer.json` or a `spiece.model`, the one in a folder (the folder itself, its `google/umt5-xxl` or its
    /// `tokenizer`), or the one that a text encoder's safetensors file carries.
    ///
    /// # Errors
    /// If there is none (the message lists where it was looked for) or it is not a tokenizer with `</s>`.
    pub fn load(path: &Path) -> Result<Self> {
        let file = find(path)?;
        let fail = |e: &dyn std::fmt::Display| Error::Mismatch(format!("{}: {e}", file.display()));
        let bytes = bytes(&file)?;
        let inner = match file.extension().and_then(|extension| extension.to_str()) {
            Some("json") => from_json(&bytes)
                .map_err(|e| fail(&format!("this is not a tokenizer.json ({e}); fetch it again")))?,
            _ => spiece::tokenizer(&bytes)
                .map_err(|e| fail(&format!("its tokenizer cannot be read: {e}; fetch it again")))?,
        };
        Self::new(inner, &bytes).map_err(|e| fail(&e))
    }

    fn new(mut inner: tokenizers::Tokenizer, bytes: &[u8]) -> std::result::Result<Self, String> {
        // A file may carry settings of its own for these: lengths are this module's business.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| e.to_string())?;
        let end = inner.token_to_id(END).ok_or("this tokenizer has no </s>, so it is not UMT5's")?;
        Ok(Self { inner, end, fingerprint: fingerprint(bytes) })
    }

    /// [`Self::fingerprint`] of what [`Self::load`] would load from `path`, which is not parsed.
    ///
    /// # Errors
    /// If there is none.
    pub fn fingerprint_at(path: &Path) -> Result<String> {
        Ok(fingerprint(&bytes(&find(path)?)?))
    }

    /// The ids of a cleaned text, ending in `</s>`, at most [`MAX_TOKENS`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_up_to(text, MAX_TOKENS)
    }

    /// How many ids a cleaned text has, `</s>` included, before it is cut.
    pub fn count(&self, text: &str) -> Result<usize> {
        let encoding =
            self.inner.encode(text, false).map_err(|e| Error::Mismatch(format!("tokenizer: {e}")))?;
        Ok(encoding.get_ids().len() + 1)
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

/// A `tokenizer.json` without its `decoder`, which turns ids back into text: nothing here does, and the library panics over
/// one that is damaged.
fn from_json(bytes: &[u8]) -> std::result::Result<tokenizers::Tokenizer, String> {
    let mut parts: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    parts.remove("decoder");
    serde_json::from_value(parts.into()).map_err(|e| e.to_string())
}

/// The tokenizer in `file`, as it is stored.
fn bytes(file: &Path) -> Result<Vec<u8>> {
    match file.extension().is_some_and(|extension| extension == "safetensors") {
        true => carried(file),
        false => std::fs::read(file).map_err(|e| Error::Mismatch(format!("{}: {e}", file.display()))),
    }
}

fn fingerprint(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn find(path: &Path) -> Result<PathBuf> {
    let is_one = |e: &std::ffi::OsStr| ["json", "model", "safetensors"].iter().any(|kind| e == *kind);
    if path.is_file() && path.extension().is_some_and(is_one) {
        return Ok(path.to_owned());
    }
    let places = PLACES.iter().flat_map(|place| FILES.iter().map(move |file| path.join(place).join(file)));
    let places: Vec<PathBuf> = places.map(|place| place.components().collect()).collect();
    if let Some(found) = places.iter().find(|p| p.is_file()) {
        return Ok(found.clone());
    }
    let listed: Vec<String> = places.iter().map(|p| format!("\n  {}", p.display())).collect();
    Err(Error::Mismatch(format!(
        "no tokenizer for the text encoder. Looked for:{}\nDownload tokenizer.json of google/umt5-xxl (it comes with every \
         Wan checkpoint) to one of these places, or name the file",
        listed.concat()
    )))
}

/// The `spiece.model` in a weights file.
fn carried(file: &Path) -> Result<Vec<u8>> {
    let checkpoint = Checkpoint::open(file)?;
    if !checkpoint.contains(SPIECE_TENSOR) {
        return Err(Error::Mismatch(format!(
            "{}: this file has no tokenizer (no tensor `{SPIECE_TENSOR}`); give a tokenizer.json in addition",
            file.display()
        )));
    }
    Ok(checkpoint.bytes(SPIECE_TENSOR)?)
}
