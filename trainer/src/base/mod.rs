//! The base model on disk: which files it is made of, and opening each of them.

mod assumed;
pub(crate) mod comfy;
mod dit;
mod encoders;
pub mod hub;
mod layout;
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
use models::weights::{Checkpoint, Grid, Weights};
use serde::{Deserialize, Serialize};

use crate::base::hub::{HubError, HubId, Wanted};
use crate::error::{Error, Result};
use crate::machine::precision::{self, Float, Precision, PrecisionRequest, Processor, WeightFormat};
use crate::paths::existing;

pub use dit::{DitFiles, Dits};
pub use encoders::EncoderSizes;
pub use layout::{Part, locate, locate_dits};
pub use trained::Trained;

use layout::Layout;

/// Where the base model lies. `folder` alone is enough for a folder in the official or the diffusers layout; the other
/// keys replace single parts of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// A checkpoint folder, official or diffusers layout; a model of the Hugging Face hub as `owner/name`, with `@revision`
    /// behind it where it is not `main`; or ComfyUI's folder of models, of which the files that belong to Wan are found.
    pub folder: Option<PathBuf>,
    /// The DiT: a weights file, or a folder with shards. A `config.json` beside it is read where there is one.
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
    /// `tokenizer.json` or `spiece.model`, the folder of one, or a text encoder's file that carries it.
    pub tokenizer: Option<PathBuf>,
    /// The CLIP vision tower, which the image-to-video models of Wan 2.1 look at pictures with: a file, or a diffusers
    /// `image_encoder` folder.
    pub clip: Option<PathBuf>,
    /// What the DiT's weights are held in: `bf16`, `fp8`, `int8`, or `f32`. `fp8` and `int8` code the matrices inside the
    /// blocks while they are read. Default `bf16`, or `fp8` where the file is; on the CPU `bf16` becomes `f32`.
    pub base: Option<WeightFormat>,
    /// The DiT's residual stream: `float32`, or `bfloat16`, which halves what is kept of each block. Default `float32`.
    pub stream: Option<Float>,
    /// What the text encoder's weights are held in, as `base`.
    pub text_base: Option<WeightFormat>,
    /// What the VAE is held and computed in: `bfloat16` or `float32`. Default `bfloat16`, on the CPU `float32`.
    pub vae_base: Option<Float>,
}

/// The files of a base model, each settled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseModel {
    /// What people call it: the name of its folder.
    pub name: String,
    /// Its DiT, or both experts.
    pub dits: Dits,
    /// What is trained of two experts; of a single DiT, the one that it is, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expert: Option<Trained>,
    /// The VAE.
    pub vae: PathBuf,
    /// The text encoder.
    pub text_encoder: PathBuf,
    /// The tokenizer.
    pub tokenizer: PathBuf,
    /// The CLIP vision tower, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip: Option<PathBuf>,
    /// The sigma from which on the expert for high noise works: what `model_index.json` tells, in a plan the model's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boundary: Option<f64>,
    /// How each part is held and computed.
    pub precision: Precision,
}

/// Whether clips are made with a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clips {
    /// None are.
    None,
    /// Some are.
    Some,
}

/// Checks that the VAE's latents are those that the DiT works on.
///
/// # Errors
/// The VAE of another generation.
pub fn check_vae(vae: &Sizes, dit: &DitConfig) -> Result<()> {
    if vae.latent == dit.out_channels {
        return Ok(());
    }
    let why = format!(
        "it makes latents of {} channels, and the DiT works on {}: Wan2.1_VAE (16) belongs to all models but TI2V-5B, \
         Wan2.2_VAE (48) to that one alone",
        vae.latent, dit.out_channels
    );
    Err(Error::Setting { key: "model.vae".into(), why })
}

impl ModelConfig {
    /// Settles every file, and the precision for a model that runs on `processor`. Relative paths are taken from `from`, the
    /// folder of the recipe.
    ///
    /// # Errors
    /// A part that is nowhere, naming it, where it was looked for, and the key that would name it.
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
        let dits = self.dits(from, layout.as_ref())?;
        let expert = self.told_expert(&dits)?;
        let text_encoder = part(Part::TextEncoder, &self.text_encoder)?;
        let first = &dits.of(Expert::High).weights;
        let named = folder.as_deref().unwrap_or(first);
        Ok(BaseModel {
            name: model_name(named),
            vae: part(Part::Vae, &self.vae)?,
            tokenizer: match part(Part::Tokenizer, &self.tokenizer) {
                // Single files carry their own.
                Err(_) if self.tokenizer.is_none() && carries_tokenizer(&text_encoder) => {
                    text_encoder.clone()
                }
                found => found?,
            },
            clip: match part(Part::Clip, &self.clip) {
                Err(_) if self.clip.is_none() => None,
                found => Some(found?),
            },
            boundary: dits.experts().and(layout.as_ref()).and_then(Layout::boundary),
            precision: self.precision(
                &dits.of(expert.and_then(Trained::one).unwrap_or(Expert::High)).weights,
                &text_encoder,
                processor,
            ),
            text_encoder,
            expert,
            dits,
        })
    }

    /// The model of the hub that `folder` names, where there is nothing of that name.
    pub fn hub_id(&self, from: &Path) -> Option<HubId> {
        let folder = self.folder.as_ref().filter(|folder| !from.join(folder).exists())?;
        folder.to_str()?.parse().ok()
    }

    /// The parts that `folder` has to have: those that no other key names.
    ///
    /// Clips take both experts, whichever is trained.
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
        ];
        parts.into_iter().filter(|(_, is_named)| !is_named).map(|(part, _)| part).collect()
    }

    /// What is named here and `dit` has no use for, a line each.
    pub fn unused(&self, dit: &DitConfig) -> Vec<String> {
        let mut lines = Vec::new();
        if let (Some(clip), None) = (&self.clip, dit.image) {
            lines.push(format!(
                "model.clip: {} is not used: of all models only the image-to-video ones of Wan 2.1 look through CLIP",
                clip.display()
            ));
        }
        let (folder, wanted) = (self.folder.as_ref(), self.wanted(Clips::Some));
        let is_replaced = wanted.iter().all(|part| *part == Wanted::Clip && dit.image.is_none());
        if let Some(folder) = folder.filter(|_| is_replaced) {
            lines.push(format!(
                "model.folder: nothing of {} is used but its name, since every part is named by a key of its own",
                folder.display()
            ));
        }
        lines
    }

    /// How each part is held: what is stored in fp8 stays so where nothing else is said.
    fn precision(&self, dit: &Path, text_encoder: &Path, processor: Processor) -> Precision {
        let Self { base, stream, text_base, vae_base, .. } = *self;
        // Files that do not open are told about when they are.
        let stored =
            |path: &Path| Checkpoint::open(path).ok()?.without_model_prefix().ok()?.quantised_layers();
        let (dit, text) = (stored(dit), stored(text_encoder));
        let held = |grid: Option<Grid>| grid.map(|_| WeightFormat::Fp8);
        let wishes = PrecisionRequest {
            base: base.or(held(dit)),
            stream,
            text_base: text_base.or(held(text)),
            vae_base,
        };
        let base_block = match dit {
            Some(Grid::Block(block)) => Some(block),
            _ => None,
        };
        Precision { base_block, ..wishes.settle(processor) }
    }

    /// The expert that is trained: the key, else the name of a single DiT, or the key that names it.
    ///
    /// # Errors
    /// When the key and the name of the file disagree.
    fn told_expert(&self, dits: &Dits) -> Result<Option<Trained>> {
        let Dits::Single(files) = dits else { return Ok(self.expert) };
        if self.expert == Some(Trained::Both) {
            return Ok(self.expert);
        }
        let by_key = match (&self.dit_high, &self.dit_low) {
            (Some(_), _) => Some(Expert::High),
            (_, Some(_)) => Some(Expert::Low),
            _ => None,
        };
        let told = [self.expert.and_then(Trained::one), by_key, files.told_expert()];
        let mut told = told.into_iter().flatten();
        let first = told.next();
        match told.find(|other| Some(*other) != first) {
            None => Ok(first.map(Trained::from)),
            Some(other) => {
                let path = files.weights.display();
                let why = format!(
                    "{path} is told to be the expert for high noise and for low noise ({other} by its name or key)"
                );
                Err(Error::Setting { key: "model.expert".into(), why })
            }
        }
    }

    /// The DiT, or both experts: what is named goes before what the folder has.
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
        Part::Tokenizer => "; ComfyUI's umt5_xxl files carry it",
        _ => "",
    };
    let why = format!(
        "the base model has no {key}: set model.folder to a whole model, or model.{key} to this part{hint}"
    );
    Error::Setting { key: "[model]".into(), why }
}

/// What people call the model at `path`.
fn model_name(path: &Path) -> String {
    // In the hub's cache a folder has the name of a commit, and the one two above it that of the model.
    let cached = path.ancestors().nth(2).and_then(Path::file_name).map(|name| name.to_string_lossy());
    if let Some((_, name)) =
        cached.as_deref().and_then(|name| name.strip_prefix("models--")?.split_once("--"))
    {
        return name.to_owned();
    }
    // A folder's name may hold dots of its own: Wan2.1-T2V-1.3B.
    let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
    name.map_or_else(|| "wan".into(), |name| name.to_string_lossy().into_owned())
}

/// Whether a text encoder's file holds its tokenizer.
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

    /// Looks at every part, so that what is missing is told before a run begins; the sizes of the DiT that is trained.
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

    /// Asks which expert a DiT is, where it is one of two and nothing says which: the noise levels that it is made for
    /// depend on it. One that is no expert must not be told to be one.
    ///
    /// # Errors
    /// [`Error::WhichExpert`], and a whole model that is trained as an expert.
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

    /// Where the CLIP vision tower lies.
    ///
    /// # Errors
    /// When there is none.
    pub fn clip(&self) -> Result<&Path> {
        self.clip.as_deref().ok_or_else(|| {
            let looked = "image_encoder and models_clip_*.pth in model.folder".into();
            Error::NoModelPart { key: Part::Clip.key(), looked }
        })
    }

    /// Looks at the parts that go with `dit`, so that what is missing is told before a run begins: headers, and the
    /// tokenizer whole.
    ///
    /// # Errors
    /// A part that does not open.
    pub fn check_encoders(&self, dit: &DitConfig) -> Result<()> {
        let open = |path: &Path| Checkpoint::open(path).map_err(models::Error::from);
        check_vae(&Sizes::detect(&open(&self.vae)?)?.0, dit)?;
        Contents::TextEncoder.check(&open(&self.text_encoder)?)?;
        if dit.image.is_some() {
            Contents::Clip.check(&open(self.clip()?)?)?;
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
