//! What kind of VAE a checkpoint holds, read from the shapes of its tensors.

use crate::weights::{Checkpoint, TensorSpec};
use crate::{Contents, Error, Result};

/// The two published VAEs; both are arrangements of the same parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Generation {
    /// Wan 2.1: plain levels, pixels in, 16 latent channels.
    Wan21,
    /// Wan 2.2 TI2V-5B: residual levels, pixels folded two by two into channels, 48 latent channels.
    Wan22,
}

impl Generation {
    /// The file of the official checkpoints.
    pub const fn file(self) -> &'static str {
        match self {
            Self::Wan21 => "Wan2.1_VAE.pth",
            Self::Wan22 => "Wan2.2_VAE.pth",
        }
    }

    /// Bytes of that file.
    pub const fn file_bytes(self) -> u64 {
        match self {
            Self::Wan21 => 508_000_000,
            Self::Wan22 => 2_820_000_000,
        }
    }

    /// Pixels folded into channels along each axis before the network: 1 or 2.
    pub const fn patch(self) -> usize {
        match self {
            Self::Wan21 => 1,
            Self::Wan22 => 2,
        }
    }

    /// Pixels per latent, along height and along width.
    pub const fn spatial_ratio(self) -> usize {
        super::NETWORK_RATIO * self.patch()
    }
}

/// How the tensors of a checkpoint are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// The original checkpoints and ComfyUI.
    Official,
    /// diffusers `AutoencoderKLWan`.
    Diffusers,
}

/// The sizes that differ between checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Which VAE.
    pub generation: Generation,
    /// Latent channels.
    pub latent: usize,
    /// Width of the encoder's first level.
    pub encoder: usize,
    /// Width of the decoder's last level.
    pub decoder: usize,
}

impl Sizes {
    /// Those that the VAE of `generation` was published with.
    pub const fn published(generation: Generation) -> Self {
        let (latent, encoder, decoder) = match generation {
            Generation::Wan21 => (16, 96, 96),
            Generation::Wan22 => (48, 160, 256),
        };
        Self { generation, latent, encoder, decoder }
    }

    /// Reads naming and sizes from a checkpoint.
    ///
    /// # Errors
    /// If it holds no Wan VAE.
    pub fn detect(checkpoint: &Checkpoint) -> Result<(Self, Naming)> {
        let naming = match checkpoint.contains("encoder.conv_in.weight") {
            true => Naming::Diffusers,
            false => Naming::Official,
        };
        let [first, last, latent] = match naming {
            Naming::Official => ["encoder.conv1.weight", "decoder.head.0.gamma", "conv2.weight"],
            Naming::Diffusers => {
                ["encoder.conv_in.weight", "decoder.norm_out.gamma", "post_quant_conv.weight"]
            }
        };
        let axis = |name: &str, axis: usize| {
            checkpoint
                .shape(name)
                .and_then(|s| s.get(axis).copied())
                .filter(|n| *n > 0)
                .ok_or_else(|| Contents::Vae.refusal(checkpoint, name))
        };
        let generation = match axis(first, 1)? {
            3 => Generation::Wan21,
            12 => Generation::Wan22,
            n => {
                return Err(Error::Mismatch(format!(
                    "the VAE takes {n} channels; Wan 2.1 takes 3, Wan 2.2 takes 12"
                )));
            }
        };
        let (encoder, decoder, latent) = (axis(first, 0)?, axis(last, 0)?, axis(latent, 0)?);
        Ok((Self { generation, latent, encoder, decoder }, naming))
    }

    /// Every tensor of such a VAE, by official name.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        super::plan::specs(self)
    }

    /// Pixels folded into channels along each axis before the network: 1 or 2.
    pub fn patch(&self) -> usize {
        self.generation.patch()
    }

    /// Channels of the network's input and output.
    pub fn pixel_channels(&self) -> usize {
        3 * self.patch() * self.patch()
    }

    /// Pixels per latent, along height and along width.
    pub fn spatial_ratio(&self) -> usize {
        self.generation.spatial_ratio()
    }
}
