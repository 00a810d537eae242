//! Adapter files: LoRA factors on disk, in the key styles of ComfyUI, diffusers/PEFT and kohya/musubi.
//!
//! In memory there is one form, by official module names. Reading knows every style that is met in the wild
//! ([`KeyStyle`]); writing makes the three that programs ask for ([`Style`]) and reads the result back.

mod error;
mod keys;
mod peft;
mod provenance;
mod read;
mod summary;
mod write;

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

pub use error::AdapterFileError;
pub use keys::KeyStyle;
pub use provenance::Provenance;
pub use read::read;
pub use summary::{AdapterSummary, ModuleSummary, summary};
pub use write::{Written, verify_written, write};

use crate::Result;

/// The factors of one module, f32 on the CPU.
#[derive(Debug, Clone)]
pub struct LoraPair {
    /// Down factor A [rank, in].
    pub a: Tensor,
    /// Up factor B [out, rank].
    pub b: Tensor,
    /// The delta is alpha / rank * B A; `None` means alpha = rank, so a scale of 1.
    pub alpha: Option<f32>,
}

impl LoraPair {
    /// The factors of a delta `scale` * B A, for whatever rule the scale came from (alpha / rank, or rsLoRA's
    /// alpha / sqrt(rank)): files know only alpha / rank, so alpha becomes `scale` * rank.
    pub fn new(a: Tensor, b: Tensor, scale: f64) -> Result<Self> {
        let rank = a.dim(0)?;
        Ok(Self { a, b, alpha: Some((scale * rank as f64) as f32) })
    }

    /// The rank of the factors.
    pub fn rank(&self) -> usize {
        self.a.dims().first().copied().unwrap_or(0)
    }

    /// What B A is multiplied by: alpha / rank.
    pub fn scale(&self) -> f64 {
        self.alpha.map_or(1.0, |alpha| f64::from(alpha) / self.rank() as f64)
    }

    /// What this adds to the weight of its module: alpha / rank * B A, [out, in], f32.
    pub fn delta(&self) -> Result<Tensor> {
        Ok((self.b.matmul(&self.a)? * self.scale())?)
    }
}

/// An adapter as a file holds it.
#[derive(Debug, Clone, Default)]
pub struct AdapterFile {
    /// Factors by official module name (`blocks.0.self_attn.q`).
    pub modules: BTreeMap<String, LoraPair>,
    /// The strings in the header: where the adapter comes from, see [`Provenance`].
    pub metadata: BTreeMap<String, String>,
    /// How the keys of the file read were spelt; `None` for an adapter that was never in a file.
    pub style: Option<KeyStyle>,
}

impl AdapterFile {
    /// What the adapter adds to the weight of `module`, [out, in], f32; `None` if it leaves the module alone.
    pub fn merged_delta(&self, module: &str) -> Result<Option<Tensor>> {
        self.modules.get(module).map(LoraPair::delta).transpose()
    }

    /// The ranks that occur, each once, in rising order.
    pub fn ranks(&self) -> Vec<usize> {
        let ranks: std::collections::BTreeSet<usize> = self.modules.values().map(LoraPair::rank).collect();
        ranks.into_iter().collect()
    }

    /// Numbers in all factors together.
    pub fn parameters(&self) -> usize {
        self.modules.values().map(|pair| pair.a.elem_count() + pair.b.elem_count()).sum()
    }
}

/// The style of a file to write.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Style {
    /// `diffusion_model.blocks.0.self_attn.q.lora_A.weight`: ComfyUI, diffusers and DiffSynth load it. The scale is
    /// multiplied into B and no alpha is written, because some of its readers ignore alpha keys. The default.
    #[default]
    Comfy,
    /// `transformer.blocks.0.attn1.to_q.lora_A.weight`: diffusers and PEFT. The scale is multiplied into B: without
    /// PEFT's own metadata every reader takes alpha for the rank.
    Diffusers,
    /// `lora_unet_blocks_0_self_attn_q.lora_down.weight`, with alpha: musubi-tuner and ComfyUI. diffusers loads this
    /// style only where all ten modules of every block are there.
    Kohya,
}

/// The number format of the factors in a file to write.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits: the trained values themselves.
    Float32,
    /// 16 bits with the range of float32: half the size, about 2.4 digits. The default.
    #[default]
    Bfloat16,
    /// 16 bits with about 3.3 digits; values beyond 65504 are refused.
    Float16,
}
