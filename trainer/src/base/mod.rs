//! The base model on disk: its files, and opening each of them.

mod assumed;
pub(crate) mod comfy;
mod dit;
mod encoders;
pub mod hub;
mod layout;
mod quantised;
mod trained;

use std::path::{Path, PathBuf};

use kernels::Device;
use models::Contents;
use models::dit::DitConfig;
use models::expert::{Expert, Networks};
use models::published::{Facts, Published};
use models::text::{TextEncoder, Tokenizer};
use models::umt5::SPIECE_TENSOR;
use models::vae::{Sizes, Vae};
use models::wav2vec::SpeechEncoder;
use models::weights::{Checkpoint, Grid, Weights};
use serde::{Deserialize, Serialize};

use crate::base::hub::{HubError, HubId, Wanted};
use crate::error::{Error, Result};
use crate::machine::precision::{
    self, Arithmetic, Float, Precision, PrecisionRequest, Processor, WeightFormat,
};
use crate::paths::existing;

pub use dit::{DitFiles, Dits};
pub use encoders::{EncoderSizes, check_speech};
pub use layout::{Part, locate, locate_dits};
pub use quantised::{QuantisedCache, QuantisedFolder, WritingBehind};
pub use trained::Trained;

use layout::Layout;

/// The location of the base model. `folder` alone is enough for a folder in the official or the diffusers layout; the other
/// keys replace single parts of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// A checkpoint folder, official or diffusers layout; a model of the Hugging Face hub as `owner/name`, or
    /// `owner/name@revision` for another revision than `main`; or ComfyUI's folder of models, in which Wan's files are found.
    pub folder: Option<PathBuf>,
    /// The DiT: a weights file, or a folder with shards. A `config.json` next to it is read if there is one.
    pub dit: Option<PathBuf>,
    /// The expert for high noise of a model of two, as `dit`.
    pub dit_high: Option<PathBuf>,
    /// The expert for low noise of a model of two, as `dit`.
    pub dit_low: Option<PathBuf>,
    /// `config.json` of the DiT, or of both experts.
    pub dit_config: Option<PathBuf>,
    /// What is trained of a model of two experts: `high`, `low`, or `both`, an adapter each in one run.
    pub expert: Option<Trained>,
    /// The VAE: a `.safetensors` or `.pth` file, or a diffusers `vae` folder.
    pub vae: Option<PathBuf>,
    /// The UMT5 encoder: a file, or a folder with shards.
    pub text_encoder: Option<PathBuf>,
    /// `tokenizer.json` or `spiece.model`, the folder of one, or a text encoder's file in which it is embedded.
    pub tokenizer: Option<PathBuf>,
    /// The CLIP vision tower, with which the image-to-video models of Wan 2.1 encode pictures: a file, or a diffusers
    /// `image_encoder` folder.
    pub clip: Option<PathBuf>,
    /// The speech encoder of S2V, `wav2vec2-large-xlsr-53-english`: its `model.safetensors`, or the folder of it.
    pub speech_encoder: Option<PathBuf>,
    /// Storage of the DiT's weights: `bf16`, `fp8`, `int8`, or `f32`. `fp8` and `int8` quantise the matrices inside the blocks
    /// while they are loaded. Default `bf16`, or `fp8` if the file is fp8; on the CPU `bf16` becomes `f32`.
    pub base: Option<WeightFormat>,
    /// What products with the matrices of the DiT's blocks are computed in: `bf16`, or `int8`, forward and backward, which needs
    /// `base = "int8"` and then is its default. Adapters are computed in floats with either. Default `bf16`.
    pub arithmetic: Option<Arithmetic>,
    /// The DiT's residual stream: `float32`, or `bfloat16`, which halves what is kept of each block. Default `float32`.
    pub stream: Option<Float>,
    /// Storage of the text encoder's weights, as `base`.
    pub text_base: Option<WeightFormat>,
    /// Dtype of the VAE: `bfloat16` or `float32`. Default `bfloat16`, on the CPU `float32`.
    pub vae_base: Option<Float>,
    /// Whether matrices that `base` quantises are cached on disk, in 8 bits, so that the next start reads half as much. Default `true`.
    pub cache_quantised: Option<bool>,
    /// The folder of this cache, for models of any size. Default `tandem/quantised` beside the hub's cache, for models of 1 GiB and
    /// more.
    pub quantised_folder: Option<PathBuf>,
}

/// The files of a base model, all resolved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseModel {
    /// Its name: that of its folder.
    pub name: String,
    /// Its DiT, or both experts.
    pub dits: Dits,
    /// What is trained of two experts; for a single DiT the expert that it is, if it is one and that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expert: Option<Trained>,
    /// The VAE.
    pub vae: PathBuf,
    /// The text encoder.
    pub text_encoder: PathBuf,
    /// The tokenizer.
    pub tokenizer: PathBuf,
    /// The CLIP vision tower, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip: Option<PathBuf>,
    /// The speech encoder, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speech_encoder: Option<PathBuf>,
    /// The sigma from which up the expert for high noise is used: from `model_index.json`; in a plan resolved by the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boundary: Option<f64>,
    /// The precision of each part.
    pub precision: Precision,
    /// The cache of quantised matrices on disk, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantised: Option<QuantisedFolder>,
}

/// Whether clips are sampled with a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clips {
    /// No.
    None,
    /// Yes.
    Some,
}

/// Checks that the VAE's latents are those that the DiT works on.
///
/// # Errors
/// If it is the VAE of another generation.
pub fn check_vae(vae: &Sizes, dit: &DitConfig) -> Result<()> {
    if vae.latent == dit.out_channels {
        return Ok(());
    }
    let why = format!(
        "its latents have {} channels, but the DiT takes {}: Wan2.1_VAE (16) belongs to all models but those of 5B, \
         Wan2.2_VAE (48) to those alone",
        vae.latent, dit.out_channels
    );
    Err(Error::Setting { key: "model.vae".into(), why })
}

impl ModelConfig {
    /// Resolves every file, and the precision for a model that runs on `processor`. Relative paths are relative to `from`, the
    /// folder of the recipe.
    ///
    /// # Errors
    /// If a part is missing, with where it was looked for, and the key that would name it.
    pub fn settle(&self, from: &Path, processor: Processor) -> Result<BaseModel> {
        if let Some(named) = comfy::named(self, from)? {
            return named.settle(from, processor);
        }
        let folder = self.folder.as_ref().map(|folder| from.join(folder));
        if let Some(folder) = folder.as_deref().filter(|folder| !folder.is_dir()) {
            return Err(match self.hub_id(from) {
                Some(id) => HubError::NotFetched { id: id.to_string() }.into(),
                None if folder.exists() => Error::ModelFolderIsFile { path: folder.to_owned() },
                None => Error::NoModelFolder { folder: folder.to_owned() },
            });
        }
        let layout = folder.as_deref().map(Layout::of);
        let part = |part: Part, named: &Option<PathBuf>| match (named, &layout) {
            (Some(path), _) => existing(&format!("model.{}", part.key()), from, path),
            (None, Some(layout)) => layout.part(part),
            (None, None) => Err(unnamed(part)),
        };
        self.check_arithmetic()?;
        let dits = self.dits(from, layout.as_ref())?;
        let expert = self.expert_trained(&dits)?;
        let text_encoder = part(Part::TextEncoder, &self.text_encoder)?;
        let precision = self.precision(
            &dits.of(expert.and_then(Trained::one).unwrap_or(Expert::High)).weights,
            &text_encoder,
            processor,
        );
        let first = &dits.of(Expert::High).weights;
        let named = folder.as_deref().unwrap_or(first);
        Ok(BaseModel {
            name: model_name(named),
            vae: part(Part::Vae, &self.vae)?,
            tokenizer: match part(Part::Tokenizer, &self.tokenizer) {
                // It is embedded in single files.
                Err(_) if self.tokenizer.is_none() && carries_tokenizer(&text_encoder) => {
                    text_encoder.clone()
                }
                found => found?,
            },
            clip: match part(Part::Clip, &self.clip) {
                Err(_) if self.clip.is_none() => None,
                found => Some(found?),
            },
            speech_encoder: match part(Part::SpeechEncoder, &self.speech_encoder) {
                Err(_) if self.speech_encoder.is_none() => None,
                found => Some(found?),
            },
            boundary: dits.experts().and(layout.as_ref()).and_then(Layout::boundary),
            quantised: self.quantised_folder(from, &precision),
            precision,
            text_encoder,
            expert,
            dits,
        })
    }

    /// The cache of quantised matrices, if there are any.
    fn quantised_folder(&self, from: &Path, precision: &Precision) -> Option<QuantisedFolder> {
        let is_cached = self.cache_quantised.unwrap_or(true) && precision.dit().frozen.is_quantised();
        let named = self.quantised_folder.as_ref().map(|named| QuantisedFolder::at(from.join(named)));
        is_cached.then(|| named.unwrap_or_else(QuantisedFolder::usual))
    }

    /// The model of the hub that `folder` names, if no file or folder of that name exists.
    pub fn hub_id(&self, from: &Path) -> Option<HubId> {
        let folder = self.folder.as_ref().filter(|folder| !from.join(folder).exists())?;
        folder.to_str()?.parse().ok()
    }

    /// The parts that must be in `folder`: those that no other key names.
    ///
    /// Sampling clips needs both experts, also if one is trained.
    pub fn wanted(&self, clips: Clips) -> Vec<Wanted> {
        let has_dit = self.dit.is_some() || self.dit_high.is_some() || self.dit_low.is_some();
        let dit = match self.expert {
            Some(Trained::High) if clips == Clips::None => Wanted::DitHigh,
            Some(Trained::Low) if clips == Clips::None => Wanted::DitLow,
            _ => Wanted::Dit,
        };
        let parts = [
            (dit, has_dit),
            (Wanted::Vae, self.vae.is_some()),
            (Wanted::TextEncoder, self.text_encoder.is_some()),
            (Wanted::Tokenizer, self.tokenizer.is_some()),
            (Wanted::Clip, self.clip.is_some()),
            (Wanted::SpeechEncoder, self.speech_encoder.is_some()),
        ];
        parts.into_iter().filter(|(_, is_named)| !is_named).map(|(part, _)| part).collect()
    }

    /// Parts that are named here but not used with `dit`, one per line.
    pub fn unused(&self, dit: &DitConfig) -> Vec<String> {
        let mut lines = Vec::new();
        if let (Some(clip), None) = (&self.clip, dit.image) {
            lines.push(format!(
                "model.clip: {} is not used: only the image-to-video models of Wan 2.1 use CLIP",
                clip.display()
            ));
        }
        if let (Some(encoder), None) = (&self.speech_encoder, &dit.control.speech) {
            lines.push(format!("model.speech_encoder: {} is not used: only S2V uses one", encoder.display()));
        }
        let (folder, wanted) = (self.folder.as_ref(), self.wanted(Clips::Some));
        let is_replaced = wanted.iter().all(|part| match part {
            Wanted::Clip => dit.image.is_none(),
            Wanted::SpeechEncoder => dit.control.speech.is_none(),
            _ => false,
        });
        if let Some(folder) = folder.filter(|_| is_replaced) {
            lines.push(format!(
                "model.folder: only the name of {} is used, since every part is named by a key of its own",
                folder.display()
            ));
        }
        lines
    }

    /// That `arithmetic` works with `base`.
    ///
    /// # Errors
    /// If it does not.
    pub(super) fn check_arithmetic(&self) -> Result<()> {
        let checked = self.arithmetic.unwrap_or_default().with_base(self.base);
        checked.map_err(|why| Error::Setting { key: "model.arithmetic".into(), why })
    }

    /// The precision of each part: weights that are stored in fp8 stay so by default, if products are not computed in int8.
    fn precision(&self, dit: &Path, text_encoder: &Path, processor: Processor) -> Precision {
        let Self { base, arithmetic, stream, text_base, vae_base, .. } = *self;
        let needed = arithmetic.and_then(Arithmetic::storage);
        // Files that cannot be opened are reported later, when they are opened.
        let stored =
            |path: &Path| Checkpoint::open(path).ok()?.without_model_prefix().ok()?.quantised_layers();
        let (dit, text) = (stored(dit), stored(text_encoder));
        let held = |grid: Option<Grid>| grid.map(|_| WeightFormat::Fp8);
        let wishes = PrecisionRequest {
            base: base.or(needed).or(held(dit)),
            arithmetic,
            stream,
            text_base: text_base.or(held(text)),
            vae_base,
        };
        let base_block = match dit {
            Some(Grid::Block(block)) if needed.is_none() => Some(block),
            _ => None,
        };
        Precision { base_block, ..wishes.settle(processor) }
    }

    /// The expert that is trained: by `expert`, else by the name of a single DiT, or by the key that names it.
    ///
    /// # Errors
    /// If the key and the name of the file disagree.
    fn expert_trained(&self, dits: &Dits) -> Result<Option<Trained>> {
        let Dits::Single(files) = dits else { return Ok(self.expert) };
        if self.expert == Some(Trained::Both) {
            return Ok(self.expert);
        }
        let by_key = match (&self.dit_high, &self.dit_low) {
            (Some(_), _) => Some(Expert::High),
            (_, Some(_)) => Some(Expert::Low),
            _ => None,
        };
        let given = [self.expert.and_then(Trained::one), by_key, files.expert_by_name()];
        let mut given = given.into_iter().flatten();
        let first = given.next();
        match given.find(|other| Some(*other) != first) {
            None => Ok(first.map(Trained::from)),
            Some(other) => {
                let path = files.weights.display();
                let why = format!(
                    "{path} is given as the expert for high noise and for low noise ({other} by its name or key)"
                );
                Err(Error::Setting { key: "model.expert".into(), why })
            }
        }
    }

    /// The DiT, or both experts: those named by keys take precedence over the folder's.
    fn dits(&self, from: &Path, layout: Option<&Layout>) -> Result<Dits> {
        let refuse = |why: &str| Err(Error::Setting { key: "model.dit".into(), why: why.into() });
        let config = || {
            let named = self.dit_config.as_ref();
            named.map(|config| existing("model.dit_config", from, config)).transpose()
        };
        let files = |key: &str, path: &PathBuf| DitFiles::at(&existing(key, from, path)?, config()?);
        let high = |path: &PathBuf| files("model.dit_high", path);
        let low = |path: &PathBuf| files("model.dit_low", path);
        match (&self.dit, &self.dit_high, &self.dit_low, layout) {
            (Some(_), Some(_), ..) | (Some(_), _, Some(_), _) => {
                refuse("names one DiT, and model.dit_high or model.dit_low another; keep the one or the pair")
            }
            (None, Some(one), Some(other), _) => Dits::pair(high(one)?, low(other)?),
            (Some(one), ..) => Ok(Dits::Single(files("model.dit", one)?)),
            (None, Some(one), None, _) => Ok(Dits::Single(high(one)?)),
            (None, None, Some(one), _) => Ok(Dits::Single(low(one)?)),
            (None, None, None, Some(layout)) => layout.dits(config()?),
            (None, None, None, None) => Err(unnamed(Part::Dit)),
        }
    }
}

/// `part` is named by no key.
fn unnamed(part: Part) -> Error {
    let key = part.key();
    let hint = match part {
        Part::Tokenizer => "; it is embedded in ComfyUI's umt5_xxl files",
        _ => "",
    };
    let why = format!(
        "the base model has no {key}: set model.folder to a whole model, or model.{key} to this part{hint}"
    );
    Error::Setting { key: "[model]".into(), why }
}

/// The name of the model at `path`.
fn model_name(path: &Path) -> String {
    // In the hub's cache a folder is named by a commit, and the one two levels up by the model.
    let cached = path.ancestors().nth(2).and_then(Path::file_name).map(|name| name.to_string_lossy());
    if let Some((_, name)) =
        cached.as_deref().and_then(|name| name.strip_prefix("models--")?.split_once("--"))
    {
        return name.to_owned();
    }
    // A folder's name may have dots: Wan2.1-T2V-1.3B.
    let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
    name.map_or_else(|| "wan".into(), |name| name.to_string_lossy().into_owned())
}

/// Whether the tokenizer is embedded in a text encoder's file.
pub(crate) fn carries_tokenizer(text_encoder: &Path) -> bool {
    Checkpoint::open(text_encoder).is_ok_and(|file| file.contains(SPIECE_TENSOR))
}

impl BaseModel {
    /// Opens the DiT that is trained: checks its files against each other, from headers alone.
    ///
    /// # Errors
    /// Those of [`Self::trained_dit`] and of [`DitFiles::open`].
    pub fn open_dit(&self) -> Result<(DitConfig, Weights)> {
        self.trained_dit()?.open()
    }

    /// Checks every part, so that missing ones are reported before a run begins; returns the sizes of the DiT that is trained.
    ///
    /// # Errors
    /// Those of [`Self::open_dit`], [`Self::check_expert`] and [`Self::check_encoders`].
    pub fn check(&self) -> Result<DitConfig> {
        let (dit, weights) = self.open_dit()?;
        self.check_expert(&weights)?;
        self.check_experts()?;
        self.check_encoders(&dit)?;
        Ok(dit)
    }

    /// Checks that it is known which expert a DiT is, if it is one of two, since its noise levels depend on it; and that a DiT
    /// which is not an expert is not given as one.
    ///
    /// # Errors
    /// [`Error::WhichExpert`], and if a model of one network is trained as an expert.
    pub fn check_expert(&self, weights: &Weights) -> Result<()> {
        let Dits::Single(files) = &self.dits else { return Ok(()) };
        let facts = Facts::read(|name| weights.shape(name).map(<[usize]>::to_vec));
        let found = Published::at(facts, &files.weights);
        match (found.as_slice(), self.expert) {
            ([one], None) if one.networks == Networks::Pair => {
                Err(Error::WhichExpert { path: files.weights.clone(), model: one.network() })
            }
            ([one], Some(Trained::High | Trained::Low)) if one.networks == Networks::Whole => {
                let why = format!(
                    "{} is {}, one network for all noise levels: leave the key out, and name the file with model.dit where \
                     model.dit_high or model.dit_low does, or its own name tells of high or low noise",
                    files.weights.display(),
                    one.title
                );
                Err(Error::Setting { key: "model.expert".into(), why })
            }
            _ => Ok(()),
        }
    }

    /// The path of the CLIP vision tower.
    ///
    /// # Errors
    /// If there is none.
    pub fn clip(&self) -> Result<&Path> {
        self.clip.as_deref().ok_or_else(|| {
            let looked = "image_encoder and models_clip_*.pth in model.folder".into();
            Error::NoModelPart { key: Part::Clip.key(), looked }
        })
    }

    /// Checks the parts that are used with `dit`, so that missing ones are reported before a run begins: headers, and the whole
    /// tokenizer.
    ///
    /// # Errors
    /// If a part cannot be opened.
    pub fn check_encoders(&self, dit: &DitConfig) -> Result<()> {
        let open = |path: &Path| Checkpoint::open(path).map_err(models::Error::from);
        check_vae(&Sizes::detect(&open(&self.vae)?)?.0, dit)?;
        Contents::TextEncoder.check(&open(&self.text_encoder)?)?;
        if dit.image.is_some() {
            Contents::Clip.check(&open(self.clip()?)?)?;
        }
        if let Some(speech) = &dit.control.speech {
            check_speech(&SpeechEncoder::sizes_at(self.speech_encoder()?, None)?, speech)?;
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
        let tokenizer = Tokenizer::fingerprint_at(&self.tokenizer)?;
        Ok(format!("{weights} {tokenizer} {}", precision::in_words(self.precision.text())))
    }
}
