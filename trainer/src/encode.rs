//! Filling the cache: every clip through the VAE, every prompt through the text encoder, each loaded alone and dropped.
//!
//! An entry that is there and whole is not made again, so a run that is killed while caching loses nothing.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};
use data::{Cache, Clip, ContentHashes, Dataset, HostTensor, Key, Lookup, Storage, Window};
use models::vae::{Tiling, Vae};

use crate::base::BaseModel;
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::ui::Ui;

/// Name of the one tensor of an entry.
const LATENTS: &str = "latents";
const TEXT: &str = "text";

/// The cache with what its keys are made of.
#[derive(Debug)]
pub struct Encoded {
    cache: Cache,
    text_identity: String,
    /// The entry of each window of the dataset, in its order; empty until clips were encoded.
    clips: Vec<Key>,
}

/// What encoding works with.
#[derive(Debug, Clone, Copy)]
pub struct Encoding<'a> {
    /// The base model, of which VAE and text encoder are loaded.
    pub model: &'a BaseModel,
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
        Ok(Self { cache: Cache::open(folder)?, text_identity: model.text_identity()?, clips: Vec::new() })
    }

    /// Encodes every window of `dataset` that is not cached.
    ///
    /// # Errors
    /// Clips that cannot be decoded, latents that are not finite, a cache that takes no files.
    pub fn encode_clips(&mut self, dataset: &Dataset, with: &Encoding) -> Result<()> {
        let Encoding { model, device, interrupt, ui } = *with;
        let vae = model.load_vae(device)?;
        let identity = format!("{} {}", vae.fingerprint(), model.precision.vae().as_str());
        let mut hashes = ContentHashes::open(&self.cache);
        self.clips.clear();
        for window in &dataset.windows {
            let content = hashes.of(&dataset.sources[window.source].item.media)?;
            self.clips.push(dataset.key(window, &content, &identity));
        }
        let missing = self.missing_clips(dataset, ui)?;
        if missing.is_empty() {
            return Ok(());
        }
        self.cache.check_writable()?;
        hashes.save()?;
        let bar = ui.bar("encoding clips", missing.len());
        let sources: BTreeSet<usize> = missing.iter().map(|&i| dataset.windows[i].source).collect();
        for source in sources {
            let mut indices: Vec<usize> =
                missing.iter().copied().filter(|&i| dataset.windows[i].source == source).collect();
            indices.sort_by_key(|&i| dataset.windows[i].start);
            let windows: Vec<Window> = indices.iter().map(|&i| dataset.windows[i]).collect();
            for (&index, clip) in indices.iter().zip(dataset.clips(source, &windows)?) {
                self.put_clip(&self.clips[index], &vae, &clip?)?;
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
        for (index, key) in self.clips.iter().enumerate() {
            if let Lookup::Miss { reason } = self.cache.get(key)? {
                if let data::MissReason::Damaged(_) = reason {
                    let id = &dataset.sources[dataset.windows[index].source].item.id;
                    ui.note(&format!("{id}: {reason}; it is made again"));
                }
                missing.push(index);
            }
        }
        Ok(missing)
    }

    fn put_clip(&self, key: &Key, vae: &Vae, clip: &Clip) -> Result<()> {
        let bucket = clip.bucket;
        let shape = (1, 3, bucket.frames as usize, bucket.height as usize, bucket.width as usize);
        let video = Tensor::from_vec(clip.planes(), shape, &Device::Cpu)?.to_device(vae.device())?;
        let latents = to_host(&vae.encode(&video, Tiling::Off)?.squeeze(0)?)?;
        if latents.data().iter().any(|v| !v.is_finite()) {
            return Err(Error::NonFiniteLatents { clip: clip.source.clone() });
        }
        let meta = BTreeMap::from([("source".to_owned(), clip.source.clone())]);
        Ok(self.cache.put(key, &[(LATENTS, &latents, Storage::F32)], &meta)?)
    }

    /// Encodes every prompt that is not cached. The encoder is only loaded when there is one.
    pub fn encode_prompts<'a>(
        &self,
        prompts: impl IntoIterator<Item = &'a str>,
        with: &Encoding,
    ) -> Result<()> {
        let Encoding { model, device, interrupt, ui } = *with;
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
        self.tensor(&self.clips[index], LATENTS)
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

fn to_host(tensor: &Tensor) -> Result<HostTensor> {
    let data: Vec<f32> = tensor.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
    let host = HostTensor::new(tensor.dims().to_vec(), data);
    host.ok_or_else(|| {
        Error::Tensor(candle_core::Error::msg("a tensor has more or fewer values than its shape"))
    })
}
