//! Filling the cache: every clip through the VAE and, where the model looks through it, CLIP; every prompt through the text
//! encoder. Each is loaded only where something is missing.
//!
//! An entry that exists and is whole is not encoded again, so a run that is killed while caching loses nothing.

mod accompanied;
mod animated;
mod clips;
pub mod conditions;
mod heard;
mod heard_clip;
pub(crate) mod length;
mod loss_masks;
mod picture_inputs;
mod pictures;
pub mod preset;
pub mod prompt;
mod requested;
mod views;

use std::collections::{BTreeMap, BTreeSet};

use data::{Cache, HostTensor, Key, Lookup, MaskRule, MissReason, Storage};
use kernels::{DType, Device, Tensor};
use models::dit::{Conditioning, DitConfig, Role};
use models::vae::Vae;
use models::weights::Checkpoint;

pub use accompanied::LeftOut;
pub use animated::LaterScene;
pub(crate) use picture_inputs::condition_there;
pub use picture_inputs::{GivenFrames, Later, PictureInputs, condition, mask, with_mask};

use crate::base::BaseModel;
use crate::error::{Error, Result};
use crate::replicas::Share;
use crate::residents::Residents;
use crate::watch::interrupt::Interrupt;

/// Name of the one tensor of an entry.
const LATENTS: &str = "latents";
const TEXT: &str = "text";
const STATES: &str = "states";

/// The cache with what its keys are made of.
#[derive(Debug)]
pub struct LatentStore {
    cache: Cache,
    text_identity: String,
    /// The entries of each window of the dataset, in its order; empty until clips were encoded.
    clips: Vec<ClipKeys>,
    /// The entries of the pictures of requests, by what distinguishes them.
    pictures: BTreeMap<String, pictures::PictureKeys>,
    /// The entries of the conditions of requests to control models, likewise.
    requested: BTreeMap<String, requested::RequestKeys>,
    /// The control model that clips were encoded for; nothing for another model.
    control_model: Option<DitConfig>,
    /// Whether a first frame that is given to the model that clips were encoded for also takes its place.
    in_place: bool,
    /// The rules that make VACE's masks.
    rules: Vec<MaskRule>,
    /// What accompanies each window, for control models.
    accompanied: Vec<accompanied::Accompanied>,
    /// The entries of the masks of the loss of each window; empty where no clip has one.
    loss_masks: Vec<Option<Key>>,
    /// Which frames an image-to-video model is given.
    ends: GivenFrames,
    check: Check,
    /// The windows that are encoded here: the others are left to other replicas.
    share: Share,
}

/// How closely entries are looked at before it is decided what is to be encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    /// Heads and lengths of their files: the checksum is verified when an entry is first used.
    Head,
    /// The checksum too, which reads the whole cache.
    Checksum,
}

/// The entries of a window.
#[derive(Debug, Clone)]
struct ClipKeys {
    latents: Key,
    /// The latents of a clip of which only the ends are known, for models that take them beside the noise.
    condition: Option<Key>,
    /// CLIP's states of the ends, for models that look at them.
    states: Option<Key>,
}

/// What encoding works with.
#[derive(Debug)]
pub struct Encoding<'a> {
    /// The encoders, and the DiT that they encode for.
    pub residents: &'a mut Residents,
    /// Looked at after every item; what is finished stays.
    pub interrupt: &'a Interrupt,
}

impl LatentStore {
    /// Opens the cache for prompts of `model`.
    ///
    /// # Errors
    /// A cache folder that cannot be made, and a text encoder whose files do not open.
    pub fn open(folder: &std::path::Path, model: &BaseModel) -> Result<Self> {
        Ok(Self {
            cache: Cache::open(folder)?,
            text_identity: model.text_identity()?,
            clips: Vec::new(),
            pictures: BTreeMap::new(),
            requested: BTreeMap::new(),
            control_model: None,
            in_place: false,
            rules: Vec::new(),
            accompanied: Vec::new(),
            loss_masks: Vec::new(),
            ends: GivenFrames::First,
            check: Check::Head,
            share: Share::WHOLE,
        })
    }

    /// The same, looking at entries as closely as `check` says; [`LatentStore::open`] looks at their heads.
    pub fn checking(self, check: Check) -> Self {
        Self { check, ..self }
    }

    /// The same, for VACE's masks made by `rules`.
    pub fn masking(self, rules: &[MaskRule]) -> Self {
        Self { rules: rules.to_vec(), ..self }
    }

    /// The same, encoding no windows but those of `share`.
    pub fn sharing(self, share: Share) -> Self {
        Self { share, ..self }
    }

    /// Why an entry has to be made; `None` where it is there.
    fn missing(&self, key: &Key) -> Result<Option<MissReason>> {
        Ok(match self.check {
            Check::Head => self.cache.peek(key)?,
            Check::Checksum => match self.cache.get(key)? {
                Lookup::Hit(_) => None,
                Lookup::Miss { reason } => Some(reason),
            },
        })
    }

    /// Whether the cache has whole entries of all `prompts`.
    ///
    /// # Errors
    /// A cache that cannot be read.
    pub fn has_prompts<'a>(&self, prompts: impl IntoIterator<Item = &'a str>) -> Result<bool> {
        for prompt in prompts {
            if self.missing(&self.text_key(prompt))?.is_some() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Encodes every prompt that is not cached. The encoder is only loaded when there is one.
    pub fn encode_prompts<'a>(
        &self,
        prompts: impl IntoIterator<Item = &'a str>,
        with: &mut Encoding,
    ) -> Result<()> {
        let mut missing = BTreeSet::new();
        for prompt in prompts {
            if self.missing(&self.text_key(prompt))?.is_some() {
                missing.insert(prompt);
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        self.cache.check_writable()?;
        let encoder = with.residents.text_encoder()?;
        let bar = with.residents.ui().bar("encoding prompts", missing.len());
        for prompt in missing {
            let states = encoder.encode_prompt(prompt)?;
            let meta = BTreeMap::from([("prompt".to_owned(), prompt.to_owned())]);
            let entry = [(TEXT, &to_host(&states)?, storage(&states))];
            self.cache.put(&self.text_key(prompt), &entry, &meta)?;
            with.interrupt.check()?;
            bar.inc(1);
        }
        bar.finish();
        Ok(())
    }

    /// The latents [c, t, h, w] of the window `index` of the dataset.
    ///
    /// # Errors
    /// When the entry was removed or damaged since it was made.
    pub fn latents(&self, index: usize) -> Result<Tensor> {
        self.tensor(&self.clips[index].latents, LATENTS)
    }

    /// What an image-to-video model is shown of the window `index`: mask and latents [4 + c, t, h, w] of its ends, and
    /// CLIP's states [rows, width] of them; nothing for other models.
    ///
    /// # Errors
    /// As [`LatentStore::latents`].
    pub fn ends(&self, index: usize) -> Result<PictureInputs> {
        let keys = &self.clips[index];
        let of = |key: &Option<Key>, name| key.as_ref().map(|key| self.tensor(key, name)).transpose();
        let beside = of(&keys.condition, LATENTS)?.map(|latents| with_mask(&latents, self.ends));
        Ok(PictureInputs {
            beside_bcthw: beside.transpose()?,
            cond: Conditioning::new().with_optional(Role::PICTURE, of(&keys.states, STATES)?),
            ..PictureInputs::default()
        })
    }

    /// Whether the first frame of a sample stands, clean, in its own place: for models that are given it beside the noise too.
    pub fn is_first_in_place(&self, left_out: LeftOut) -> bool {
        self.in_place && !left_out.start
    }

    /// The text states [s, width] of a prompt.
    ///
    /// # Errors
    /// When the prompt was not encoded, or its entry was removed or damaged.
    pub fn text(&self, prompt: &str) -> Result<Tensor> {
        self.tensor(&self.text_key(prompt), TEXT)
    }

    fn text_key(&self, prompt: &str) -> Key {
        Key::text(prompt, &self.text_identity)
    }

    fn tensor(&self, key: &Key, name: &str) -> Result<Tensor> {
        match self.cache.get(key)? {
            Lookup::Hit(mut entry) => match entry.tensors.remove(name) {
                Some(tensor) => {
                    let shape = tensor.shape().to_vec();
                    Ok(Tensor::from_vec(tensor.into_data(), shape, &Device::Cpu)?)
                }
                None => Err(Error::CacheEntryGone { why: format!("it holds no {name}") }),
            },
            Lookup::Miss { reason } => {
                // The next start looks at heads alone, and would find it again.
                if matches!(reason, MissReason::Damaged(_)) {
                    self.cache.remove(key)?;
                }
                Err(Error::CacheEntryGone { why: reason.to_string() })
            }
        }
    }
}

impl Encoding<'_> {
    /// Whether the model looks at a first and a last picture.
    fn sees_two(&self) -> bool {
        self.residents.dit().image.is_some_and(|image| image.positions.is_some())
    }

    /// What identifies the VAE in the keys of its entries; nothing is loaded.
    fn vae_identity(&self) -> Result<String> {
        let model = self.residents.model();
        let fingerprint = Vae::fingerprint_at(&model.vae, None)?;
        Ok(format!("{fingerprint} {}", model.precision.vae().as_str()))
    }

    /// What identifies the DiT in the keys of what a part of it makes; nothing is loaded.
    fn dit_identity(&self) -> Result<String> {
        Ok(self.residents.model().trained_dit()?.open()?.1.fingerprint()?)
    }

    /// What identifies CLIP in the keys of its entries; nothing is loaded.
    fn clip_identity(&self) -> Result<String> {
        let model = self.residents.model();
        let file = Checkpoint::open(model.clip()?).map_err(models::Error::from)?;
        let fingerprint = file.fingerprint().map_err(models::Error::from)?;
        Ok(format!("{fingerprint} {}", model.precision.compute.dtype().as_str()))
    }
}

/// How numbers are kept: bfloat16 loses nothing of what was computed in it.
fn storage(tensor: &Tensor) -> Storage {
    match tensor.dtype() {
        DType::BF16 => Storage::Bf16,
        _ => Storage::F32,
    }
}

fn to_host(tensor: &Tensor) -> Result<HostTensor> {
    let data: Vec<f32> = tensor.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
    let host = HostTensor::new(tensor.dims().to_vec(), data);
    host.ok_or_else(|| Error::Tensor(kernels::Error::msg("a tensor has more or fewer values than its shape")))
}
