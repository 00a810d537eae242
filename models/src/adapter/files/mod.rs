//! Adapter files: changes of weights on disk, in the key styles of ComfyUI, diffusers/PEFT, kohya/musubi and others.
//!
//! In memory there is one form, by official module names. Every style in common use is read ([`KeyStyle`]); those that
//! programs expect are written ([`Style`]), and each written file is verified by reading it back.

mod encode;
mod error;
mod keys;
mod peft;
mod provenance;
mod read;
mod sort;
mod spell;
mod summary;
mod verify;
mod write;

use std::collections::{BTreeMap, BTreeSet};

use kernels::Tensor;
use serde::{Deserialize, Serialize};

pub use error::AdapterFileError;
pub use keys::KeyStyle;
pub use provenance::Provenance;
pub use read::{locate, read};
pub use summary::{AdapterSummary, ModuleSummary, summary};
pub use verify::verify_written;
pub use write::{Written, write};

use crate::Expert;
pub use crate::delta::{Change, LoraPair};

/// The contents of an adapter file.
#[derive(Debug, Clone, Default)]
pub struct AdapterFile {
    /// Changes by official module name (`blocks.0.self_attn.q`).
    pub modules: BTreeMap<String, Change>,
    /// Differences of whole tensors, by official tensor name (`blocks.0.norm3.bias`), f32 on the CPU.
    pub differences: BTreeMap<String, Tensor>,
    /// The strings in the header: where the adapter comes from, see [`Provenance`].
    pub metadata: BTreeMap<String, String>,
    /// How the keys of the file read were spelt; `None` for an adapter that was never in a file.
    pub style: Option<KeyStyle>,
    /// The expert of a two-expert model that it was made for, where its keys, header or name say so.
    pub expert: Option<Expert>,
    /// Notes for the user about how it was read.
    pub notes: Vec<String>,
}

impl AdapterFile {
    /// The ranks that occur, each once, in rising order.
    pub fn ranks(&self) -> Vec<usize> {
        let ranks: BTreeSet<usize> = self.modules.values().filter_map(Change::rank).collect();
        ranks.into_iter().collect()
    }

    /// The kinds that occur, each once: LoRA, DoRA, LoHa, LoKr.
    pub fn kinds(&self) -> Vec<&'static str> {
        let kinds: BTreeSet<&str> = self.modules.values().map(|change| change.kind().name()).collect();
        kinds.into_iter().collect()
    }

    /// Numbers in all tensors together.
    pub fn parameters(&self) -> usize {
        let of = |change: &Change| change.tensors().iter().map(|(_, t)| t.elem_count()).sum::<usize>();
        let differences: usize = self.differences.values().map(Tensor::elem_count).sum();
        self.modules.values().map(of).sum::<usize>() + differences
    }
}

/// The style of a file to write.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Style {
    /// `diffusion_model.blocks.0.self_attn.q.lora_A.weight`: ComfyUI, diffusers and DiffSynth load it. The scale is
    /// multiplied into B and no alpha is written, because some of its readers ignore alpha keys. The default.
    #[default]
    Comfy,
    /// `diffusion_model.blocks.0.self_attn.q.lora_down.weight`, with alpha: ComfyUI.
    ComfyAlpha,
    /// `transformer.blocks.0.attn1.to_q.lora_A.weight`: diffusers and PEFT. The scale is multiplied into B: without
    /// PEFT's own metadata every reader assumes alpha = rank.
    Diffusers,
    /// `base_model.model.blocks.0.attn1.to_q.lora_A.weight` in a folder with `adapter_config.json`: PEFT itself.
    Peft,
    /// `lora_unet_blocks_0_self_attn_q.lora_down.weight`, with alpha: musubi-tuner and ComfyUI. diffusers loads this
    /// style only if it has all ten modules of every block.
    Kohya,
    /// Kohya's with two underscores, `lora_unet__blocks_0_self_attn_q`: VideoX-Fun, which trains Wan-Fun.
    VideoxFun,
    /// `blocks.0.self_attn.q.lora_A.default.weight`: DiffSynth-Studio. The scale is multiplied into B.
    Diffsynth,
}

impl Style {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Comfy,
        Self::ComfyAlpha,
        Self::Diffusers,
        Self::Peft,
        Self::Kohya,
        Self::VideoxFun,
        Self::Diffsynth,
    ];

    /// As recipes and command lines write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Comfy => "comfy",
            Self::ComfyAlpha => "comfy-alpha",
            Self::Diffusers => "diffusers",
            Self::Peft => "peft",
            Self::Kohya => "kohya",
            Self::VideoxFun => "videox-fun",
            Self::Diffsynth => "diffsynth",
        }
    }

    /// The programs that read it, in one line.
    pub const fn readers(self) -> &'static str {
        match self {
            Self::Comfy => "ComfyUI, DiffSynth; diffusers reads it too",
            Self::ComfyAlpha => "ComfyUI, in the words lora_down and lora_up, with alpha",
            Self::Diffusers => "diffusers and PEFT",
            Self::Peft => "a folder as PEFT itself saves it",
            Self::Kohya => "kohya and musubi-tuner",
            Self::VideoxFun => "VideoX-Fun (Wan-Fun): kohya's with two underscores",
            Self::Diffsynth => "DiffSynth-Studio",
        }
    }
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
