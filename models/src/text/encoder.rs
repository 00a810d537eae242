//! Tokenizer and UMT5 together.

use std::path::Path;

use kernels::{Device, Tensor};

use crate::umt5::Umt5;
use crate::weights::Frozen;
use crate::{Movable, Result};

use super::clean::clean;
use super::tokenizer::Tokenizer;

/// Turns prompts into the context that a DiT reads.
#[derive(Debug)]
pub struct TextEncoder {
    tokenizer: Tokenizer,
    umt5: Umt5,
    fingerprint: String,
}

impl TextEncoder {
    /// Loads UMT5 from `weights` (see [`Umt5::load`]) and its tokenizer from `tokenizer` (see [`Tokenizer::load`]).
    pub fn load(weights: &Path, tokenizer: &Path, frozen: Frozen, device: &Device) -> Result<Self> {
        // The tokenizer first: it is the smaller file, and the one that is missing more often.
        let tokenizer = Tokenizer::load(tokenizer)?;
        let umt5 = Umt5::load(weights, frozen, device)?;
        let fingerprint = format!("{}-{}", umt5.fingerprint(), tokenizer.fingerprint());
        Ok(Self { tokenizer, umt5, fingerprint })
    }

    /// Cleans `prompt` and splits it into tokens.
    pub fn ids(&self, prompt: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode(&clean(prompt))
    }

    /// The states of these tokens: [length, width], real rows only.
    pub fn encode(&self, ids: &[u32]) -> Result<Tensor> {
        self.umt5.encode(ids)
    }

    /// Cleans, tokenises and encodes: [length, width], without padding. The DiT pads with zero rows to 512.
    pub fn encode_prompt(&self, prompt: &str) -> Result<Tensor> {
        self.encode(&self.ids(prompt)?)
    }

    /// A text that identifies weights and tokenizer, for the keys of caches.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The model alone.
    pub fn umt5(&self) -> &Umt5 {
        &self.umt5
    }
}

impl Movable for TextEncoder {
    fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        self.umt5.tensors_mut()
    }
}
