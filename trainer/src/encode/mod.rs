//! Filling the cache: every clip through the VAE, every prompt through the text encoder, each loaded alone and dropped.
//!
//! An entry that is there and whole is not made again, so a run that is killed while caching loses nothing.

mod pictures;
mod shown;
mod views;

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};
use data::{Cache, Clip, ContentHashes, Dataset, HostTensor, Key, Lookup, Storage, Window};
use models::clip::Clip as Tower;
use models::dit::{DitConfig, Pictures};
use models::vae::{Tiling, Vae};

pub use shown::{Ends, Shown, condition, mask, with_mask};

use crate::base::BaseModel;
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::ui::Ui;

/// Name of the one tensor of an entry.
const LATENTS: &str = "latents";
const TEXT: &str = "text";
const STATES: &str = "states";

/// The cache with what its keys are made of.
#[derive(Debug)]
pub struct Encoded {
    cache: Cache,
    text_identity: String,
    /// The entries of each window of the dataset, in its order; empty until clips were encoded.
    clips: Vec<ClipKeys>,
    /// The entries of the pictures of requests, by what tells them apart.
    pictures: BTreeMap<String, pictures::PictureKeys>,
    /// Which frames an image-to-video model is given.
    ends: Ends,
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
#[derive(Debug, Clone, Copy)]
pub struct Encoding<'a> {
    /// The base model, of which VAE and text encoder are loaded.
    pub model: &'a BaseModel,
    /// The DiT that all is encoded for.
    pub dit: &'a DitConfig,
    /// Where they run.
    pub device: &'a Device,
    /// Looked at after every item; what is finished stays.
    pub interrupt: &'a Interrupt,
    /// For progress bars.
    pub ui: &'a Ui,
}

impl Encoded {
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
            ends: Ends::First,
        })
    }

    /// Encodes every window of `dataset` that is not cached.
    ///
    /// # Errors
    /// Clips that cannot be decoded, latents that are not finite, a cache that takes no files.
    pub fn encode_clips(&mut self, dataset: &Dataset, with: &Encoding) -> Result<()> {
        let Encoding { interrupt, ui, .. } = *with;
        let vae = with.vae()?;
        let identity = with.vae_identity(&vae);
        self.ends = if with.sees_two() { Ends::Both } else { Ends::First };
        let mut hashes = ContentHashes::open(&self.cache);
        self.clips.clear();
        for window in &dataset.windows {
            let content = hashes.of(&dataset.sources[window.source].item.media)?;
            let latents = dataset.key(window, &content, &identity);
            let condition = || Key::of(&["condition", &latents.to_string(), self.ends.name()]);
            let condition = (with.dit.pictures() == Pictures::Beside).then(condition);
            self.clips.push(ClipKeys { latents, condition, states: None });
        }
        let missing = self.missing_clips(dataset, ui)?;
        if missing.is_empty() {
            // A complete cache may be read-only: then clips are hashed anew each time.
            if let Err(error) = hashes.save() {
                ui.note(&format!("{error}; every start reads all clips to know them again"));
            }
        } else {
            self.cache.check_writable()?;
            hashes.save()?;
            self.encode_missing(dataset, &missing, &vae, interrupt, ui)?;
        }
        drop(vae);
        if with.dit.image.is_some() { self.encode_views(dataset, with) } else { Ok(()) }
    }

    fn encode_missing(
        &self,
        dataset: &Dataset,
        missing: &[usize],
        vae: &Vae,
        interrupt: &Interrupt,
        ui: &Ui,
    ) -> Result<()> {
        let bar = ui.bar("encoding clips", missing.len());
        let sources: BTreeSet<usize> = missing.iter().map(|&i| dataset.windows[i].source).collect();
        for source in sources {
            let mut indices: Vec<usize> =
                missing.iter().copied().filter(|&i| dataset.windows[i].source == source).collect();
            indices.sort_by_key(|&i| dataset.windows[i].start);
            let windows: Vec<Window> = indices.iter().map(|&i| dataset.windows[i]).collect();
            for (&index, clip) in indices.iter().zip(dataset.clips(source, &windows)?) {
                // Before a verdict: what stops this program may have stopped ffmpeg too.
                interrupt.check()?;
                self.put_clip(&self.clips[index], vae, &clip?)?;
                interrupt.check()?;
                bar.inc(1);
            }
        }
        bar.finish();
        Ok(())
    }

    /// Indices of the windows that have no whole entry.
    fn missing_clips(&self, dataset: &Dataset, ui: &Ui) -> Result<Vec<usize>> {
        let mut missing = Vec::new();
        for (index, keys) in self.clips.iter().enumerate() {
            for key in [Some(&keys.latents), keys.condition.as_ref()].into_iter().flatten() {
                if let Lookup::Miss { reason } = self.cache.get(key)? {
                    if let data::MissReason::Damaged(_) = reason {
                        let id = &dataset.sources[dataset.windows[index].source].item.id;
                        ui.note(&format!("{id}: {reason}; it is made again"));
                    }
                    missing.push(index);
                    break;
                }
            }
        }
        Ok(missing)
    }

    fn put_clip(&self, keys: &ClipKeys, vae: &Vae, clip: &Clip) -> Result<()> {
        let bucket = clip.bucket;
        let shape = (1, 3, bucket.frames as usize, bucket.height as usize, bucket.width as usize);
        let video = Tensor::from_vec(clip.planes(), shape, &Device::Cpu)?.to_device(vae.device())?;
        self.put(&keys.latents, (LATENTS, &vae.encode(&video, Tiling::Off)?.squeeze(0)?), clip)?;
        if let Some(key) = &keys.condition {
            let frame = |n: usize| -> Result<Tensor> { Ok(video.get(0)?.narrow(1, n, 1)?.squeeze(1)?) };
            let last = match self.ends {
                Ends::Both => Some(frame(bucket.frames as usize - 1)?),
                Ends::First => None,
            };
            let latents = condition(vae, &frame(0)?, last.as_ref(), bucket.frames as usize)?;
            self.put(key, (LATENTS, &latents), clip)?;
        }
        Ok(())
    }

    /// Keeps one tensor of a clip.
    fn put(&self, key: &Key, (name, tensor): (&str, &Tensor), clip: &Clip) -> Result<()> {
        let host = to_host(tensor)?;
        if host.data().iter().any(|v| !v.is_finite()) {
            return Err(Error::NonFiniteLatents { clip: clip.source.clone() });
        }
        let meta = BTreeMap::from([("source".to_owned(), clip.source.clone())]);
        Ok(self.cache.put(key, &[(name, &host, Storage::F32)], &meta)?)
    }

    /// Encodes every prompt that is not cached. The encoder is only loaded when there is one.
    pub fn encode_prompts<'a>(
        &self,
        prompts: impl IntoIterator<Item = &'a str>,
        with: &Encoding,
    ) -> Result<()> {
        let Encoding { model, device, interrupt, ui, .. } = *with;
        let mut missing = BTreeSet::new();
        for prompt in prompts {
            if !matches!(self.cache.get(&self.text_key(prompt))?, Lookup::Hit(_)) {
                missing.insert(prompt);
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        self.cache.check_writable()?;
        let encoder = model.load_text_encoder(device)?;
        let bar = ui.bar("encoding prompts", missing.len());
        for prompt in missing {
            let states = to_host(&encoder.encode_prompt(prompt)?)?;
            let meta = BTreeMap::from([("prompt".to_owned(), prompt.to_owned())]);
            self.cache.put(&self.text_key(prompt), &[(TEXT, &states, Storage::F32)], &meta)?;
            interrupt.check()?;
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
    /// As [`Encoded::latents`].
    pub fn ends(&self, index: usize) -> Result<Shown> {
        let keys = &self.clips[index];
        let of = |key: &Option<Key>, name| key.as_ref().map(|key| self.tensor(key, name)).transpose();
        let beside = of(&keys.condition, LATENTS)?.map(|latents| with_mask(&latents, self.ends));
        Ok(Shown {
            beside_bcthw: beside.transpose()?,
            states_bsd: of(&keys.states, STATES)?,
            first_bcthw: None,
        })
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
            Lookup::Miss { reason } => Err(Error::CacheEntryGone { why: reason.to_string() }),
        }
    }
}

impl Encoding<'_> {
    /// Loads the VAE.
    ///
    /// # Errors
    /// Files that do not open, and the VAE of another model.
    pub fn vae(&self) -> Result<Vae> {
        let vae = self.model.load_vae(self.device)?;
        crate::base::check_vae(vae.sizes(), self.dit)?;
        Ok(vae)
    }

    /// Whether the model looks at a first and a last picture.
    pub(crate) fn sees_two(&self) -> bool {
        self.dit.image.is_some_and(|image| image.positions.is_some())
    }

    fn vae_identity(&self, vae: &Vae) -> String {
        format!("{} {}", vae.fingerprint(), self.model.precision.vae().as_str())
    }

    fn clip(&self) -> Result<Tower> {
        Ok(Tower::load(self.model.clip()?, None, self.model.precision.compute.dtype(), self.device)?)
    }

    fn clip_identity(&self, tower: &Tower) -> String {
        format!("{} {}", tower.fingerprint(), self.model.precision.compute.dtype().as_str())
    }
}

fn to_host(tensor: &Tensor) -> Result<HostTensor> {
    let data: Vec<f32> = tensor.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
    let host = HostTensor::new(tensor.dims().to_vec(), data);
    host.ok_or_else(|| {
        Error::Tensor(candle_core::Error::msg("a tensor has more or fewer values than its shape"))
    })
}
