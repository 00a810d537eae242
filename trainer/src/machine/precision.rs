//! The storage and the dtypes of each part of the base model.

use clap::ValueEnum;
use kernels::weight::Format;
use kernels::{DType, Device};
use models::dit::{Base, Streamed};
use models::weights::{Frozen, Storage};
use serde::{Deserialize, Serialize};

/// The storage format of frozen weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum WeightFormat {
    /// 4 bytes a number; computed in f32.
    #[serde(alias = "float32")]
    #[value(alias = "float32")]
    F32,
    /// 2 bytes a number; computed in bf16.
    #[serde(alias = "bfloat16")]
    #[value(alias = "bfloat16")]
    Bf16,
    /// 1 byte a number, e4m3 with a scale for each row of a matrix; computed in bf16, on the CPU in f32.
    Fp8,
    /// 1 byte a number, integers with a scale for each row of a matrix; computed in bf16, on the CPU in f32.
    Int8,
}

/// What products with the frozen matrices of the blocks are computed in. Adapters are always computed in floats.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Arithmetic {
    /// bf16 with f32 sums, from matrices that are dequantised before each product if they are quantised; on the CPU f32.
    #[default]
    Bf16,
    /// 8-bit integers with exact sums, forward and backward, from rotated matrices in int8: four times as many operations a
    /// second as bf16 on GeForce cards from the 3090 on, and an error of 1 to 3 % in each product.
    Int8,
}

impl Arithmetic {
    /// Its name in recipes and command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }

    /// Whether it is the one that needs no saying.
    pub fn is_usual(&self) -> bool {
        *self == Self::Bf16
    }

    /// The storage of the DiT's matrices that it needs, if it needs one.
    pub fn storage(self) -> Option<WeightFormat> {
        match self {
            Self::Bf16 => None,
            Self::Int8 => Some(WeightFormat::Int8),
        }
    }

    /// That it works with matrices stored as `base`, if that is said.
    ///
    /// # Errors
    /// If it does not: one line without the key.
    pub fn with_base(self, base: Option<WeightFormat>) -> Result<(), String> {
        match (self.storage(), base) {
            (Some(needed), Some(base)) if needed != base => Err(format!(
                "{} multiplies matrices that are stored in {}, but base is \"{}\"; leave base out, or set it to \"{}\"",
                self.name(),
                needed.name(),
                base.name(),
                needed.name()
            )),
            _ => Ok(()),
        }
    }
}

/// A float type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Float {
    /// f32.
    #[serde(alias = "f32")]
    #[value(alias = "f32")]
    Float32,
    /// bf16.
    #[serde(alias = "bf16")]
    #[value(alias = "bf16")]
    Bfloat16,
}

/// The processor that a model runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processor {
    /// Only GPUs.
    Gpu,
    /// At least one stage on the CPU: everything is computed in f32.
    Cpu,
}

impl Processor {
    /// That of a single device.
    pub fn of(device: &Device) -> Self {
        if device.is_cpu() { Self::Cpu } else { Self::Gpu }
    }
}

/// The precision in a recipe or a command line; what it leaves out depends on where the model runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrecisionRequest {
    /// Of the DiT.
    pub base: Option<WeightFormat>,
    /// Of products with the DiT's matrices.
    pub arithmetic: Option<Arithmetic>,
    /// Of the DiT's residual stream.
    pub stream: Option<Float>,
    /// Of the text encoder.
    pub text_base: Option<WeightFormat>,
    /// Of the VAE.
    pub vae_base: Option<Float>,
}

/// The resolved precision of a base model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Precision {
    /// Storage of the DiT's weights.
    pub base: WeightFormat,
    /// What products with the matrices of the DiT's blocks are computed in.
    #[serde(default, skip_serializing_if = "Arithmetic::is_usual")]
    pub arithmetic: Arithmetic,
    /// Numbers of a row that share a scale, if the DiT's file has scales for blocks and `base` is fp8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_block: Option<usize>,
    /// The DiT's residual stream.
    pub stream: Float,
    /// Storage of the text encoder's weights.
    pub text_base: WeightFormat,
    /// Dtype of the VAE.
    pub vae_base: Float,
    /// The dtype of products with fp8 or int8 weights.
    pub compute: Float,
    /// How many of eight blocks of the DiT have their matrices in host memory. No number depends on it.
    #[serde(default, skip_serializing_if = "Streamed::is_none")]
    pub streamed: Streamed,
}

impl WeightFormat {
    /// With `compute` as the dtype of products with quantised weights.
    pub fn frozen(self, compute: Float) -> Frozen {
        match self {
            Self::F32 => Frozen::F32,
            Self::Bf16 => Frozen::dense(DType::BF16),
            Self::Fp8 => Frozen { compute: compute.dtype(), storage: Storage::Quantised(Format::E4m3) },
            Self::Int8 => Frozen { compute: compute.dtype(), storage: Storage::Quantised(Format::Int8) },
        }
    }

    /// Its name in recipes and command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Int8 => "int8",
        }
    }

    /// This format where floats are computed in `compute`: no bf16 where that is f32.
    pub fn with_compute(self, compute: Float) -> Self {
        match (self, compute) {
            (Self::Bf16, Float::Float32) => Self::F32,
            _ => self,
        }
    }

    fn at(self, processor: Processor) -> Self {
        self.with_compute(Float::Bfloat16.at(processor))
    }
}

impl Float {
    /// The tensor library's type.
    pub fn dtype(self) -> DType {
        match self {
            Self::Float32 => DType::F32,
            Self::Bfloat16 => DType::BF16,
        }
    }

    fn at(self, processor: Processor) -> Self {
        match processor {
            Processor::Gpu => self,
            Processor::Cpu => Self::Float32,
        }
    }
}

impl PrecisionRequest {
    /// Resolves what is left out: bf16 with an f32 stream. On the CPU bf16 becomes f32 everywhere: bf16 would save memory at a
    /// tenth of the speed.
    pub fn settle(self, processor: Processor) -> Precision {
        let arithmetic = self.arithmetic.unwrap_or_default();
        Precision {
            base: self.base.or(arithmetic.storage()).unwrap_or(WeightFormat::Bf16).at(processor),
            arithmetic,
            base_block: None,
            stream: self.stream.unwrap_or(Float::Float32).at(processor),
            text_base: self.text_base.unwrap_or(WeightFormat::Bf16).at(processor),
            vae_base: self.vae_base.unwrap_or(Float::Bfloat16).at(processor),
            compute: Float::Bfloat16.at(processor),
            streamed: Streamed::NONE,
        }
    }
}

impl Precision {
    /// How the DiT is loaded.
    pub fn dit(&self) -> Base {
        let mut frozen = self.base.frozen(self.compute);
        if let (Storage::Quantised(Format::E4m3), Some(block)) = (frozen.storage, self.base_block) {
            frozen.storage = Storage::Blocks(Format::E4m3, block);
        }
        if self.arithmetic == Arithmetic::Int8 {
            frozen.storage = Storage::Quantised(Format::RotatedInt8);
        }
        Base { frozen, stream: self.stream.dtype(), streamed: self.streamed }
    }

    /// How the text encoder is loaded.
    pub fn text(&self) -> Frozen {
        self.text_base.frozen(self.compute)
    }

    /// The dtype of the VAE.
    pub fn vae(&self) -> DType {
        self.vae_base.dtype()
    }
}

/// A description of `frozen` with everything that affects results: for the keys of caches, and for reports.
pub(crate) fn in_words(frozen: Frozen) -> String {
    let compute = frozen.compute.as_str();
    match frozen.storage {
        Storage::Dense => compute.to_owned(),
        Storage::Quantised(Format::E4m3) => format!("fp8 {compute}"),
        Storage::Quantised(Format::Int8) => format!("int8 {compute}"),
        Storage::Quantised(Format::RotatedInt8) => format!("int8 in int8 products {compute}"),
        Storage::Blocks(_, block) => format!("fp8 in blocks of {block} {compute}"),
    }
}
