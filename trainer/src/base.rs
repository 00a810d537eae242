//! The base model on disk: which files it is made of, and opening each of them.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Device;
use models::dit::{self, DitConfig};
use models::text::{TextEncoder, Tokenizer};
use models::vae::Vae;
use models::weights::{Checkpoint, Weights};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::precision::{self, Float, Held, Precision, Processor, Wishes};

/// Where the base model lies. `folder` alone is enough for a folder in the official or the diffusers layout; the other
/// keys replace single parts of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// A checkpoint folder, official or diffusers layout.
    pub folder: Option<PathBuf>,
    /// The DiT: a weights file, or a folder with shards. Its `config.json` lies beside it unless `dit_config` says where.
    pub dit: Option<PathBuf>,
    /// `config.json` of the DiT.
    pub dit_config: Option<PathBuf>,
    /// The VAE: a `.safetensors` or `.pth` file, or a diffusers `vae` folder.
    pub vae: Option<PathBuf>,
    /// The UMT5 encoder: a file, or a folder with shards.
    pub text_encoder: Option<PathBuf>,
    /// The folder of `tokenizer.json`, or that file.
    pub tokenizer: Option<PathBuf>,
    /// What the DiT's weights are held in: `bf16`, `fp8`, `int8`, or `f32`. `fp8` and `int8` code the matrices inside the
    /// blocks while they are read. Default `bf16`; on the CPU `bf16` becomes `f32`.
    pub base: Option<Held>,
    /// The DiT's residual stream: `float32`, or `bfloat16`, which halves what is kept of each block. Default `float32`.
    pub stream: Option<Float>,
    /// What the text encoder's weights are held in, as `base`.
    pub text_base: Option<Held>,
    /// What the VAE is held and computed in: `bfloat16` or `float32`. Default `bfloat16`, on the CPU `float32`.
    pub vae_base: Option<Float>,
}

/// The files of a base model, each settled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseModel {
    /// What people call it: the name of its folder.
    pub name: String,
    /// Weights of the DiT.
    pub dit: PathBuf,
    /// Config of the DiT.
    pub dit_config: PathBuf,
    /// The VAE.
    pub vae: PathBuf,
    /// The text encoder.
    pub text_encoder: PathBuf,
    /// The tokenizer.
    pub tokenizer: PathBuf,
    /// How each part is held and computed.
    pub precision: Precision,
}

/// What both sides of a picture must be a multiple of, in pixels: the VAE's stride 8 times the patch 2.
pub const SIZE_MULTIPLE: u32 = 16;
/// Frames a second of the Wan 2.1 models.
pub const MODEL_FPS: f64 = 16.0;
/// Pixels per latent, along height and width.
pub const LATENT_STRIDE: usize = 8;

impl ModelConfig {
    /// Settles every file, and the precision for a model that runs on `processor`. Relative paths are taken from `from`, the
    /// folder of the recipe.
    ///
    /// # Errors
    /// A part that is nowhere, naming it, where it was looked for, and the key that would name it.
    pub fn settle(&self, from: &Path, processor: Processor) -> Result<BaseModel> {
        let folder = self.folder.as_ref().map(|folder| from.join(folder));
        if let Some(folder) = folder.as_deref().filter(|folder| !folder.is_dir()) {
            return Err(Error::NoModelFolder { folder: folder.to_owned() });
        }
        let found = folder.as_deref().map(Layout::of);
        let part = |key: &'static str, named: &Option<PathBuf>, place: fn(&Layout) -> Result<PathBuf>| match (
            named, &found,
        ) {
            (Some(path), _) => Ok(from.join(path)),
            (None, Some(layout)) => place(layout),
            (None, None) => Err(Error::NoModelPart { key, looked: "model.folder is not set".into() }),
        };
        let dit = part("dit", &self.dit, Layout::dit)?;
        let dit_config = dit_config(&dit, self.dit_config.as_deref().map(|path| from.join(path)))?;
        let named = folder.as_deref().unwrap_or(&dit);
        // A folder's name may hold dots of its own: Wan2.1-T2V-1.3B.
        let name = if named.is_dir() { named.file_name() } else { named.file_stem() };
        Ok(BaseModel {
            name: name.map_or_else(|| "wan".into(), |name| name.to_string_lossy().into_owned()),
            vae: part("vae", &self.vae, Layout::vae)?,
            text_encoder: part("text_encoder", &self.text_encoder, Layout::text_encoder)?,
            tokenizer: part("tokenizer", &self.tokenizer, Layout::tokenizer)?,
            dit,
            dit_config,
            precision: self.wishes().settle(processor),
        })
    }
}

impl ModelConfig {
    /// What is said about precision.
    fn wishes(&self) -> Wishes {
        let Self { base, stream, text_base, vae_base, .. } = *self;
        Wishes { base, stream, text_base, vae_base }
    }
}

impl BaseModel {
    /// Checks the DiT's files against each other, from headers alone.
    pub fn open_dit(&self) -> Result<(DitConfig, Weights)> {
        open_dit(&self.dit, &self.dit_config)
    }

    /// Looks at the parts besides the DiT, so that what is missing is told before a run begins: headers, and the
    /// tokenizer whole.
    ///
    /// # Errors
    /// A part that does not open.
    pub fn check_encoders(&self) -> Result<()> {
        for path in [&self.vae, &self.text_encoder] {
            Checkpoint::open(path).map_err(models::Error::from)?;
        }
        Tokenizer::load(&self.tokenizer)?;
        Ok(())
    }

    /// Loads the VAE.
    pub fn load_vae(&self, device: &Device) -> Result<Vae> {
        Ok(Vae::load(&self.vae, None, self.precision.vae(), device)?)
    }

    /// Loads the text encoder with its tokenizer.
    pub fn load_text_encoder(&self, device: &Device) -> Result<TextEncoder> {
        Ok(TextEncoder::load(&self.text_encoder, &self.tokenizer, self.precision.text(), device)?)
    }

    /// A text that identifies the text encoder, its precision and its tokenizer, for the keys of cached prompts.
    pub fn text_identity(&self) -> Result<String> {
        let weights = Checkpoint::open(&self.text_encoder)
            .and_then(|c| c.fingerprint())
            .map_err(models::Error::from)?;
        let tokenizer = Tokenizer::load(&self.tokenizer)?;
        Ok(format!("{weights} {} {}", tokenizer.fingerprint(), precision::in_words(self.precision.text())))
    }
}

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
}

/// Where `part` lies, when `model` is a checkpoint folder in either layout, the part's own folder, or its file.
///
/// # Errors
/// When there is nothing at `model`, or no such part in it; a folder of two experts has no single DiT.
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
        Part::Vae => layout.vae(),
        Part::TextEncoder => layout.text_encoder(),
        Part::Tokenizer => layout.tokenizer(),
    };
    match place {
        // A folder with weights that are no DiT's is the part's own folder, or the loader says what it is.
        Err(Error::NoModelPart { .. })
            if Checkpoint::open(model).is_ok_and(|own| !own.contains("patch_embedding.weight")) =>
        {
            Ok(model.to_owned())
        }
        place => place,
    }
}

/// The `config.json` of the DiT at `dit`: `named`, else the one in its folder.
///
/// # Errors
/// When there is none.
pub fn dit_config(dit: &Path, named: Option<PathBuf>) -> Result<PathBuf> {
    let beside = || if dit.is_dir() { dit.join("config.json") } else { dit.with_file_name("config.json") };
    let path = named.unwrap_or_else(beside);
    match path.is_file() {
        true => Ok(path),
        false => Err(Error::NoModelPart { key: "dit_config", looked: path.display().to_string() }),
    }
}

/// Checks the DiT's files against each other, from headers alone.
///
/// # Errors
/// A config that cannot be read, and weights that do not fit it.
pub fn open_dit(dit: &Path, config: &Path) -> Result<(DitConfig, Weights)> {
    let text = fs::read_to_string(config).map_err(|source| Error::Io {
        action: "read",
        path: config.to_owned(),
        source,
    })?;
    Ok(dit::open(dit, &text)?)
}

/// A checkpoint folder of a known layout.
enum Layout {
    Official(PathBuf),
    Diffusers(PathBuf),
}

impl Layout {
    fn of(folder: &Path) -> Self {
        match folder.join("model_index.json").exists() {
            true => Self::Diffusers(folder.to_owned()),
            false => Self::Official(folder.to_owned()),
        }
    }

    fn dit(&self) -> Result<PathBuf> {
        let two_experts = |folder: &Path, high: &str, low: &str| {
            Err(Error::TwoExperts {
                folder: folder.to_owned(),
                high: folder.join(high),
                low: folder.join(low),
            })
        };
        match self {
            Self::Official(folder) if folder.join("high_noise_model").exists() => {
                two_experts(folder, "high_noise_model", "low_noise_model")
            }
            Self::Diffusers(folder) if folder.join("transformer_2").exists() => {
                two_experts(folder, "transformer", "transformer_2")
            }
            Self::Official(folder) => Ok(folder.clone()),
            Self::Diffusers(folder) => Ok(folder.join("transformer")),
        }
    }

    fn vae(&self) -> Result<PathBuf> {
        match self {
            Self::Official(folder) => first_of("vae", folder, &["Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors"]),
            Self::Diffusers(folder) => Ok(folder.join("vae")),
        }
    }

    fn text_encoder(&self) -> Result<PathBuf> {
        let names = ["models_t5_umt5-xxl-enc-bf16.pth", "models_t5_umt5-xxl-enc-bf16.safetensors"];
        match self {
            Self::Official(folder) => first_of("text_encoder", folder, &names),
            Self::Diffusers(folder) => Ok(folder.join("text_encoder")),
        }
    }

    fn tokenizer(&self) -> Result<PathBuf> {
        match self {
            Self::Official(folder) => first_of("tokenizer", folder, &["google/umt5-xxl"]),
            Self::Diffusers(folder) => Ok(folder.join("tokenizer")),
        }
    }
}

fn first_of(key: &'static str, folder: &Path, names: &[&str]) -> Result<PathBuf> {
    let mut paths = names.iter().map(|name| folder.join(name));
    paths.find(|path| path.exists()).ok_or_else(|| Error::NoModelPart {
        key,
        looked: names
            .iter()
            .map(|name| folder.join(name).display().to_string())
            .collect::<Vec<_>>()
            .join(", "),
    })
}
