//! Models of published sizes without their weights, and one tiny one.

use std::path::Path;

use models::dit::{DitConfig, ImageBranch};
use models::umt5::Umt5Sizes;
use models::vae::{Generation, Sizes};
use models::weights::Weights;

use crate::base::{self, DitFiles, Part};
use crate::error::{Error, Result};

/// Names of [`dit_preset`].
pub const DIT_PRESETS: &str = "t2v-1.3b, t2v-14b, t2v-a14b, i2v-14b, i2v-a14b, flf2v-14b, ti2v-5b, tiny";

/// Where the DiT of a measurement comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DitSource<'a> {
    /// Published sizes by name, weights made from a seed.
    Preset(&'a str),
    /// A checkpoint.
    Checkpoint(&'a Path),
}

impl DitSource<'_> {
    /// Name, sizes and weights.
    ///
    /// # Errors
    /// An unknown preset, or a checkpoint that cannot be read.
    pub fn open(self) -> Result<(String, DitConfig, Weights)> {
        match self {
            Self::Preset(name) => {
                let config = dit_preset(name)?;
                let weights = Weights::seeded(config.tensors(), 0);
                Ok((name.to_owned(), config, weights))
            }
            Self::Checkpoint(path) => {
                let dit = base::locate(path, Part::Dit)?;
                let (config, weights) = DitFiles::at(&dit, None)?.open()?;
                Ok((path.display().to_string(), config, weights))
            }
        }
    }
}

/// The sizes of a DiT by a name of [`DIT_PRESETS`]; of the two-expert models (`a14b`) those of either expert.
///
/// # Errors
/// Another name.
pub fn dit_preset(name: &str) -> Result<DitConfig> {
    let (dim, ffn_dim, heads, layers) = match name {
        "t2v-1.3b" => (1536, 8960, 12, 30),
        "t2v-14b" | "t2v-a14b" | "i2v-14b" | "i2v-a14b" | "flf2v-14b" => (5120, 13824, 40, 40),
        "ti2v-5b" => (3072, 14336, 24, 30),
        "tiny" => (128, 512, 2, 4),
        _ => return Err(unknown(name, DIT_PRESETS)),
    };
    let text_dim = if name == "tiny" { 64 } else { 4096 };
    let (in_channels, out_channels) = match name {
        "ti2v-5b" => (48, 48),
        "i2v-14b" | "i2v-a14b" | "flf2v-14b" => (36, 16),
        _ => (16, 16),
    };
    let image = match name {
        "i2v-14b" => Some(ImageBranch { dim: 1280, positions: None }),
        "flf2v-14b" => Some(ImageBranch { dim: 1280, positions: Some(514) }),
        _ => None,
    };
    Ok(DitConfig {
        dim,
        ffn_dim,
        heads,
        layers,
        in_channels,
        out_channels,
        text_dim,
        text_len: 512,
        freq_dim: 256,
        eps: 1e-6,
        image,
    })
}

/// The sizes of a VAE by name: `wan2.1`, `wan2.2`, `tiny`.
///
/// # Errors
/// Another name.
pub fn vae_preset(name: &str) -> Result<Sizes> {
    let (generation, latent, encoder, decoder) = match name {
        "wan2.1" => (Generation::Wan21, 16, 96, 96),
        "wan2.2" => (Generation::Wan22, 48, 160, 256),
        "tiny" => (Generation::Wan21, 16, 8, 8),
        _ => return Err(unknown(name, "wan2.1, wan2.2, tiny")),
    };
    Ok(Sizes { generation, latent, encoder, decoder })
}

/// The sizes of a text encoder by name: `umt5-xxl`, `tiny`.
///
/// # Errors
/// Another name.
pub fn umt5_preset(name: &str) -> Result<Umt5Sizes> {
    let (vocabulary, width, layers, heads, feed_forward) = match name {
        "umt5-xxl" => (256_384, 4096, 24, 64, 10_240),
        "tiny" => (1000, 64, 4, 4, 160),
        _ => return Err(unknown(name, "umt5-xxl, tiny")),
    };
    Ok(Umt5Sizes { vocabulary, width, layers, heads, inner: width, feed_forward, buckets: 32 })
}

fn unknown(name: &str, known: &str) -> Error {
    let why = format!("\"{name}\" is not known with --random-weights; known are {known}");
    Error::Setting { key: "--model".into(), why }
}
