//! The published models that can be trained, by name: what is known of them before a file of theirs is here.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use models::dit::DitConfig;

use crate::base::{BaseModel, DitFiles, Dits, ModelConfig};
use crate::bench::dit_preset;
use crate::bytes::Bytes;
use crate::error::Result;
use crate::hub::HubId;
use crate::precision::{Processor, Wishes};

/// A published model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Published {
    /// Wan 2.1 T2V-1.3B.
    #[value(name = "t2v-1.3b")]
    T2v1B,
    /// Wan 2.1 T2V-14B.
    #[value(name = "t2v-14b")]
    T2v14B,
    /// Wan 2.1 I2V-14B, for 480p and 720p.
    #[value(name = "i2v-14b")]
    I2v14B,
    /// Wan 2.1 FLF2V-14B.
    #[value(name = "flf2v-14b")]
    Flf2v14B,
    /// Wan 2.2 T2V-A14B, both experts.
    #[value(name = "t2v-a14b")]
    T2vA14B,
    /// Wan 2.2 I2V-A14B, both experts.
    #[value(name = "i2v-a14b")]
    I2vA14B,
    /// Wan 2.2 TI2V-5B.
    #[value(name = "ti2v-5b")]
    Ti2v5B,
}

/// Bytes of UMT5 in bf16, with its tokenizer: models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl/tokenizer.json.
const TEXT_ENCODER: u64 = 11_380_000_000;
/// Bytes of Wan2.1_VAE.pth.
const VAE: u64 = 508_000_000;
/// Bytes of Wan2.2_VAE.pth.
const VAE_OF_5B: u64 = 2_820_000_000;
/// Bytes of models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth.
const CLIP: u64 = 4_770_000_000;

impl Published {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::T2v1B, Self::T2v14B, Self::I2v14B, Self::Flf2v14B, Self::T2vA14B, Self::I2vA14B, Self::Ti2v5B];

    /// The name of its sizes, as `--assume` and `bench` take it.
    pub fn preset(self) -> &'static str {
        match self {
            Self::T2v1B => "t2v-1.3b",
            Self::T2v14B => "t2v-14b",
            Self::I2v14B => "i2v-14b",
            Self::Flf2v14B => "flf2v-14b",
            Self::T2vA14B => "t2v-a14b",
            Self::I2vA14B => "i2v-a14b",
            Self::Ti2v5B => "ti2v-5b",
        }
    }

    /// What people call it.
    pub fn title(self) -> &'static str {
        match self {
            Self::T2v1B => "Wan 2.1 T2V-1.3B",
            Self::T2v14B => "Wan 2.1 T2V-14B",
            Self::I2v14B => "Wan 2.1 I2V-14B",
            Self::Flf2v14B => "Wan 2.1 FLF2V-14B",
            Self::T2vA14B => "Wan 2.2 T2V-A14B",
            Self::I2vA14B => "Wan 2.2 I2V-A14B",
            Self::Ti2v5B => "Wan 2.2 TI2V-5B",
        }
    }

    /// The repository of its official files.
    pub fn repository(self) -> &'static str {
        match self {
            Self::T2v1B => "Wan-AI/Wan2.1-T2V-1.3B",
            Self::T2v14B => "Wan-AI/Wan2.1-T2V-14B",
            Self::I2v14B => "Wan-AI/Wan2.1-I2V-14B-480P",
            Self::Flf2v14B => "Wan-AI/Wan2.1-FLF2V-14B-720P",
            Self::T2vA14B => "Wan-AI/Wan2.2-T2V-A14B",
            Self::I2vA14B => "Wan-AI/Wan2.2-I2V-A14B",
            Self::Ti2v5B => "Wan-AI/Wan2.2-TI2V-5B",
        }
    }

    /// The model that the repository `id` of its publisher holds; `None` for all others.
    pub fn of(id: &HubId) -> Option<Self> {
        let is_of = |published: &Self| {
            let own = published.repository().trim_end_matches("-480P").trim_end_matches("-720P");
            let rest = id.repository.strip_prefix(own);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
        };
        Self::ALL.into_iter().find(is_of)
    }

    /// Whether it has two experts.
    pub fn has_experts(self) -> bool {
        matches!(self, Self::T2vA14B | Self::I2vA14B)
    }

    /// Sizes of the DiT, or of either expert.
    ///
    /// # Errors
    /// None; every name is one of [`dit_preset`]'s.
    pub fn dit(self) -> Result<DitConfig> {
        dit_preset(self.preset())
    }

    /// About how much is downloaded of the official files: the DiTs are stored in f32.
    ///
    /// # Errors
    /// As [`Self::dit`].
    pub fn download(self) -> Result<Bytes> {
        let dit = self.dit()?;
        let numbers = |shape: &[usize]| shape.iter().product::<usize>() as u64;
        let parameters: u64 = dit.tensors().iter().map(|spec| numbers(&spec.shape)).sum();
        let networks = if self.has_experts() { 2 } else { 1 };
        let vae = if self == Self::Ti2v5B { VAE_OF_5B } else { VAE };
        let clip = if dit.image.is_some() { CLIP } else { 0 };
        Ok(Bytes(4 * parameters * networks + TEXT_ENCODER + vae + clip))
    }

    /// The model as it would be settled from `config`, with the names that its files have in the official layout; none of
    /// them is looked at.
    ///
    /// # Errors
    /// As [`Self::dit`].
    pub fn assumed(self, config: &ModelConfig, processor: Processor) -> Result<(BaseModel, DitConfig)> {
        let root = config.folder.clone().unwrap_or_else(|| PathBuf::from(self.repository()));
        let files = |name: &str| DitFiles { weights: root.join(name), config: None };
        let dit = self.dit()?;
        let ModelConfig { base, stream, text_base, vae_base, expert, .. } = *config;
        let named = Path::new(self.repository()).file_name().unwrap_or_default();
        let model = BaseModel {
            name: named.to_string_lossy().into_owned(),
            dits: match self.has_experts() {
                true => Dits::Experts { high: files("high_noise_model"), low: files("low_noise_model") },
                false => Dits::Single(files("")),
            },
            expert,
            vae: root.join(if self == Self::Ti2v5B { "Wan2.2_VAE.pth" } else { "Wan2.1_VAE.pth" }),
            text_encoder: root.join("models_t5_umt5-xxl-enc-bf16.pth"),
            tokenizer: root.join("google/umt5-xxl"),
            clip: dit.image.map(|_| root.join("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")),
            boundary: None,
            precision: Wishes { base, stream, text_base, vae_base }.settle(processor),
        };
        model.trained_dit()?;
        Ok((model, dit))
    }
}
