//! What a checkpoint contains, by the names of its tensors: for error messages about a wrong file.

use crate::weights::Checkpoint;
use crate::{Error, Result};

/// A part of a model, or an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contents {
    /// An adapter.
    Adapter,
    /// A diffusion transformer.
    Dit,
    /// A video VAE.
    Vae,
    /// A tiny decoder of a VAE's latents.
    TinyDecoder,
    /// UMT5.
    TextEncoder,
    /// CLIP's picture tower.
    Clip,
}

/// Words that occur only in the names of an adapter's tensors.
const ADAPTER: [&str; 5] = [".lora", "lora_", ".hada_", ".lokr_", ".diff"];

/// Tensors of the tiny decoders taew2_1 and taew2_2, and of taew2_2_super.
const TINY_DECODERS: [&str; 2] = ["decoder.3.conv.4.weight", "decoder.1.conv.3.weight"];

impl Contents {
    /// What `checkpoint` contains; `None` if its names are not recognised.
    pub fn of(checkpoint: &Checkpoint) -> Option<Self> {
        let any =
            |words: &[&str]| checkpoint.names().any(|name| words.iter().any(|word| name.contains(word)));
        if any(&ADAPTER) {
            Some(Self::Adapter)
        } else if dit_prefix(checkpoint).is_some() {
            Some(Self::Dit)
        } else if ["encoder.conv1.weight", "encoder.conv_in.weight"]
            .iter()
            .any(|name| checkpoint.contains(name))
        {
            Some(Self::Vae)
        } else if TINY_DECODERS.iter().any(|name| checkpoint.contains(name)) {
            Some(Self::TinyDecoder)
        } else if any(&["SelfAttention.relative_attention_bias", "pos_embedding.embedding"]) {
            Some(Self::TextEncoder)
        } else if checkpoint.names().any(|name| name.starts_with("visual.") || name.contains("vision_model."))
        {
            Some(Self::Clip)
        } else {
            None
        }
    }

    /// Refuses a checkpoint that is known to contain something else.
    ///
    /// # Errors
    /// The message names the file, what it is, and what was expected.
    pub fn check(self, checkpoint: &Checkpoint) -> Result<()> {
        match Self::of(checkpoint) {
            Some(other) if other != self => Err(self.refusal(checkpoint, "")),
            _ => Ok(()),
        }
    }

    /// Why `checkpoint` cannot be read as this, since it has no tensor `missing`.
    pub(crate) fn refusal(self, checkpoint: &Checkpoint, missing: &str) -> Error {
        let path = checkpoint.path().display();
        let lacks = if missing.is_empty() { String::new() } else { format!(" (it has no `{missing}`)") };
        let known = Self::of(checkpoint).filter(|other| *other != self);
        Error::Mismatch(match known {
            Some(other) => {
                format!(
                    "{path}: this is not {} {}{lacks}, but {} {}; give the right file",
                    self.article(),
                    self.name(),
                    other.article(),
                    other.name()
                )
            }
            None => {
                format!(
                    "{path}: this is not {} {}{lacks}; give the right file: `tandem inspect` shows what this one is",
                    self.article(),
                    self.name()
                )
            }
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::Adapter => "adapter",
            Self::Dit => "Wan DiT",
            Self::Vae => "Wan VAE",
            Self::TinyDecoder => "tiny decoder (TAEHV)",
            Self::TextEncoder => "UMT5 text encoder",
            Self::Clip => "CLIP picture tower",
        }
    }

    fn article(self) -> &'static str {
        if self == Self::Adapter { "an" } else { "a" }
    }
}

/// The prefix of the names of a DiT; `None` if the file has no DiT.
pub fn dit_prefix(checkpoint: &Checkpoint) -> Option<&'static str> {
    let prefixes = ["", "model.diffusion_model.", "diffusion_model."];
    prefixes.into_iter().find(|prefix| {
        let has = |name: &str| checkpoint.contains(&format!("{prefix}{name}"));
        has("patch_embedding.weight")
            && (has("blocks.0.ffn.0.weight") || has("blocks.0.ffn.net.0.proj.weight"))
    })
}
