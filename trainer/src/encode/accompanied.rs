//! What accompanies training clips, for control models: control clips, masks and reference pictures through the VAE, pictures
//! through CLIP, camera paths out of their files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use data::{Accompanying, Clip, ContentHashes, Dataset, Key, MaskRule, Picture, Storage, Window};
use kernels::{DType, Device, Tensor};
use models::dit::control::{CAMERA, CONTEXT, REFERENCE};
use models::dit::{Conditioning, DitConfig, Pictures, Raw, Role};
use models::published::Beside;
use models::vae::Vae;

use super::animated::{AnimateKeys, on_black};
use super::conditions::camera::{self, Pose};
use super::conditions::fun::FunLatents;
use super::conditions::{latents, vace};
use super::heard::SpeechKeys;
use super::pictures::planes;
use super::requested::{MASK, mask_of, on_canvas, picture, video};
use super::{Encoding, GivenFrames, LATENTS, LatentStore, PictureInputs, STATES, mask, storage, to_host};
use crate::error::{Error, Result};

/// The entries of what accompanies a window.
#[derive(Debug, Clone, Default)]
pub(super) struct Accompanied {
    /// The latents of the control clip.
    pub(super) control: Option<Key>,
    /// Of VACE: what is kept and what is generated, and the mask.
    edited: Option<Key>,
    /// The latents of the reference pictures.
    pub(super) references: Vec<Key>,
    /// CLIP's states of the reference picture.
    seen: Option<Key>,
    /// The camera's poses, one for each frame.
    poses: Vec<Pose>,
    /// What Animate has besides.
    pub(super) animate: AnimateKeys,
    /// What S2V hears and sees.
    pub(super) speech: SpeechKeys,
}

/// Which conditions of a sample are left out, so that the model still knows what to do without them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// The control clip.
    pub control: bool,
    /// The start picture, or the frames that are given.
    pub start: bool,
    /// The reference picture.
    pub reference: bool,
    /// CLIP's states.
    pub clip: bool,
    /// The motion of faces.
    pub faces: bool,
    /// The sound.
    pub audio: bool,
}

impl LatentStore {
    /// Encodes what accompanies the windows of `dataset` and is not cached, for control models.
    ///
    /// # Errors
    /// Files that cannot be decoded, poses that do not fit their clip, a cache that takes no files.
    pub(super) fn encode_accompanied(&mut self, dataset: &Dataset, with: &mut Encoding) -> Result<()> {
        let facts = with.residents.dit().kind.facts();
        self.in_place = facts.in_place && facts.beside.contains(&Beside::Given);
        if facts.pictures != Pictures::Condition {
            return Ok(());
        }
        self.control_model = Some(with.residents.dit().clone());
        let mut hashes = ContentHashes::open(&self.cache);
        self.name_accompanied(dataset, &mut hashes, with)?;
        let missing = |key: &Key| -> Result<bool> { Ok(self.missing(key)?.is_some()) };
        let (mut by_vae, mut by_clip) = (Vec::new(), Vec::new());
        for (index, own) in self.accompanied.iter().enumerate() {
            let keys = own.references.iter().chain(&own.control).chain(&own.edited);
            let keys = keys.chain(&own.animate.given).chain(&own.speech.poses);
            if keys.map(missing).collect::<Result<Vec<_>>>()?.contains(&true) {
                by_vae.push(index);
            }
            if own.seen.as_ref().map(missing).transpose()?.unwrap_or(false) {
                by_clip.push(index);
            }
        }
        if by_vae.is_empty() && by_clip.is_empty() {
            self.encode_faces(dataset, with)?;
            return self.encode_heard(dataset, with);
        }
        self.cache.check_writable()?;
        hashes.save()?;
        if !by_vae.is_empty() {
            let vae = with.residents.vae()?;
            let bar = with.residents.ui().bar("encoding conditions", by_vae.len());
            for index in by_vae {
                self.put_accompanied(dataset, index, &vae)?;
                with.interrupt.check()?;
                bar.inc(1);
            }
            bar.finish();
        }
        if !by_clip.is_empty() {
            let tower = with.residents.clip()?;
            for index in by_clip {
                let window = &dataset.windows[index];
                if let (Some(key), Some(path)) =
                    (&self.accompanied[index].seen, reference_of(dataset, window))
                {
                    let pixels = tower.pixels(&planes(&Picture::open(path)?)?.unsqueeze(0)?)?;
                    let states = tower.encode(&pixels)?.squeeze(0)?;
                    let entry = [(STATES, &to_host(&states)?, storage(&states))];
                    self.cache.put(key, &entry, &BTreeMap::new())?;
                }
                with.interrupt.check()?;
            }
        }
        self.encode_faces(dataset, with)?;
        self.encode_heard(dataset, with)
    }

    fn name_accompanied(
        &mut self,
        dataset: &Dataset,
        hashes: &mut ContentHashes,
        with: &Encoding,
    ) -> Result<()> {
        let (dit, vae) = (with.residents.dit(), with.vae_identity()?);
        let clip = dit.image.map(|_| with.clip_identity()).transpose()?;
        let facts = dit.kind.facts();
        let identity = facts.faces.then(|| with.dit_identity()).transpose()?;
        let speech = facts.speech.then(|| with.speech_identity()).transpose()?;
        let reads_control = facts.faces || facts.beside.contains(&Beside::Control);
        let mut all = Vec::new();
        for window in &dataset.windows {
            let source = &dataset.sources[window.source];
            let mut own = Accompanied::default();
            if let (true, Some(control)) = (reads_control, &source.companions.control) {
                let content = hashes.of(&control.media)?;
                own.control = Some(dataset.companion_key(window, Accompanying::Control, &content, &vae));
            }
            let is_side_chain = dit.control.side_chain.is_some();
            if is_side_chain {
                own.edited = Some(edited_key(dataset, window, (&self.rules, &vae), hashes)?);
            }
            let read = match (is_side_chain, facts.faces || dit.control.reference.is_some()) {
                (true, _) => source.companions.references.as_slice(),
                (false, true) => source.companions.references.get(..1).unwrap_or_default(),
                (false, false) => &[],
            };
            for path in read {
                let content = hashes.of(&data::Media::Still(path.to_owned()))?;
                let name = match (is_side_chain, facts.faces) {
                    (true, _) => "canvas",
                    (false, true) => "black canvas",
                    (false, false) => "reference",
                };
                own.references.push(Key::of(&[name, &content, &window.bucket.to_string(), &vae]));
                let states = clip.as_ref().map(|clip| Key::of(&["picture", &content, "Official", clip]));
                own.seen = own.seen.or(states);
            }
            if let Some(path) = source.companions.camera.as_deref().filter(|_| dit.control.camera.is_some()) {
                own.poses = poses(dataset, window, path)?;
            }
            if let Some(dit) = &identity {
                own.animate = self.name_animated(dataset, window, (&vae, dit), hashes)?;
            }
            if let Some(speech) = &speech {
                own.speech = self.name_heard(dataset, window, (&vae, speech), hashes)?;
            }
            all.push(own);
        }
        self.accompanied = all;
        Ok(())
    }

    fn put_accompanied(&self, dataset: &Dataset, index: usize, vae: &Vae) -> Result<()> {
        let (own, window) = (&self.accompanied[index], dataset.windows[index]);
        if let Some(key) = &own.control {
            let clip = companion(dataset, &window, Accompanying::Control)?;
            self.put(key, (LATENTS, &latents(vae, &video(&clip)?)?.squeeze(0)?), &clip)?;
        }
        if let Some(key) = &own.edited {
            let (edited, mask) = self.edited(dataset, index)?;
            let latents = vace::kept_and_made(vae, &edited, &mask)?.squeeze(0)?;
            let channels = vace::mask_channels(&mask)?.squeeze(0)?;
            let (host, mask) = (to_host(&latents)?, to_host(&channels)?);
            let entry = [(LATENTS, &host, storage(&latents)), (MASK, &mask, Storage::F32)];
            self.cache.put(key, &entry, &BTreeMap::new())?;
        }
        let size = (window.bucket.width, window.bucket.height);
        let paths = &dataset.sources[window.source].companions.references;
        for (key, path) in own.references.iter().zip(paths) {
            let pixels = match (&own.edited, &own.animate.given) {
                (Some(_), _) => on_canvas(path, size)?,
                (None, Some(_)) => on_black(path, size)?,
                (None, None) => picture(path, size)?,
            };
            let tensor = latents(vae, &pixels)?.squeeze(0)?;
            self.cache.put(key, &[(LATENTS, &to_host(&tensor)?, storage(&tensor))], &BTreeMap::new())?;
        }
        self.put_poses(dataset, (window, &own.speech), vae)?;
        self.put_given(dataset, (window, &own.animate), vae)
    }

    /// The clip of the window `index` as VACE's context has it, [1, 3, f, h, w], and its mask [1, 1, f, h, w].
    fn edited(&self, dataset: &Dataset, index: usize) -> Result<(Tensor, Tensor)> {
        let window = dataset.windows[index];
        let (companions, bucket) = (&dataset.sources[window.source].companions, window.bucket);
        let whole = dataset.clips(window.source, std::slice::from_ref(&window))?.next();
        let whole = whole.transpose()?.ok_or_else(|| gone(dataset, &window, "frames"))?;
        let shape = (1, 1, bucket.frames as usize, bucket.height as usize, bucket.width as usize);
        let mask = match (&companions.mask, rule(&self.rules, self.clips[index].latents)) {
            (Some(_), _) => mask_of(&companion(dataset, &window, Accompanying::Mask)?)?,
            (None, Some((rule, seed))) => {
                let values = rule.mask([shape.2, shape.3, shape.4], seed);
                Tensor::from_vec(values, shape, &Device::Cpu)?
            }
            (None, None) => Tensor::ones(shape, DType::F32, &Device::Cpu)?,
        };
        let control = companions.control.as_ref().map(|_| companion(dataset, &window, Accompanying::Control));
        let control = control.transpose()?.map(|clip| video(&clip)).transpose()?;
        Ok((vace::edited(&video(&whole)?, &mask, control.as_ref())?, mask))
    }

    /// What the model is shown of the window `index` besides noisy latents and text, without a batch axis; control models
    /// without what is `left_out`.
    ///
    /// # Errors
    /// When an entry was removed or damaged since it was made.
    pub fn shown_of_window(&self, index: usize, left_out: LeftOut) -> Result<PictureInputs> {
        match &self.control_model {
            Some(dit) => self.conditions(index, dit, left_out),
            None => self.ends(index),
        }
    }

    fn conditions(&self, index: usize, dit: &DitConfig, left_out: LeftOut) -> Result<PictureInputs> {
        let (own, latents) = (&self.accompanied[index], self.latents(index)?);
        let [channels, frames, height, width] = latents.dims()[..] else {
            return Err(Error::Tensor(kernels::Error::msg("latents of a clip have four axes")));
        };
        if dit.kind.facts().speech {
            return self.heard(&own.speech, &latents, left_out);
        }
        if dit.kind.facts().faces {
            let continued = self.clips[index].condition.as_ref();
            let cond = Conditioning::new().with_optional(Role::PICTURE, self.seen(index, dit, left_out)?);
            return self.animated(own, (&latents, continued), left_out, cond);
        }
        let read = |key: &Option<Key>, is_left_out: bool| -> Result<Option<Tensor>> {
            let key = key.as_ref().filter(|_| !is_left_out);
            key.map(|key| Ok(self.tensor(key, LATENTS)?.unsqueeze(0)?)).transpose()
        };
        // The first latent frame depends on the first frame alone: it is the start picture's.
        let start = (!left_out.start).then(|| latents.narrow(1, 0, 1)?.unsqueeze(0)).transpose()?;
        let given = read(&self.clips[index].condition, left_out.start)?.map(|latents| {
            Ok::<_, Error>((mask(GivenFrames::First, (frames, height, width))?.unsqueeze(0)?, latents))
        });
        let parts =
            FunLatents { control: read(&own.control, left_out.control)?, start, given: given.transpose()? };
        let beside = parts.beside(dit.kind.facts().beside, [channels, frames, height, width])?;
        let mut cond = Conditioning::<Raw>::new();
        if let (Some(_), Some(key)) = (&dit.control.side_chain, &own.edited) {
            let one = |name| Ok::<_, Error>(self.tensor(key, name)?.unsqueeze(0)?);
            let references = own.references.iter().map(|key| Ok(self.tensor(key, LATENTS)?.unsqueeze(0)?));
            let references = references.collect::<Result<Vec<_>>>()?;
            let context = vace::assembled(&one(LATENTS)?, &one(MASK)?, &references)?;
            cond.insert(CONTEXT, context.squeeze(0)?);
            let in_front = (!references.is_empty()).then(|| Tensor::cat(&references, 2)?.squeeze(0));
            return Ok(PictureInputs {
                cond,
                in_front_bcthw: in_front.transpose()?,
                ..PictureInputs::default()
            });
        }
        if let Some(channels) = dit.control.reference {
            let latents = read(&own.references.first().copied(), left_out.reference)?;
            let nothing = || Tensor::zeros((channels, height, width), DType::F32, &Device::Cpu);
            cond.insert(REFERENCE, latents.map_or_else(nothing, |x| x.squeeze(0)?.squeeze(1))?);
        }
        if let Some(sizes) = dit.control.camera {
            let size = (height * sizes.stride, width * sizes.stride);
            cond.insert(CAMERA, camera::packed(&own.poses, size)?.squeeze(0)?);
        }
        let cond = cond.with_optional(Role::PICTURE, self.seen(index, dit, left_out)?);
        let beside_bcthw = beside.map(|beside| beside.squeeze(0)).transpose()?;
        Ok(PictureInputs { beside_bcthw, cond, ..PictureInputs::default() })
    }
}

impl LatentStore {
    /// CLIP's states [rows, width] of the reference of the window `index`, else of its first frame; zeros where they are left out,
    /// nothing for a model without them.
    fn seen(&self, index: usize, dit: &DitConfig, left_out: LeftOut) -> Result<Option<Tensor>> {
        let Some(image) = dit.image else { return Ok(None) };
        let own = self.accompanied[index].seen.as_ref().or(self.clips[index].states.as_ref());
        match own.filter(|_| !left_out.clip) {
            Some(key) => Ok(Some(self.tensor(key, STATES)?)),
            None => Ok(Some(Tensor::zeros((image.rows(), image.dim), DType::F32, &Device::Cpu)?)),
        }
    }
}

/// The first reference picture of a window's clip.
fn reference_of<'a>(dataset: &'a Dataset, window: &Window) -> Option<&'a Path> {
    dataset.sources[window.source].companions.references.first().map(PathBuf::as_path)
}

/// The stretch of `window` of a companion of its clip.
pub(super) fn companion(dataset: &Dataset, window: &Window, which: Accompanying) -> Result<Clip> {
    let clips = dataset.companion_clips(window.source, which, std::slice::from_ref(window))?;
    let clip = clips.and_then(|mut clips| clips.next());
    clip.transpose()?.ok_or_else(|| gone(dataset, window, &format!("{which:?}")))
}

pub(super) fn gone(dataset: &Dataset, window: &Window, what: &str) -> Error {
    let id = &dataset.sources[window.source].item.id;
    Error::CacheEntryGone { why: format!("{id} has no {what} any more") }
}

/// The rule of the mask of the window whose latents have this key, and the seed of the mask; nothing without rules.
fn rule(rules: &[MaskRule], latents: Key) -> Option<(MaskRule, u64)> {
    // The key is a hash of the clip's content and of its stretch.
    let digits = latents.to_string();
    let number = |part: &str| u64::from_str_radix(part, 16).unwrap_or(0);
    let (seed, choice) = (number(&digits[..16]), number(&digits[16..32]));
    let count = rules.len() as u64;
    (count > 0).then(|| (rules[(choice % count) as usize], seed))
}

/// The key of what VACE's context has of a window: of its clip, its control clip, and its mask or the rule that makes it.
fn edited_key(
    dataset: &Dataset,
    window: &Window,
    (rules, vae): (&[MaskRule], &str),
    hashes: &mut ContentHashes,
) -> Result<Key> {
    let source = &dataset.sources[window.source];
    let latents = dataset.key(window, &hashes.of(&source.item.media)?, vae);
    let mut of = |which: Accompanying| -> Result<String> {
        let Some(companion) = source.companions.get(which) else { return Ok("none".to_owned()) };
        let content = hashes.of(&companion.media)?;
        Ok(dataset.companion_key(window, which, &content, "pixels").to_string())
    };
    let (control, mask) = (of(Accompanying::Control)?, of(Accompanying::Mask)?);
    let rule = rule(rules, latents).map_or_else(String::new, |(rule, _)| rule.to_string());
    Ok(Key::of(&["edited", &latents.to_string(), &control, &mask, &rule]))
}

/// The poses of a window: of a file with a pose for each frame of the clip's own file, those of its source frames; of one with
/// a pose for each frame at the target rate, those of its stretch.
fn poses(dataset: &Dataset, window: &Window, path: &Path) -> Result<Vec<Pose>> {
    let (poses, source) = (camera::read(path)?, &dataset.sources[window.source]);
    if poses.len() == source.probe.times.len() {
        return Ok(dataset.source_frames(window).into_iter().map(|frame| poses[frame]).collect());
    }
    if poses.len() == source.frames {
        return Ok(camera::of_clip(&poses, window.start, window.bucket.frames as usize)?.to_vec());
    }
    let why = format!(
        "{}: it has {} poses; its clip {} has {} frames ({} at {} frames a second), and one for each is expected",
        path.display(),
        poses.len(),
        source.item.id,
        source.probe.times.len(),
        source.frames,
        dataset.fps
    );
    Err(Error::Setting { key: "data.cameras".into(), why })
}
