//! `tandem bench` of attention, the VAE and the text encoder.

use std::sync::Arc;

use clap::Args;
use kernels::transfer::Route;
use models::umt5::Umt5;
use models::vae::{Bands, Vae};

use super::{Profile, Size, Times, named, on_disk};
use crate::base::{self, Part};
use crate::cli::devices::OneDevice;
use crate::cli::precision::{PartFloat, PartPrecision};
use crate::tools::bench::{self, AttentionBench, Repeats, VaeBench};

#[derive(Debug, Args)]
pub(super) struct AttentionArguments {
    /// Tokens.
    #[arg(long, default_value_t = 4096)]
    tokens: usize,
    /// Heads.
    #[arg(long, default_value_t = 12)]
    heads: usize,
    /// Size of a head.
    #[arg(long, default_value_t = 128)]
    head_size: usize,
    #[command(flatten)]
    float: PartFloat,
    #[command(flatten)]
    device: OneDevice,
    #[command(flatten)]
    times: Times,
}

#[derive(Debug, Args)]
pub(super) struct VaeArguments {
    /// A checkpoint; with --random-weights the name of sizes: wan2.1, wan2.2, tiny.
    #[arg(long, default_value = "tiny", value_parser = named)]
    model: String,
    /// Generate weights from a seed.
    #[arg(long)]
    random_weights: bool,
    #[command(flatten)]
    size: Size,
    /// Encode and decode in tiles of 256 x 256 pixels.
    #[arg(long)]
    tiled: bool,
    #[command(flatten)]
    float: PartFloat,
    #[command(flatten)]
    device: OneDevice,
    /// More devices, such as cuda:1: a clip is decoded in bands of rows on all, and each encodes a clip.
    #[arg(long, value_name = "DEVICES", value_delimiter = ',', requires = "device")]
    beside: Vec<String>,
    #[command(flatten)]
    times: Times,
    #[command(flatten)]
    profile: Profile,
}

#[derive(Debug, Args)]
pub(super) struct TextBench {
    /// A checkpoint; with --random-weights the name of sizes: umt5-xxl, tiny.
    #[arg(long, default_value = "tiny", value_parser = named)]
    model: String,
    /// Generate weights from a seed.
    #[arg(long)]
    random_weights: bool,
    /// Tokens of the prompt.
    #[arg(long, default_value_t = 512)]
    tokens: usize,
    #[command(flatten)]
    precision: PartPrecision,
    #[command(flatten)]
    device: OneDevice,
    #[command(flatten)]
    times: Times,
}

impl AttentionArguments {
    pub(super) fn measure(&self) -> crate::Result<serde_json::Value> {
        let device = self.device.open()?;
        let (dtype, repeats) = (self.float.settle(&device), self.times.repeats());
        let Self { tokens, heads, head_size, .. } = *self;
        bench::attention(AttentionBench { tokens, heads, head_size, dtype, repeats }, &device)
    }
}

impl VaeArguments {
    pub(super) fn measure(&self) -> crate::Result<serde_json::Value> {
        let device = self.device.open()?;
        let dtype = self.float.settle(&device);
        let vae = match self.random_weights {
            true => Vae::seeded(bench::vae_preset(&self.model)?, 0, dtype, &device)?,
            false => {
                let path = on_disk(&self.model, bench::vae_preset)?;
                Vae::load(&base::locate(path, Part::Vae)?, None, dtype, &device)?
            }
        };
        let size = self.size.checked(vae.sizes().spatial_ratio())?;
        let tiling = bench::usual_tiles(self.tiled);
        let repeats = Repeats { profile: self.profile.profile, ..self.times.repeats() };
        let mut vaes = vec![Arc::new(vae)];
        for name in &self.beside {
            vaes.push(Arc::new(vaes[0].copied_to(&self.device.open_another(name)?)?));
        }
        bench::vae(&VaeBench { bands: Bands::new(vaes, Route::Auto)?, size, tiling, repeats })
    }
}

impl TextBench {
    pub(super) fn measure(&self) -> crate::Result<serde_json::Value> {
        let device = self.device.open()?;
        let frozen = self.precision.settle(&device);
        let umt5 = match self.random_weights {
            true => Umt5::seeded(bench::umt5_preset(&self.model)?, 0, frozen, &device)?,
            false => {
                let path = on_disk(&self.model, bench::umt5_preset)?;
                let path = base::locate(path, Part::TextEncoder)?;
                Umt5::load(&path, frozen, &device)?
            }
        };
        bench::text(&self.model, &umt5, self.tokens, self.times.repeats())
    }
}
