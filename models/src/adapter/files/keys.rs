//! The spelling of keys: which module and which part of an adapter a key means.
//!
//! Sources of the spellings: ComfyUI comfy/lora.py and comfy/weight_adapter; diffusers lora_conversion_utils.py;
//! musubi-tuner networks/lora.py and convert_lora.py; DiffSynth-Studio diffsynth/utils/lora/{general,wan}.py (readers) and
//! diffsynth/diffusion/training_module.py (writer); VideoX-Fun videox_fun/utils/lora_utils.py, whose network joins `lora_unet`,
//! the empty name of the transformer and the module's by dots that become underscores, hence two of them; LyCORIS.

use crate::{Expert, names};

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

/// A part of what an adapter does to one module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// A, down.
    Down,
    /// B, up.
    Up,
    /// Alpha.
    Alpha,
    /// DoRA's magnitudes in ComfyUI's convention.
    DoraScale,
    /// DoRA's magnitudes in PEFT's convention.
    MagnitudeVector,
    /// LoHa's first pair, a.
    HadaW1A,
    /// LoHa's first pair, b.
    HadaW1B,
    /// LoHa's second pair, a.
    HadaW2A,
    /// LoHa's second pair, b.
    HadaW2B,
    /// LoKr's coarse side, whole.
    LokrW1,
    /// LoKr's coarse side, a.
    LokrW1A,
    /// LoKr's coarse side, b.
    LokrW1B,
    /// LoKr's fine side, whole.
    LokrW2,
    /// LoKr's fine side, a.
    LokrW2A,
    /// LoKr's fine side, b.
    LokrW2B,
    /// The difference of the weight, or of another parameter.
    Diff,
    /// The difference of the bias.
    DiffBias,
    /// The difference of the bias, multiplied by the factors' scale.
    UpBias,
}

const PARTS: &[(&str, Part)] = &[
    (".lora_A.weight", Part::Down),
    (".lora_B.weight", Part::Up),
    (".lora_A", Part::Down),
    (".lora_B", Part::Up),
    (".lora_down.weight", Part::Down),
    (".lora_up.weight", Part::Up),
    (".lora.down.weight", Part::Down),
    (".lora.up.weight", Part::Up),
    ("_lora.down.weight", Part::Down),
    ("_lora.up.weight", Part::Up),
    (".lora_linear_layer.down.weight", Part::Down),
    (".lora_linear_layer.up.weight", Part::Up),
    (".alpha", Part::Alpha),
    (".lora_B.bias", Part::UpBias),
    (".dora_scale", Part::DoraScale),
    (".lora_magnitude_vector", Part::MagnitudeVector),
    (".lora_magnitude_vector.weight", Part::MagnitudeVector),
    (".hada_w1_a", Part::HadaW1A),
    (".hada_w1_b", Part::HadaW1B),
    (".hada_w2_a", Part::HadaW2A),
    (".hada_w2_b", Part::HadaW2B),
    (".lokr_w1", Part::LokrW1),
    (".lokr_w1_a", Part::LokrW1A),
    (".lokr_w1_b", Part::LokrW1B),
    (".lokr_w2", Part::LokrW2),
    (".lokr_w2_a", Part::LokrW2A),
    (".lokr_w2_b", Part::LokrW2B),
    (".diff", Part::Diff),
    (".diff_b", Part::DiffBias),
];

/// Words after which PEFT inserts the name of an adapter in memory (`lora_A.default.weight`).
const NAMED: [&str; 3] = [".lora_A.", ".lora_B.", ".lora_magnitude_vector."];

/// Prefixes, longer ones first.
const PREFIXES: &[(&str, KeyStyle)] = &[
    ("base_model.model.", KeyStyle::Peft),
    ("model.diffusion_model.", KeyStyle::Native),
    ("diffusion_model.", KeyStyle::Native),
    ("transformer_2.", KeyStyle::Diffusers),
    ("transformer.", KeyStyle::Diffusers),
    ("lora_unet__", KeyStyle::Kohya),
    ("lora_unet_", KeyStyle::Kohya),
    ("lycoris_", KeyStyle::Kohya),
    ("pipe.dit.", KeyStyle::Bare),
    ("dit.", KeyStyle::Bare),
    ("", KeyStyle::Bare),
];

/// What a key means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meaning {
    /// Official module name.
    pub module: String,
    /// Which part.
    pub part: Part,
    /// How the key is spelt.
    pub style: KeyStyle,
    /// The expert that the prefix names.
    pub expert: Option<Expert>,
}

/// The meaning of `key`, or `None` if it is not an adapter key of a Wan transformer.
pub fn parse(key: &str) -> Option<Meaning> {
    let key = without_adapter_name(key);
    // The modulation is a tensor of the block itself: its key has no module name.
    let (stem, part) = match key.strip_suffix(".diff_m") {
        Some(block) => (format!("{block}.modulation"), Part::Diff),
        None => PARTS.iter().find_map(|(end, part)| Some((key.strip_suffix(end)?.to_owned(), *part)))?,
    };
    let (prefix, style) = PREFIXES.iter().find(|(prefix, _)| stem.starts_with(prefix))?;
    let name = &stem[prefix.len()..];
    let module = match style {
        KeyStyle::Kohya => names::module_from_kohya(&name.replace('.', "_"))?,
        _ if names::module_to_diffusers(name).is_some() => name.to_owned(),
        _ => names::module_from_diffusers(name)?,
    };
    let expert = match *prefix {
        "transformer_2." => Some(Expert::Low),
        "transformer." => Some(Expert::High),
        _ => None,
    };
    Some(Meaning { module, part, style: *style, expert })
}

/// `key` without PEFT's name of the adapter in memory: `lora_A.default.weight` becomes `lora_A.weight`.
fn without_adapter_name(key: &str) -> String {
    for word in NAMED {
        if let Some((stem, rest)) = key.split_once(word) {
            return match rest.rsplit_once('.') {
                Some((name, last)) if !name.contains('.') => format!("{stem}{word}{last}"),
                _ if word.contains("magnitude") && !rest.contains('.') => {
                    format!("{stem}{}", word.trim_end_matches('.'))
                }
                _ => key.to_owned(),
            };
        }
    }
    key.to_owned()
}

/// The official name of the tensor that a difference under `module` is added to.
pub fn tensor_of(module: &str, part: Part) -> String {
    let is_parameter = module.ends_with("modulation") || module.ends_with("emb_pos");
    match part {
        Part::DiffBias | Part::UpBias => format!("{module}.bias"),
        _ if is_parameter => module.to_owned(),
        _ => format!("{module}.weight"),
    }
}
