//! A published model without its files, for plans.

use std::path::{Path, PathBuf};

use models::dit::DitConfig;
use models::expert::Networks;
use models::published::Published;

use super::{BaseModel, DitFiles, Dits, ModelConfig};
use crate::error::Result;
use crate::machine::precision::{PrecisionRequest, Processor};

impl BaseModel {
    /// The model `published` as it would be resolved from `config`, with the names of its files in the official layout, none of
    /// which is opened; and the sizes of its DiT.
    ///
    /// # Errors
    /// If there are two experts and the recipe does not say which is trained.
    pub fn assumed(
        published: &Published,
        config: &ModelConfig,
        processor: Processor,
    ) -> Result<(Self, DitConfig)> {
        let root = config.folder.clone().unwrap_or_else(|| PathBuf::from(published.repository()));
        let files = |name: &str| DitFiles { weights: root.join(name), config: None };
        config.check_arithmetic()?;
        let ModelConfig { base, arithmetic, stream, text_base, vae_base, expert, .. } = *config;
        let named = Path::new(published.repository()).file_name().unwrap_or_default();
        let facts = published.kind.facts();
        let clip = root.join("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth");
        let model = Self {
            name: named.to_string_lossy().into_owned(),
            dits: match published.networks {
                Networks::Pair => {
                    Dits::Experts { high: files("high_noise_model"), low: files("low_noise_model") }
                }
                Networks::Whole => Dits::Single(files("")),
            },
            expert,
            vae: root.join(facts.vae.file()),
            text_encoder: root.join("models_t5_umt5-xxl-enc-bf16.pth"),
            tokenizer: root.join("google/umt5-xxl"),
            clip: (facts.clip_pictures > 0).then_some(clip),
            speech_encoder: facts.speech.then(|| root.join("wav2vec2-large-xlsr-53-english")),
            boundary: None,
            precision: PrecisionRequest { base, arithmetic, stream, text_base, vae_base }.settle(processor),
            quantised: None,
        };
        model.trained_dit()?;
        Ok((model, published.dit()))
    }
}
