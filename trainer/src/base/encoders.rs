//! The models other than the DiT: their sizes, for forecasts of their memory, and the speech encoder.

use std::path::Path;

use models::clip::{Clip, ClipSizes};
use models::dit::{DitConfig, Speech};
use models::umt5::{Umt5, Umt5Sizes};
use models::vae::Sizes;
use models::wav2vec::SpeechSizes;
use models::weights::Checkpoint;

use super::{BaseModel, Part};
use crate::error::{Error, Result};

/// Sizes of the models other than the DiT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncoderSizes {
    /// The text encoder.
    pub text: Umt5Sizes,
    /// The VAE.
    pub vae: Sizes,
    /// The CLIP vision tower, of a DiT that looks through one.
    pub clip: Option<ClipSizes>,
}

impl EncoderSizes {
    /// Those that a model like `dit` was published with.
    pub fn published(dit: &DitConfig) -> Self {
        Self {
            text: Umt5Sizes::PUBLISHED,
            vae: Sizes::published(dit.kind.facts().vae),
            clip: dit.image.map(|_| ClipSizes::PUBLISHED),
        }
    }
}

/// Checks that a speech encoder makes the states that the DiT reads.
///
/// # Errors
/// States of another width or number.
pub fn check_speech(encoder: &SpeechSizes, dit: &Speech) -> Result<()> {
    let (width, states) = (encoder.width, encoder.layers + 1);
    if (width, states) == (dit.audio_width, dit.states) {
        return Ok(());
    }
    let why = format!(
        "it makes {states} states of width {width}, and the DiT reads {} of width {}: S2V-14B takes wav2vec2-large-xlsr-53-english",
        dit.states, dit.audio_width
    );
    Err(Error::Setting { key: "model.speech_encoder".into(), why })
}

impl BaseModel {
    /// The path of the speech encoder.
    ///
    /// # Errors
    /// If there is none.
    pub fn speech_encoder(&self) -> Result<&Path> {
        self.speech_encoder.as_deref().ok_or_else(|| {
            let looked = "wav2vec2-large-xlsr-53-english in model.folder".into();
            Error::NoModelPart { key: Part::SpeechEncoder.key(), looked }
        })
    }

    /// The sizes of the files that go with `dit`, from their headers.
    ///
    /// # Errors
    /// A part that does not open.
    pub fn encoder_sizes(&self, dit: &DitConfig) -> Result<EncoderSizes> {
        let vae = Checkpoint::open(&self.vae).map_err(models::Error::from)?;
        Ok(EncoderSizes {
            text: Umt5::sizes_at(&self.text_encoder)?,
            vae: Sizes::detect(&vae)?.0,
            clip: dit.image.map(|_| Ok::<_, Error>(Clip::sizes_at(self.clip()?, None)?)).transpose()?,
        })
    }
}
