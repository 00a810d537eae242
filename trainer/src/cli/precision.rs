//! Arguments for the precision of a model, shared by the commands.

use std::path::Path;

use clap::Args;
use kernels::{DType, Device};
use models::weights::Frozen;

use crate::base::{ModelConfig, QuantisedFolder};
use crate::error::{Error, Result};
use crate::machine::precision::{Arithmetic, Float, Precision, PrecisionRequest, Processor, WeightFormat};

/// The precision of the parts of a base model.
#[derive(Debug, Args)]
pub struct ModelPrecision {
    /// Storage of the DiT's weights. Default: bf16, on the CPU f32.
    #[arg(long, value_enum)]
    base: Option<WeightFormat>,
    /// What products with the DiT's matrices are computed in. Default: bf16; int8 stores them in int8 too.
    #[arg(long, value_enum)]
    arithmetic: Option<Arithmetic>,
    /// Dtype of the DiT's residual stream. Default: float32.
    #[arg(long, value_enum)]
    stream: Option<Float>,
    /// Storage of the text encoder's weights. Default: bf16, on the CPU f32.
    #[arg(long, value_enum)]
    text_base: Option<WeightFormat>,
    /// Dtype of the VAE. Default: bfloat16, on the CPU float32.
    #[arg(long, value_enum)]
    vae_base: Option<Float>,
    /// Do not cache quantised weights on disk for the next start, and do not read those that are cached.
    #[arg(long)]
    no_quantised_cache: bool,
}

impl ModelPrecision {
    /// The checkpoint folder `folder`, as a recipe's section.
    pub fn model(&self, folder: &Path) -> ModelConfig {
        ModelConfig {
            folder: Some(folder.to_owned()),
            base: self.base,
            arithmetic: self.arithmetic,
            stream: self.stream,
            text_base: self.text_base,
            vae_base: self.vae_base,
            cache_quantised: self.no_quantised_cache.then_some(false),
            ..ModelConfig::default()
        }
    }
}

impl ModelPrecision {
    /// The cache of quantised weights: as `settled` says, or none.
    pub fn quantised_over(&self, settled: Option<&QuantisedFolder>) -> Option<QuantisedFolder> {
        settled.filter(|_| !self.no_quantised_cache).cloned()
    }

    /// `settled` of a run, overridden by these arguments, for a model that runs on `processor`.
    ///
    /// # Errors
    /// If the arithmetic does not work with the storage.
    pub fn over(&self, settled: Precision, processor: Processor) -> Result<Precision> {
        // One of the two that is named decides the other where they do not go together.
        let arithmetic = match self.base {
            Some(base) if settled.arithmetic.with_base(Some(base)).is_err() => self.arithmetic,
            _ => self.arithmetic.or(Some(settled.arithmetic)),
        };
        let needed = self.arithmetic.and_then(Arithmetic::storage);
        check(arithmetic, self.base)?;
        let wishes = PrecisionRequest {
            base: self.base.or(needed).or(Some(settled.base)),
            arithmetic,
            stream: self.stream.or(Some(settled.stream)),
            text_base: self.text_base.or(Some(settled.text_base)),
            vae_base: self.vae_base.or(Some(settled.vae_base)),
        };
        let base_block = settled.base_block.filter(|_| self.base.is_none() && needed.is_none());
        Ok(Precision { base_block, ..wishes.settle(processor) })
    }
}

/// That an arithmetic works with a storage.
fn check(arithmetic: Option<Arithmetic>, base: Option<WeightFormat>) -> Result<()> {
    let checked = arithmetic.unwrap_or_default().with_base(base);
    checked.map_err(|why| Error::Setting { key: "--arithmetic".into(), why })
}

/// The precision of a DiT.
#[derive(Debug, Args)]
pub struct DitPrecision {
    /// Storage of the weights. Default: bf16, on the CPU f32.
    #[arg(long, value_enum)]
    base: Option<WeightFormat>,
    /// What products with the matrices are computed in. Default: bf16; int8 stores them in int8 too.
    #[arg(long, value_enum)]
    arithmetic: Option<Arithmetic>,
    /// Dtype of the residual stream. Default: float32.
    #[arg(long, value_enum)]
    stream: Option<Float>,
}

impl DitPrecision {
    /// Resolved for a model that runs on `processor`.
    ///
    /// # Errors
    /// If the arithmetic does not work with the storage.
    pub fn settle(&self, processor: Processor) -> Result<Precision> {
        let Self { base, arithmetic, stream } = *self;
        check(arithmetic, base)?;
        Ok(PrecisionRequest { base, arithmetic, stream, ..PrecisionRequest::default() }.settle(processor))
    }
}

/// The precision of a single part.
#[derive(Debug, Args)]
pub struct PartPrecision {
    /// Storage of the weights. Default: bf16, on the CPU f32.
    #[arg(long, value_enum)]
    base: Option<WeightFormat>,
}

impl PartPrecision {
    /// Resolved for a part that runs on `device`.
    pub fn settle(&self, device: &Device) -> Frozen {
        PrecisionRequest { text_base: self.base, ..PrecisionRequest::default() }
            .settle(Processor::of(device))
            .text()
    }
}

/// The float type of a part without quantised weights.
#[derive(Debug, Args)]
pub struct PartFloat {
    /// Dtype of weights and computation. Default: bfloat16, on the CPU float32.
    #[arg(long, value_enum)]
    dtype: Option<Float>,
}

impl PartFloat {
    /// Resolved for a part that runs on `device`.
    pub fn settle(&self, device: &Device) -> DType {
        PrecisionRequest { vae_base: self.dtype, ..PrecisionRequest::default() }
            .settle(Processor::of(device))
            .vae()
    }
}

/// Storage of a probed network: the same on every device, so that nothing but the device changes the numbers.
#[derive(Debug, Clone, Args)]
pub struct ProbePrecision {
    /// Storage of the weights; fp8 and int8 are computed in bf16, on the CPU in f32.
    #[arg(long, visible_alias = "dtype", value_enum, default_value_t = WeightFormat::F32)]
    base: WeightFormat,
}

impl ProbePrecision {
    /// For a network that runs on `processor`.
    pub fn frozen(&self, processor: Processor) -> Frozen {
        self.base.frozen(PrecisionRequest::default().settle(processor).compute)
    }
}
