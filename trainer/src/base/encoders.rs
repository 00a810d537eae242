//! Sizes of the models other than the DiT, for forecasts of their memory.

use models::clip::{Clip, ClipSizes};
use models::dit::DitConfig;
use models::umt5::{Umt5, Umt5Sizes};
use models::vae::Sizes;
use models::weights::Checkpoint;

use super::BaseModel;
use crate::error::Result;

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

impl BaseModel {
    /// The sizes of the files that go with `dit`, from their headers.
    ///
    /// # Errors
    /// A part that does not open.
    pub fn encoder_sizes(&self, dit: &DitConfig) -> Result<EncoderSizes> {
        let vae = Checkpoint::open(&self.vae).map_err(models::Error::from)?;
        Ok(EncoderSizes {
            text: Umt5::sizes_at(&self.text_encoder)?,
            vae: Sizes::detect(&vae)?.0,
            clip: dit
                .image
                .map(|_| Ok::<_, crate::Error>(Clip::sizes_at(self.clip()?, None)?))
                .transpose()?,
        })
    }
}
