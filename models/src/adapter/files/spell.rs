//! The keys of the styles that are written.

use super::Style;
use crate::dit::modules::JOINED;
use crate::names;

/// The keys of one module in a style.
pub(super) struct Spelling {
    /// The prefix of all keys of the module.
    pub stem: String,
    /// The suffix for A.
    pub down: &'static str,
    /// The suffix for B.
    pub up: &'static str,
}

/// The spelling of an official module, or `None` if it has no name in the style.
pub(super) fn spell(style: Style, module: &str) -> Option<Spelling> {
    // A name outside the table would not be read back, also in styles that keep the official name.
    let diffusers = names::module_to_diffusers(module)?;
    // There it is two modules.
    if style.is_peft() && module.ends_with(JOINED.0) {
        return None;
    }
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
    /// Whether alpha has a key of its own; else the scale is multiplied into B.
    pub fn has_alpha(self) -> bool {
        matches!(self, Self::ComfyAlpha | Self::Kohya | Self::VideoxFun)
    }

    /// Whether it is one of PEFT's styles, which only have pairs and DoRA's magnitudes.
    pub(super) fn is_peft(self) -> bool {
        matches!(self, Self::Diffusers | Self::Peft)
    }

    /// Whether the family's readers look for the `ss_*` strings in the header and hash the tensors.
    pub fn is_kohya(self) -> bool {
        matches!(self, Self::Kohya | Self::VideoxFun)
    }

    /// The suffix of the file's name after the name of the run: empty for the default style.
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
