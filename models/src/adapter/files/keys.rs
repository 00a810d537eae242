//! The spelling of keys: which module and which part of it a key means, and the keys of the styles to write.
//!
//! Sources of the spellings: ComfyUI comfy/lora.py and comfy/weight_adapter/lora.py; diffusers
//! lora_conversion_utils.py; musubi-tuner networks/lora.py and convert_lora.py; DiffSynth-Studio's trainers.

use super::Style;
use crate::names;

/// How the keys of a file are spelt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyStyle {
    /// `diffusion_model.` and official names: ComfyUI, diffusion-pipe, ai-toolkit.
    Native,
    /// Official names without a prefix: DiffSynth-Studio.
    Bare,
    /// `transformer.` and diffusers names.
    Diffusers,
    /// `base_model.model.`, as PEFT itself saves.
    Peft,
    /// `lora_unet_` and underscores: kohya, musubi-tuner, VideoX-Fun.
    Kohya,
}

impl std::fmt::Display for KeyStyle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Native => "ComfyUI/native",
            Self::Bare => "native without a prefix (DiffSynth)",
            Self::Diffusers => "diffusers",
            Self::Peft => "PEFT",
            Self::Kohya => "kohya/musubi",
        })
    }
}

/// A part of an adapter pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// A, down.
    Down,
    /// B, up.
    Up,
    /// Alpha.
    Alpha,
}

const PARTS: &[(&str, Part)] = &[
    (".lora_A.weight", Part::Down),
    (".lora_B.weight", Part::Up),
    (".lora_A.default.weight", Part::Down),
    (".lora_B.default.weight", Part::Up),
    (".lora_down.weight", Part::Down),
    (".lora_up.weight", Part::Up),
    (".lora.down.weight", Part::Down),
    (".lora.up.weight", Part::Up),
    (".alpha", Part::Alpha),
];

/// Prefixes, a longer one before any that it begins with.
const PREFIXES: &[(&str, KeyStyle)] = &[
    ("base_model.model.", KeyStyle::Peft),
    ("model.diffusion_model.", KeyStyle::Native),
    ("diffusion_model.", KeyStyle::Native),
    ("transformer_2.", KeyStyle::Diffusers),
    ("transformer.", KeyStyle::Diffusers),
    ("lora_unet__", KeyStyle::Kohya),
    ("lora_unet_", KeyStyle::Kohya),
    ("pipe.dit.", KeyStyle::Bare),
    ("", KeyStyle::Bare),
];

/// What a key means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meaning {
    /// Official module name.
    pub module: String,
    /// Which part of the pair.
    pub part: Part,
    /// How the key is spelt.
    pub style: KeyStyle,
}

/// The meaning of `key`, or `None` if it is not an adapter key of a Wan transformer.
pub fn parse(key: &str) -> Option<Meaning> {
    let (stem, part) = PARTS.iter().find_map(|(end, part)| Some((key.strip_suffix(end)?, *part)))?;
    let (name, style) =
        PREFIXES.iter().find_map(|(prefix, style)| Some((stem.strip_prefix(prefix)?, *style)))?;
    let module = match style {
        KeyStyle::Kohya => names::module_from_kohya(name)?,
        _ if names::module_to_diffusers(name).is_some() => name.to_owned(),
        _ => names::module_from_diffusers(name)?,
    };
    Some(Meaning { module, part, style })
}

/// The keys of A and B of an official module, and of alpha where the style stores it; `None` if it has no name there.
pub fn spell(style: Style, module: &str) -> Option<(String, String, Option<String>)> {
    // Also for the styles that keep the official name, a name outside the table would not be read back.
    let diffusers = names::module_to_diffusers(module)?;
    let pair = |stem: String| (format!("{stem}.lora_A.weight"), format!("{stem}.lora_B.weight"), None);
    Some(match style {
        Style::Comfy => pair(format!("diffusion_model.{module}")),
        Style::Diffusers => pair(format!("transformer.{diffusers}")),
        Style::Kohya => {
            let stem = format!("lora_unet_{}", names::module_to_kohya(module));
            (
                format!("{stem}.lora_down.weight"),
                format!("{stem}.lora_up.weight"),
                Some(format!("{stem}.alpha")),
            )
        }
    })
}
