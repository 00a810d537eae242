//! Models of published sizes without their weights, and one tiny one.

use std::path::Path;

use models::dit::{Control, DitConfig};
use models::published::{Kind, Published};
use models::umt5::Umt5Sizes;
use models::vae::{Generation, Sizes};
use models::weights::Weights;

use crate::base::{self, DitFiles, Part};
use crate::error::{Error, Result};

/// The name of a DiT of a few MB.
const TINY: &str = "tiny";

/// Names of [`dit_preset`]: of the published models, and `tiny`.
pub fn dit_presets() -> Vec<&'static str> {
    Published::ALL.iter().map(|model| model.key).chain([TINY]).collect()
}

/// The source of the DiT of a measurement.
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

/// The sizes of a DiT by a name of [`dit_presets`]; of two experts those of either.
///
/// # Errors
/// Another name.
pub fn dit_preset(name: &str) -> Result<DitConfig> {
    match (Published::named(name), name) {
        (Some(model), _) => Ok(model.dit()),
        (None, TINY) => Ok(DitConfig {
            kind: Kind::Text,
            dim: 128,
            ffn_dim: 512,
            heads: 2,
            layers: 4,
            in_channels: 16,
            out_channels: 16,
            text_dim: 64,
            text_len: 512,
            freq_dim: 256,
            eps: 1e-6,
            image: None,
            control: Control::default(),
        }),
        (None, _) => Err(unknown(name, &dit_presets().join(", "))),
    }
}

/// The sizes of a VAE by name: `wan2.1`, `wan2.2`, `tiny`.
///
/// # Errors
/// Another name.
pub fn vae_preset(name: &str) -> Result<Sizes> {
    match name {
        "wan2.1" => Ok(Sizes::published(Generation::Wan21)),
        "wan2.2" => Ok(Sizes::published(Generation::Wan22)),
        "tiny" => Ok(Sizes { encoder: 8, decoder: 8, ..Sizes::published(Generation::Wan21) }),
        _ => Err(unknown(name, "wan2.1, wan2.2, tiny")),
    }
}

/// The sizes of a text encoder by name: `umt5-xxl`, `tiny`.
///
/// # Errors
/// Another name.
pub fn umt5_preset(name: &str) -> Result<Umt5Sizes> {
    match name {
        "umt5-xxl" => Ok(Umt5Sizes::PUBLISHED),
        "tiny" => Ok(Umt5Sizes {
            vocabulary: 1000,
            width: 64,
            layers: 4,
            heads: 4,
            inner: 64,
            feed_forward: 160,
            buckets: 32,
        }),
        _ => Err(unknown(name, "umt5-xxl, tiny")),
    }
}

fn unknown(name: &str, known: &str) -> Error {
    let why = format!("\"{name}\" is not known with --random-weights; known are {known}");
    Error::Setting { key: "--model".into(), why }
}
