//! The conditions of clips that are asked for: through the VAE, and through CLIP where the model looks at a picture.

use std::collections::BTreeMap;
use std::path::Path;

use data::{Bucket, Clip, ContentHashes, DataError, Key, Media, Picture, Storage, media_at, read_clip};
use kernels::{DType, Device, Tensor};
use models::dit::animate::{FACES, POSE};
use models::dit::control::{CAMERA, CONTEXT, HINT_SCALE, REFERENCE};
use models::dit::{Conditioning, DitConfig, Pictures, Raw, Role};
use models::published::Beside;

use super::animated::{AnimateKeys, GivenParts, LaterScene, Shown, frames_of, motion, on_black};
use super::conditions::camera::{self, Pose};
use super::conditions::fun::FunLatents;
use super::conditions::given::CameraPath;
use super::conditions::{animate, latents, vace};
use super::heard_clip::poses_of;
use super::length;
use super::pictures::planes;
use super::prompt::ClipRequest;
use super::{
    Encoding, GivenFrames, LATENTS, LatentStore, Later, PictureInputs, STATES, condition, mask, storage,
    to_host,
};
use crate::error::{Error, Result};

/// The entries of the conditions of a request.
#[derive(Debug, Clone, Default)]
pub(super) struct RequestKeys {
    pub(super) control: Option<Key>,
    start: Option<Key>,
    given: Option<Key>,
    /// Of VACE: what is kept and what is generated, and the mask.
    kept_and_made: Option<Key>,
    pub(super) references: Vec<Key>,
    states: Option<Key>,
    /// What Animate has besides.
    animate: AnimateKeys,
    /// What S2V hears.
    pub(super) audio: Option<Key>,
}

/// What a key's tensor is made of.
enum Part<'a> {
    Control(&'a Path),
    /// A pose clip of S2V.
    Poses(&'a Path),
    Start(&'a Path),
    Given(&'a Path),
    Edited {
        control: Option<&'a Path>,
        mask: Option<&'a Path>,
    },
    Reference(&'a Path),
    /// A reference on VACE's white canvas.
    OnCanvas(&'a Path),
    /// A reference on Animate's black canvas.
    OnBlack(&'a Path),
    /// What Animate is given of a clip: the last frame of the clip before, and all around a character.
    Scene {
        image: Option<&'a Path>,
        background: Option<(&'a Path, &'a Path)>,
    },
}

/// The name of VACE's mask in the entry of what is kept and what is generated.
pub(super) const MASK: &str = "mask";

impl LatentStore {
    /// Encodes the conditions of `requests` that are not cached.
    ///
    /// # Errors
    /// Files that cannot be read or do not fit the clip, encoders that do not open, a cache that takes no files.
    pub(super) fn encode_conditions(&mut self, requests: &[ClipRequest], with: &mut Encoding) -> Result<()> {
        let dit = with.residents.dit().clone();
        let identity = with.vae_identity()?;
        let mut hashes = ContentHashes::open(&self.cache);
        for request in requests {
            let mut keys = RequestKeys::default();
            for part in parts(request, &dit) {
                let key = part.key((request, &dit), &identity, &mut hashes)?;
                if self.missing(&key)?.is_some() {
                    let vae = with.residents.vae()?;
                    let tensors = part.made(request, (&vae, &dit), dit.kind.facts().whole.fps)?;
                    let host = tensors
                        .iter()
                        .map(|(name, x)| Ok((*name, to_host(x)?)))
                        .collect::<Result<Vec<_>>>()?;
                    let entry: Vec<_> = host.iter().map(|(name, x)| (*name, x, Storage::F32)).collect();
                    self.cache.put(&key, &entry, &BTreeMap::new())?;
                }
                keys.put(&part, key);
                with.interrupt.check()?;
            }
            self.requested.insert(named(request), keys);
        }
        with.residents.rest_encoders()?;
        self.encode_faces_of(requests, &mut hashes, with)?;
        self.encode_heard_of(requests, &mut hashes, with)?;
        if dit.image.is_some() {
            let identity = with.clip_identity()?;
            for request in requests {
                let Some(path) = seen(request) else { continue };
                let content = hashes.of(&Media::Still(path.to_owned()))?;
                let key = Key::of(&["picture", &content, request.convention.key(), &identity]);
                if self.missing(&key)?.is_some() {
                    let clip = with.residents.clip()?;
                    let pixels = clip.pixels(&planes(&Picture::open(path)?)?.unsqueeze(0)?)?;
                    let states = clip.encode(&pixels)?.squeeze(0)?;
                    let entry = [(STATES, &to_host(&states)?, storage(&states))];
                    self.cache.put(&key, &entry, &BTreeMap::new())?;
                }
                if let Some(keys) = self.requested.get_mut(&named(request)) {
                    keys.states = Some(key);
                }
            }
            with.residents.rest_encoders()?;
        }
        Ok(hashes.save()?)
    }

    /// What the model `dit` is shown of the picture and the other conditions of `request`, which were encoded.
    ///
    /// # Errors
    /// When an entry was removed or damaged since it was made.
    pub fn shown_of(&self, request: &ClipRequest, dit: &DitConfig) -> Result<PictureInputs> {
        match dit.pictures() {
            Pictures::Condition => self.requested(request, dit),
            _ => self.shown(request, dit),
        }
    }

    /// What a control model `dit` is shown of the conditions of `request`, which were encoded.
    ///
    /// # Errors
    /// When an entry was removed or damaged since it was made.
    fn requested(&self, request: &ClipRequest, dit: &DitConfig) -> Result<PictureInputs> {
        let keys = self.requested.get(&named(request)).cloned().unwrap_or_default();
        let read = |key: &Option<Key>| -> Result<Option<Tensor>> {
            key.as_ref().map(|key| Ok(self.tensor(key, LATENTS)?.unsqueeze(0)?)).transpose()
        };
        let (frames, height, width) =
            dit.kind.facts().whole.latents(request.frames, request.height, request.width);
        let channels = dit.out_channels;
        if dit.kind.facts().faces {
            return self.animated_of(request, &keys, dit);
        }
        if dit.kind.facts().speech {
            return self.heard_of(request, &keys, dit);
        }
        let given = read(&keys.given)?;
        let first = given.as_ref().filter(|_| dit.kind.facts().in_place);
        let first_bcthw = first.map(|latents| latents.narrow(2, 0, 1)?.contiguous()).transpose()?;
        let given = given.map(|latents| {
            Ok::<_, Error>((mask(GivenFrames::First, (frames, height, width))?.unsqueeze(0)?, latents))
        });
        let parts = FunLatents {
            control: read(&keys.control)?,
            start: read(&keys.start)?,
            given: given.transpose()?,
        };
        let beside_bcthw = parts.beside(dit.kind.facts().beside, [channels, frames, height, width])?;
        let references =
            keys.references.iter().map(|key| self.tensor(key, LATENTS)?.unsqueeze(0).map_err(Into::into));
        let references = references.collect::<Result<Vec<_>>>()?;
        let mut cond = Conditioning::<Raw>::new();
        if let Some(channels) = dit.control.reference {
            let nothing = || Tensor::zeros((1, channels, height, width), DType::F32, &Device::Cpu);
            let own = references.first().map(|latents| latents.squeeze(2));
            cond.insert(REFERENCE, own.unwrap_or_else(nothing)?);
        }
        if dit.control.side_chain.is_some()
            && let Some(key) = &keys.kept_and_made
        {
            let (edited, mask) =
                (self.tensor(key, LATENTS)?.unsqueeze(0)?, self.tensor(key, MASK)?.unsqueeze(0)?);
            cond.insert(CONTEXT, vace::assembled(&edited, &mask, &references)?);
            if let Some(scale) = request.conditions.hint_scale {
                cond.insert(HINT_SCALE, Tensor::new(&[scale as f32], &Device::Cpu)?);
            }
        }
        if dit.control.camera.is_some()
            && let Some(path) = &request.conditions.camera
        {
            let poses = poses(path, request.frames as usize)?;
            cond.insert(CAMERA, camera::packed(&poses, (request.height as usize, request.width as usize))?);
        }
        let cond = cond.with_optional(Role::PICTURE, self.states_of(&keys, dit)?);
        let is_in_front = dit.control.side_chain.is_some() && !references.is_empty();
        let in_front_bcthw = is_in_front.then(|| Tensor::cat(&references, 2)).transpose()?;
        Ok(PictureInputs { beside_bcthw, first_bcthw, cond, in_front_bcthw, ..PictureInputs::default() })
    }

    /// CLIP's states [1, rows, width] of a request's picture, zeros without one; nothing for a model without them.
    fn states_of(&self, keys: &RequestKeys, dit: &DitConfig) -> Result<Option<Tensor>> {
        let Some(image) = dit.image else { return Ok(None) };
        match &keys.states {
            Some(key) => Ok(Some(self.tensor(key, STATES)?.unsqueeze(0)?)),
            None => Ok(Some(Tensor::zeros((1, image.rows(), image.dim), DType::F32, &Device::Cpu)?)),
        }
    }

    /// What Animate is shown of the conditions of `request`, which were encoded, as a batch of one.
    fn animated_of(
        &self,
        request: &ClipRequest,
        keys: &RequestKeys,
        dit: &DitConfig,
    ) -> Result<PictureInputs> {
        let gone = || Error::CacheEntryGone { why: "a condition of the clip was not encoded".into() };
        let read = |key: Option<&Key>, name: &str| self.tensor(key.ok_or_else(gone)?, name);
        let one = self.states_of(keys, dit)?.map(|states| states.squeeze(0)).transpose()?;
        let reference = read(keys.references.first(), LATENTS)?;
        let poses = read(keys.control.as_ref(), LATENTS)?;
        let faces = read(keys.animate.faces.as_ref(), LATENTS)?;
        let (count, frames) = (request.pieces(dit), length::of_piece(request, &dit.control));
        let of_pose = poses.dim(1)? / count;
        let poses_of = |n: usize| poses.narrow(1, n * of_pose, of_pose)?.contiguous();
        let faces_of = |n: usize| {
            let rows = length::driving(request, &dit.control, n).into_iter();
            Tensor::cat(&rows.map(|row| faces.narrow(0, row, 1)).collect::<kernels::Result<Vec<_>>>()?, 0)
        };
        let bucket = Bucket { width: request.width, height: request.height, frames };
        let fps = dit.kind.facts().whole.fps;
        let later = |n: usize| -> Result<Later> {
            let scene = LaterScene {
                reference: reference.unsqueeze(0)?,
                bucket,
                frames: length::driving(request, &dit.control, n),
                whole: (request.frames, fps),
                background: request.conditions.background.clone().zip(request.conditions.mask.clone()),
            };
            let cond = Conditioning::new().with(POSE, poses_of(n)?.unsqueeze(0)?);
            Ok(Later { cond: cond.with(FACES, faces_of(n)?.unsqueeze(0)?), scene: Some(scene) })
        };
        let later = (1..count).map(later).collect::<Result<Vec<_>>>()?;
        let shown = Shown {
            poses: poses_of(0)?,
            faces: faces_of(0)?,
            reference,
            mask: read(keys.animate.given.as_ref(), MASK)?,
            given: read(keys.animate.given.as_ref(), LATENTS)?,
            cond: Conditioning::new().with_optional(Role::PICTURE, one),
        };
        let own = shown.inputs()?;
        let batched = |x: Option<Tensor>| x.map(|x| x.unsqueeze(0)).transpose();
        let nobody = self.without_faces(&keys.animate, frames as usize)?.unsqueeze(0)?;
        Ok(PictureInputs {
            beside_bcthw: batched(own.beside_bcthw)?,
            in_front_bcthw: batched(own.in_front_bcthw)?,
            cond: own.cond.try_map(|_, x| x.unsqueeze(0))?,
            negative: Conditioning::new().with(FACES, nobody),
            later,
            ..PictureInputs::default()
        })
    }

    /// Encodes the motion of the face clips of `requests` that is not cached, for Animate.
    fn encode_faces_of(
        &mut self,
        requests: &[ClipRequest],
        hashes: &mut ContentHashes,
        with: &mut Encoding,
    ) -> Result<()> {
        let facts = with.residents.dit().kind.facts();
        if !facts.faces {
            return Ok(());
        }
        let identity = with.dit_identity()?;
        let mut encoder = None;
        for request in requests {
            let Some(path) = &request.conditions.faces else { continue };
            let content = content_of(path, hashes)?;
            let key = Key::of(&["asked faces", &content, &request.frames.to_string(), &identity]);
            let no_face = Key::of(&["no face", &identity]);
            let own = AnimateKeys { faces: Some(key), no_face: Some(no_face), ..AnimateKeys::default() };
            if self.missing(&key)?.is_some() || self.missing(&no_face)?.is_some() {
                if encoder.is_none() {
                    encoder = with.residents.motion_encoder()?;
                }
                let Some(encoder) = &encoder else { continue };
                let side = encoder.side() as u32;
                let bucket = Bucket { width: side, height: side, frames: request.frames };
                let clip = read_clip(path, facts.whole.fps, bucket)?;
                self.put(&key, (LATENTS, &motion(encoder, &clip, path)?), &clip)?;
                self.put_no_face(&own, encoder)?;
            }
            if let Some(keys) = self.requested.get_mut(&named(request)) {
                keys.animate = AnimateKeys { given: keys.animate.given, ..own };
            }
            with.interrupt.check()?;
        }
        Ok(())
    }
}

/// The hash of the clip or picture at `path`.
pub(super) fn content_of(path: &Path, hashes: &mut ContentHashes) -> Result<String> {
    let media = media_at(path)?.ok_or_else(|| DataError::unreadable(path, "there is no clip or picture"))?;
    Ok(hashes.of(&media)?)
}

impl RequestKeys {
    fn put(&mut self, part: &Part, key: Key) {
        match part {
            Part::Control(_) | Part::Poses(_) => self.control = Some(key),
            Part::Start(_) => self.start = Some(key),
            Part::Given(_) => self.given = Some(key),
            Part::Edited { .. } => self.kept_and_made = Some(key),
            Part::Scene { .. } => self.animate.given = Some(key),
            Part::Reference(_) | Part::OnCanvas(_) | Part::OnBlack(_) => self.references.push(key),
        }
    }
}

/// What the VAE encodes for `request`.
fn parts<'a>(request: &'a ClipRequest, dit: &DitConfig) -> Vec<Part<'a>> {
    let (facts, given) = (dit.kind.facts(), &request.conditions);
    let reads = |beside: Beside| facts.beside.contains(&beside);
    let control = given.control.as_deref();
    let image = request.image.as_deref();
    let edited = Part::Edited { control, mask: given.mask.as_deref() };
    let background = given.background.as_deref().zip(given.mask.as_deref());
    let parts: [Option<Part>; 6] = [
        control.filter(|_| facts.faces || reads(Beside::Control)).map(Part::Control),
        control.filter(|_| facts.speech).map(Part::Poses),
        image.filter(|_| reads(Beside::Start)).map(Part::Start),
        image.filter(|_| !facts.faces && reads(Beside::Given)).map(Part::Given),
        facts.side_chain.then_some(edited),
        facts.faces.then_some(Part::Scene { image, background }),
    ];
    let reference = match (facts.side_chain, facts.faces) {
        (true, _) => Part::OnCanvas,
        (false, true) => Part::OnBlack,
        (false, false) => Part::Reference,
    };
    let references = given.references.iter().map(|path| reference(path));
    parts.into_iter().flatten().chain(references).collect()
}

/// The picture that CLIP sees: the reference, else the start picture.
fn seen(request: &ClipRequest) -> Option<&Path> {
    request.conditions.references.first().or(request.image.as_ref()).map(|path| path.as_path())
}

/// What distinguishes the conditions of one request from those of another.
pub(super) fn named(request: &ClipRequest) -> String {
    let ClipRequest { image, width, height, frames, conditions, convention, .. } = request;
    format!("{image:?} {conditions:?} {width}x{height}x{frames} {convention:?}")
}

impl Part<'_> {
    fn key(
        &self,
        (request, dit): (&ClipRequest, &DitConfig),
        identity: &str,
        hashes: &mut ContentHashes,
    ) -> Result<Key> {
        let size = format!("{}x{}x{}", request.width, request.height, request.frames);
        let mut content = |path: &Path| content_of(path, hashes);
        let mut optional = |path: &Option<&Path>| path.map(&mut content).transpose();
        let (name, content) = match self {
            Self::Control(path) => match length::of_piece(request, &dit.control) {
                whole if whole == request.frames => ("asked control", content(path)?),
                piece => ("asked control in pieces", format!("{} {piece}", content(path)?)),
            },
            Self::Poses(path) => {
                let piece = request.conditions.piece_frames;
                ("asked poses", format!("{} {piece:?}", content(path)?))
            }
            Self::Start(path) => ("asked start", content(path)?),
            Self::Given(path) => ("asked given", content(path)?),
            Self::Reference(path) => ("asked reference", content(path)?),
            Self::OnCanvas(path) => ("asked canvas", content(path)?),
            Self::OnBlack(path) => ("asked black canvas", content(path)?),
            Self::Scene { image, background } => {
                let (around, mask) = background.unzip();
                let around = format!("{:?} {:?}", optional(&around)?, optional(&mask)?);
                let piece = length::of_piece(request, &dit.control);
                let piece = if piece == request.frames { String::new() } else { format!(" {piece}") };
                ("asked scene", format!("{:?} {around}{piece}", optional(image)?))
            }
            Self::Edited { control, mask } => {
                ("asked edit", format!("{:?} {:?}", optional(control)?, optional(mask)?))
            }
        };
        Ok(Key::of(&[name, &content, &size, identity]))
    }

    /// The tensors of the entry, without a batch axis.
    fn made(
        &self,
        request: &ClipRequest,
        (vae, dit): (&models::vae::Vae, &DitConfig),
        fps: f64,
    ) -> Result<Vec<(&'static str, Tensor)>> {
        let ClipRequest { width, height, frames, .. } = *request;
        let bucket = Bucket { width, height, frames };
        let one = |x: Tensor| -> Result<Vec<(&'static str, Tensor)>> { Ok(vec![(LATENTS, x.squeeze(0)?)]) };
        match self {
            Self::Control(path) => {
                let whole = video(&read_clip(path, fps, bucket)?)?;
                let piece =
                    |n: usize| latents(vae, &frames_of(&whole, &length::driving(request, &dit.control, n))?);
                match request.pieces(dit) {
                    1 => one(latents(vae, &whole)?),
                    count => one(Tensor::cat(&(0..count).map(piece).collect::<Result<Vec<_>>>()?, 2)?),
                }
            }
            Self::Poses(path) => one(poses_of(path, request, (vae, dit), fps)?),
            Self::Start(path) | Self::Reference(path) => one(latents(vae, &picture(path, (width, height))?)?),
            Self::Given(path) => {
                let first = picture(path, (width, height))?.squeeze(0)?.squeeze(1)?;
                Ok(vec![(LATENTS, condition(vae, &first, None, frames as usize)?)])
            }
            Self::OnCanvas(path) => one(latents(vae, &on_canvas(path, (width, height))?)?),
            Self::OnBlack(path) => one(latents(vae, &on_black(path, (width, height))?)?),
            Self::Scene { image, background } => {
                let piece = Bucket { frames: length::of_piece(request, &dit.control), ..bucket };
                let known = image.map(|path| picture(path, (width, height))).transpose()?;
                let scene = background.map(|(around, mask)| -> Result<(Tensor, Tensor)> {
                    let mask = animate::hard(&mask_of(&read_clip(mask, fps, piece)?)?)?;
                    Ok((video(&read_clip(around, fps, piece)?)?, mask))
                });
                let scene = scene.transpose()?;
                let scene = match &scene {
                    // Black where the character is, whatever the clip shows there.
                    Some((around, mask)) => Some((animate::background(around, mask)?, mask)),
                    None => None,
                };
                let scene = scene.as_ref().map(|(around, mask)| (around, *mask));
                let parts = GivenParts::made(vae, piece, scene, known.as_ref())?;
                Ok(vec![(LATENTS, parts.latents), (MASK, parts.mask)])
            }
            Self::Edited { control, mask } => {
                let shape = (1, 3, frames as usize, height as usize, width as usize);
                let nothing = || Tensor::zeros(shape, DType::F32, &Device::Cpu);
                let clip = control.map(|path| video(&read_clip(path, fps, bucket)?)).transpose()?;
                let everything = || Tensor::ones((1, 1, shape.2, shape.3, shape.4), DType::F32, &Device::Cpu);
                let mask = mask.map(|path| mask_of(&read_clip(path, fps, bucket)?)).transpose()?;
                let (clip, mask) = (clip.map_or_else(nothing, Ok)?, mask.map_or_else(everything, Ok)?);
                let edited = vace::kept_and_made(vae, &clip, &mask)?.squeeze(0)?;
                Ok(vec![(LATENTS, edited), (MASK, vace::mask_channels(&mask)?.squeeze(0)?)])
            }
        }
    }
}

/// The poses of a clip of `frames` frames.
///
/// # Errors
/// A file that cannot be read, or has fewer.
fn poses(path: &CameraPath, frames: usize) -> Result<Vec<Pose>> {
    match path {
        CameraPath::Named(named) => Ok(named.poses(frames)),
        CameraPath::File(path) => Ok(camera::of_clip(&camera::read(path)?, 0, frames)?.to_vec()),
    }
}

/// The pixels of a clip, [1, 3, f, h, w] in -1..1 on the host.
pub(super) fn video(clip: &Clip) -> Result<Tensor> {
    let Bucket { width, height, frames } = clip.bucket;
    let shape = (1, 3, frames as usize, height as usize, width as usize);
    Ok(Tensor::from_vec(clip.planes(), shape, &Device::Cpu)?)
}

/// A mask, [1, 1, f, h, w] in 0..1, of the mean of a clip's colours.
pub(super) fn mask_of(clip: &Clip) -> Result<Tensor> {
    Ok(video(clip)?.mean_keepdim(1)?.affine(0.5, 0.5)?)
}

/// A picture that covers a clip of `size` = (width, height), [1, 3, 1, h, w].
pub(super) fn picture(path: &Path, (width, height): (u32, u32)) -> Result<Tensor> {
    let scaled = Picture::open(path)?.covering(width, height);
    let scaled = scaled.ok_or_else(|| DataError::unreadable(path, "it cannot be scaled"))?;
    Ok(planes(&scaled)?.unsqueeze(1)?.unsqueeze(0)?)
}

/// A picture in the middle of a white canvas of `size` = (width, height), [1, 3, 1, h, w], as VACE takes references.
pub(super) fn on_canvas(path: &Path, (width, height): (u32, u32)) -> Result<Tensor> {
    let pixels = planes(&Picture::open(path)?)?.unsqueeze(0)?;
    vace::on_canvas(&pixels, (height as usize, width as usize), vace::Canvas::White)
}
