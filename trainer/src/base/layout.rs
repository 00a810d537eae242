//! The locations of the parts of a base model in a folder.

use std::path::{Path, PathBuf};

use models::expert::Expert;
use models::weights::Checkpoint;

use super::dit::{DitFiles, Dits};
use crate::error::{Error, Result};

/// A part of a base model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The diffusion transformer.
    Dit,
    /// The video VAE.
    Vae,
    /// UMT5.
    TextEncoder,
    /// UMT5's tokenizer.
    Tokenizer,
    /// The CLIP vision tower of the image-to-video models of Wan 2.1.
    Clip,
    /// The speech encoder of S2V.
    SpeechEncoder,
}

impl Part {
    /// Its key in `[model]`.
    pub const fn key(self) -> &'static str {
        match self {
            Self::Dit => "dit",
            Self::Vae => "vae",
            Self::TextEncoder => "text_encoder",
            Self::Tokenizer => "tokenizer",
            Self::Clip => "clip",
            Self::SpeechEncoder => "speech_encoder",
        }
    }
}

/// The location of `part`, if `model` is a checkpoint folder in either layout, the part's own folder, or its file.
///
/// # Errors
/// If nothing exists at `model`, or it has no such part; a folder of two experts has no single DiT.
pub fn locate(model: &Path, part: Part) -> Result<PathBuf> {
    if !model.exists() {
        return Err(Error::NoModelFolder { folder: model.to_owned() });
    }
    if model.is_file() {
        return Ok(model.to_owned());
    }
    let layout = Layout::of(model);
    let place = match part {
        Part::Dit => layout.dit(),
        part => layout.part(part),
    };
    match place {
        // A folder with weights other than a DiT's is the part's own folder, or the loader says what it is.
        Err(Error::NoModelPart { .. })
            if Checkpoint::open(model).is_ok_and(|own| !own.contains("patch_embedding.weight")) =>
        {
            Ok(model.to_owned())
        }
        place => place,
    }
}

/// The DiT at `model`, or both experts: a checkpoint folder in either layout, the DiT's own folder, or its file.
///
/// # Errors
/// If nothing exists at `model`.
pub fn locate_dits(model: &Path) -> Result<Dits> {
    if !model.exists() {
        return Err(Error::NoModelFolder { folder: model.to_owned() });
    }
    match model.is_file() {
        true => Ok(Dits::Single(DitFiles::at(model, None)?)),
        false => Layout::of(model).dits(None),
    }
}

/// A checkpoint folder of a known layout.
pub(super) enum Layout {
    Official(PathBuf),
    Diffusers(PathBuf),
}

impl Layout {
    pub(super) fn of(folder: &Path) -> Self {
        match folder.join("model_index.json").exists() {
            true => Self::Diffusers(folder.to_owned()),
            false => Self::Official(folder.to_owned()),
        }
    }

    /// The folders of both experts, if there are two: high, low.
    fn experts(&self) -> Option<[PathBuf; 2]> {
        let (folder, names) = match self {
            Self::Official(folder) => (folder, ["high_noise_model", "low_noise_model"]),
            Self::Diffusers(folder) => (folder, ["transformer", "transformer_2"]),
        };
        let places = names.map(|name| folder.join(name));
        places.iter().all(|place| place.is_dir()).then_some(places)
    }

    /// The DiT, or both experts, with the config `named`, else their own.
    pub(super) fn dits(&self, named: Option<PathBuf>) -> Result<Dits> {
        let files = |place: &Path| DitFiles::at(place, named.clone());
        match self.experts() {
            Some([high, low]) => Ok(Dits::Experts { high: files(&high)?, low: files(&low)? }),
            None => Ok(Dits::Single(files(&self.single_dit())?)),
        }
    }

    /// The one DiT.
    fn dit(&self) -> Result<PathBuf> {
        match self.experts() {
            Some([high, low]) => Err(Error::TwoExperts { high, low }),
            None => Ok(self.single_dit()),
        }
    }

    /// The sigma that divides two experts, if the folder has it.
    pub(super) fn boundary(&self) -> Option<f64> {
        let Self::Diffusers(folder) = self else { return None };
        let text = std::fs::read(folder.join("model_index.json")).ok()?;
        serde_json::from_slice::<serde_json::Value>(&text).ok()?.get("boundary_ratio")?.as_f64()
    }

    fn single_dit(&self) -> PathBuf {
        match self {
            // Only one expert of the folder was fetched.
            Self::Official(folder) => {
                let experts = Expert::ALL.map(|expert| folder.join(format!("{}_model", expert.suffix())));
                experts.into_iter().find(|place| place.is_dir()).unwrap_or_else(|| folder.clone())
            }
            Self::Diffusers(folder) => {
                let places = ["transformer", "transformer_2"].map(|name| folder.join(name));
                let [first, second] = places;
                if second.is_dir() && !first.is_dir() { second } else { first }
            }
        }
    }

    /// Any part but the DiT.
    pub(super) fn part(&self, part: Part) -> Result<PathBuf> {
        let (folder, names) = match self {
            Self::Official(folder) => (folder, official(part)),
            Self::Diffusers(folder) => (folder, diffusers(part)),
        };
        let places: Vec<PathBuf> = names.iter().map(|name| folder.join(name)).collect();
        places.iter().find(|path| path.exists()).cloned().ok_or_else(|| {
            let looked: Vec<String> = places.iter().map(|path| path.display().to_string()).collect();
            Error::NoModelPart { key: part.key(), looked: looked.join(", ") }
        })
    }
}

/// Names of a part in an official folder.
fn official(part: Part) -> &'static [&'static str] {
    match part {
        Part::Dit => &["."],
        Part::Vae => {
            &["Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors", "Wan2.2_VAE.pth", "Wan2.2_VAE.safetensors"]
        }
        Part::TextEncoder => &["models_t5_umt5-xxl-enc-bf16.pth", "models_t5_umt5-xxl-enc-bf16.safetensors"],
        Part::Tokenizer => &["google/umt5-xxl"],
        Part::Clip => &[
            "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
            "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors",
        ],
        Part::SpeechEncoder => &["wav2vec2-large-xlsr-53-english"],
    }
}

/// Names of a part in a diffusers folder.
fn diffusers(part: Part) -> &'static [&'static str] {
    match part {
        Part::Dit => &["transformer"],
        Part::Vae => &["vae"],
        Part::TextEncoder => &["text_encoder"],
        Part::Tokenizer => &["tokenizer"],
        Part::Clip => &["image_encoder"],
        Part::SpeechEncoder => &["audio_encoder", "wav2vec2-large-xlsr-53-english"],
    }
}
