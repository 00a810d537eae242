//! The keys of the styles that are written.

use super::Style;
use crate::names;

/// How a style spells what it says of one module.
pub(super) struct Spelling {
    /// What all keys of the module begin with.
    pub stem: String,
    /// What stands behind it for A.
    pub down: &'static str,
    /// And for B.
    pub up: &'static str,
}

/// The spelling of an official module, or `None` if it has no name in the style.
pub(super) fn spell(style: Style, module: &str) -> Option<Spelling> {
    // Also for the styles that keep the official name, a name outside the table would not be read back.
    let diffusers = names::module_to_diffusers(module)?;
    let stem = match style {
        Style::Comfy | Style::ComfyAlpha => format!("diffusion_model.{module}"),
        Style::Diffusers => format!("transformer.{diffusers}"),
        Style::Peft => format!("base_model.model.{diffusers}"),
        Style::Kohya => format!("lora_unet_{}", names::module_to_kohya(module)),
        Style::VideoxFun => format!("lora_unet__{}", names::module_to_kohya(module)),
        Style::Diffsynth => module.to_owned(),
    };
    let (down, up) = match style {
        Style::Comfy | Style::Diffusers | Style::Peft => (".lora_A.weight", ".lora_B.weight"),
        Style::Diffsynth => (".lora_A.default.weight", ".lora_B.default.weight"),
        Style::ComfyAlpha | Style::Kohya | Style::VideoxFun => (".lora_down.weight", ".lora_up.weight"),
    };
    Some(Spelling { stem, down, up })
}

impl Style {
    /// Whether alpha stands in a key of its own; else the scale is multiplied into B.
    pub fn has_alpha(self) -> bool {
        matches!(self, Self::ComfyAlpha | Self::Kohya | Self::VideoxFun)
    }

    /// Whether it is of PEFT's family, which knows pairs and DoRA's lengths and nothing else.
    pub(super) fn is_peft(self) -> bool {
        matches!(self, Self::Diffusers | Self::Peft)
    }

    /// Whether the family's readers look for the `ss_*` strings in the header and hash the tensors.
    pub fn is_kohya(self) -> bool {
        matches!(self, Self::Kohya | Self::VideoxFun)
    }

    /// What the file's name ends with, behind the name of the run: nothing for the one that most people look for.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Comfy => "",
            Self::ComfyAlpha => "_comfy_alpha",
            Self::Diffusers => "_diffusers",
            Self::Peft => "_peft",
            Self::Kohya => "_kohya",
            Self::VideoxFun => "_videox_fun",
            Self::Diffsynth => "_diffsynth",
        }
    }
}
