//! What Wan 2.2 Animate is shown: a reference picture as the first latent frame, the pose clip, the motion of faces, and what is
//! given of the clip itself. Made the same way for training clips and for clips that are asked for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use data::{
    Accompanying, Bucket, Clip, ContentHashes, DataError, Dataset, Key, Picture, Storage, Window, read_clip,
};
use kernels::{DType, Device, Tensor};
use models::dit::animate::{FACES, MotionEncoder, POSE};
use models::dit::{Conditioning, Raw};
use models::vae::Vae;

use super::accompanied::{Accompanied, LeftOut, companion, gone};
use super::conditions::{animate, latents, vace};
use super::pictures::planes;
use super::requested::{MASK, mask_of, video};
use super::{Encoding, LATENTS, LatentStore, PictureInputs, storage, to_host};
use crate::error::{Error, Result};

/// The latents of what is given where the first frame of the clip is given too, beside [`LATENTS`] without it.
const CONTINUED: &str = "continued";
/// Colours of a frame that differ by less are one.
const ONE_COLOUR: u8 = 4;
/// What stands for a frame without a face.
const NO_FACE: f32 = -1.0;

/// The keys of Animate's own entries.
#[derive(Debug, Clone, Default)]
pub(super) struct AnimateKeys {
    /// The latents of what is given of the clip: nothing, or in the replace mode all around the character.
    pub given: Option<Key>,
    /// Whether [`Self::given`] has a mask and latents of its own for a clip that continues another.
    pub has_mask: bool,
    /// The motion of faces.
    pub faces: Option<Key>,
    /// The motion of a frame without a face.
    pub no_face: Option<Key>,
}

/// The tensors that the network is shown, without a batch axis.
pub(super) struct Shown {
    /// [c, 1, h, w].
    pub reference: Tensor,
    /// [c, t, h, w].
    pub poses: Tensor,
    /// [f, width].
    pub faces: Tensor,
    /// [4, t, h, w], 1 = given.
    pub mask: Tensor,
    /// [c, t, h, w], of what is given.
    pub given: Tensor,
    /// CLIP's states and other roles.
    pub cond: Conditioning<Raw>,
}

impl Shown {
    /// What the network is shown, without a batch axis.
    pub fn inputs(self) -> Result<PictureInputs> {
        let [reference, mask, given] =
            [&self.reference, &self.mask, &self.given].map(|tensor| tensor.unsqueeze(0));
        let reference = reference?;
        Ok(PictureInputs {
            beside_bcthw: Some(animate::beside(&reference, &mask?, &given?)?.squeeze(0)?),
            in_front_bcthw: Some(self.reference),
            cond: self.cond.with(POSE, self.poses).with(FACES, self.faces),
            ..PictureInputs::default()
        })
    }
}

/// The mask [4, t, h, w] of a clip with latents [c, t, h, w] of which the first frame is given or nothing, and the rest is `around` a
/// character where there is one.
pub(super) fn mask_with_first(around: Option<Tensor>, latents: &Tensor, is_given: bool) -> Result<Tensor> {
    let (_, frames, height, width) = latents.dims4()?;
    let shape = (models::dit::config::MASK_CHANNELS, 1, height, width);
    let around = match around {
        Some(around) => around,
        None => Tensor::zeros((shape.0, frames, height, width), DType::F32, &Device::Cpu)?,
    };
    if !is_given {
        return Ok(around);
    }
    let first = Tensor::ones(shape, DType::F32, &Device::Cpu)?;
    let rest = (frames > 1).then(|| around.narrow(1, 1, frames - 1)?.contiguous()).transpose()?;
    Ok(Tensor::cat(&[Some(first), rest].into_iter().flatten().collect::<Vec<_>>(), 1)?)
}

/// The motion [f, width] of the faces in `clip`, out of the file at `path`.
///
/// # Errors
/// A frame of one colour, which has no face.
pub(super) fn motion(encoder: &MotionEncoder, clip: &Clip, path: &Path) -> Result<Tensor> {
    let is_flat = |frame: &[u8]| {
        let range = |channel: usize| {
            let values = || frame.iter().skip(channel).step_by(3);
            values().max().copied().unwrap_or(0) - values().min().copied().unwrap_or(0)
        };
        (0..3).all(|channel| range(channel) < ONE_COLOUR)
    };
    if let Some(frame) = clip.frames().position(is_flat) {
        let reason = format!(
            "no face is in it: frame {} at the model's rate is of one colour; make the face clip again, or leave this clip out",
            clip.start + frame + 1
        );
        return Err(DataError::unreadable(path, reason).into());
    }
    Ok(encoder.forward(&video(clip)?)?.squeeze(0)?.to_device(&Device::Cpu)?)
}

/// The motion [1, width] of a frame without a face.
pub(super) fn no_motion(encoder: &MotionEncoder) -> Result<Tensor> {
    let side = encoder.side();
    let nothing = Tensor::full(NO_FACE, (1, 3, 1, side, side), &Device::Cpu)?;
    Ok(encoder.forward(&nothing)?.squeeze(0)?.to_device(&Device::Cpu)?)
}

/// `clip` at the size of the motion encoder's pictures.
pub(super) fn of_faces(bucket: Bucket, side: usize) -> Bucket {
    Bucket { width: side as u32, height: side as u32, ..bucket }
}

/// A reference picture scaled to fit, in the middle of a black canvas of `size` = (width, height): [1, 3, 1, h, w].
pub(super) fn on_black(path: &Path, (width, height): (u32, u32)) -> Result<Tensor> {
    let pixels = planes(&Picture::open(path)?)?.unsqueeze(0)?;
    vace::on_canvas(&pixels, (height as usize, width as usize), vace::Canvas::Black)
}

/// The latents and the mask of what is given of a clip of `bucket`, without the batch axis: with `known`, its first frames
/// [1, 3, k, h, w], and without them.
pub(super) struct GivenParts {
    pub latents: Tensor,
    pub mask: Tensor,
}

impl GivenParts {
    /// Of `background` and `character`, which the replace mode has, or of nothing.
    ///
    /// # Errors
    /// Sizes that the VAE does not take.
    pub fn made(
        vae: &Vae,
        bucket: Bucket,
        scene: Option<(&Tensor, &Tensor)>,
        known: Option<&Tensor>,
    ) -> Result<Self> {
        let (frames, height, width) = (bucket.frames as usize, bucket.height as usize, bucket.width as usize);
        let video = match scene {
            Some((background, _)) => background.clone(),
            None => Tensor::zeros((1, 3, frames, height, width), DType::F32, &Device::Cpu)?,
        };
        let video = known.map_or(Ok(video.clone()), |known| animate::continued(known, &video))?;
        let latents = latents(vae, &video)?;
        let (_, _, _, tall, wide) = latents.dims5()?;
        let count = known.map_or(Ok(0), |known| known.dim(2))?;
        let mask = animate::mask(scene.map(|(_, character)| character), (frames, tall, wide), count)?;
        Ok(Self { latents: latents.squeeze(0)?, mask: mask.squeeze(0)? })
    }
}

/// What is given of a later piece of a clip: nothing, or all around a character in the clip of the replace mode.
#[derive(Debug, Clone)]
pub struct LaterScene {
    /// The latents [1, c, 1, h, w] of the reference picture.
    pub(super) reference: Tensor,
    /// Width and height, and frames of the piece.
    pub(super) bucket: Bucket,
    /// The frames of the driving clip that it follows.
    pub(super) frames: Vec<usize>,
    /// Frames of the whole clip, and how many there are in a second.
    pub(super) whole: (u32, f64),
    /// The clip around the character, and the mask of it.
    pub(super) background: Option<(PathBuf, PathBuf)>,
}

impl LaterScene {
    /// The channels [1, 4 + c, 1 + t, h, w] behind the noisy ones, where the frames `known` [1, 3, k, h, w] are the first.
    ///
    /// # Errors
    /// Files that cannot be read, and sizes that the VAE does not take.
    pub fn beside(&self, vae: &Vae, known: &Tensor) -> Result<Tensor> {
        let read = |path: &Path| -> Result<Tensor> {
            let whole = Bucket { frames: self.whole.0, ..self.bucket };
            frames_of(&video(&read_clip(path, self.whole.1, whole)?)?, &self.frames)
        };
        let scene = self.background.as_ref().map(|(around, mask)| -> Result<(Tensor, Tensor)> {
            let mask = animate::hard(&read(mask)?.mean_keepdim(1)?.affine(0.5, 0.5)?)?;
            Ok((animate::background(&read(around)?, &mask)?, mask))
        });
        let scene = scene.transpose()?;
        let scene = scene.as_ref().map(|(around, mask)| (around, mask));
        let GivenParts { latents, mask } = GivenParts::made(vae, self.bucket, scene, Some(known))?;
        animate::beside(&self.reference, &mask.unsqueeze(0)?, &latents.unsqueeze(0)?)
    }
}

/// The frames of these numbers of `video` [1, c, f, h, w].
pub(super) fn frames_of(video: &Tensor, numbers: &[usize]) -> Result<Tensor> {
    let one = |number: &usize| video.narrow(2, *number, 1);
    Ok(Tensor::cat(&numbers.iter().map(one).collect::<kernels::Result<Vec<_>>>()?, 2)?)
}

impl LatentStore {
    /// Finds the keys of what Animate is shown of a window, for weights of the identities `vae` and `dit`.
    pub(super) fn name_animated(
        &self,
        dataset: &Dataset,
        window: &Window,
        (vae, dit): (&str, &str),
        hashes: &mut ContentHashes,
    ) -> Result<AnimateKeys> {
        let source = &dataset.sources[window.source];
        let mut own = AnimateKeys { no_face: Some(Key::of(&["no face", dit])), ..AnimateKeys::default() };
        if let Some(faces) = &source.companions.faces {
            let content = hashes.of(&faces.media)?;
            let content = dataset.companion_key(window, Accompanying::Faces, &content, dit);
            own.faces = Some(Key::of(&["faces", &content.to_string()]));
        }
        own.has_mask = source.companions.mask.is_some();
        own.given = Some(match &source.companions.mask {
            None => Key::of(&["nothing given", &window.bucket.to_string(), vae]),
            Some(mask) => {
                let content = hashes.of(&mask.media)?;
                let mask = dataset.companion_key(window, Accompanying::Mask, &content, "pixels");
                let clip = dataset.key(window, &hashes.of(&source.item.media)?, vae);
                Key::of(&["around the character", &clip.to_string(), &mask.to_string()])
            }
        });
        Ok(own)
    }

    /// Encodes what is given of the window `index`.
    pub(super) fn put_given(
        &self,
        dataset: &Dataset,
        (window, own): (Window, &AnimateKeys),
        vae: &Vae,
    ) -> Result<()> {
        let Some(key) = own.given.as_ref().filter(|key| self.missing(key).is_ok_and(|why| why.is_some()))
        else {
            return Ok(());
        };
        if !own.has_mask {
            let parts = GivenParts::made(vae, window.bucket, None, None)?;
            let entry = [(LATENTS, &to_host(&parts.latents)?, storage(&parts.latents))];
            return Ok(self.cache.put(key, &entry, &BTreeMap::new())?);
        }
        let whole = dataset.clips(window.source, std::slice::from_ref(&window))?.next().transpose()?;
        let whole = video(&whole.ok_or_else(|| gone(dataset, &window, "frames"))?)?;
        let character = animate::hard(&mask_of(&companion(dataset, &window, Accompanying::Mask)?)?)?;
        let background = animate::background(&whole, &character)?;
        let first = whole.narrow(2, 0, 1)?.contiguous()?;
        let scene = Some((&background, &character));
        let parts = GivenParts::made(vae, window.bucket, scene, None)?;
        let continued = GivenParts::made(vae, window.bucket, scene, Some(&first))?;
        let (latents, after) = (to_host(&parts.latents)?, to_host(&continued.latents)?);
        let entry = [
            (LATENTS, &latents, storage(&parts.latents)),
            (CONTINUED, &after, storage(&continued.latents)),
            (MASK, &to_host(&parts.mask)?, Storage::F32),
        ];
        Ok(self.cache.put(key, &entry, &BTreeMap::new())?)
    }

    /// Encodes the motion of the faces of every window that is not cached.
    pub(super) fn encode_faces(&mut self, dataset: &Dataset, with: &mut Encoding) -> Result<()> {
        let mut missing = Vec::new();
        for (index, own) in self.accompanied.iter().enumerate() {
            for key in own.animate.faces.iter().chain(&own.animate.no_face) {
                if self.missing(key)?.is_some() {
                    missing.push(index);
                    break;
                }
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let Some(encoder) = with.residents.motion_encoder()? else { return Ok(()) };
        let bar = with.residents.ui().bar("encoding faces", missing.len());
        for index in missing {
            let (own, window) = (&self.accompanied[index].animate, dataset.windows[index]);
            if let Some(key) = &own.faces {
                let square = Window { bucket: of_faces(window.bucket, encoder.side()), ..window };
                let clip = companion(dataset, &square, Accompanying::Faces)?;
                let media = dataset.sources[window.source].companions.faces.as_ref();
                let path = media.map_or(Path::new(""), |faces| faces.media.path());
                self.put(key, (LATENTS, &motion(&encoder, &clip, path)?), &clip)?;
            }
            self.put_no_face(own, &encoder)?;
            with.interrupt.check()?;
            bar.inc(1);
        }
        bar.finish();
        Ok(())
    }

    pub(super) fn put_no_face(&self, own: &AnimateKeys, encoder: &MotionEncoder) -> Result<()> {
        if let Some(key) = &own.no_face
            && self.missing(key)?.is_some()
        {
            let entry = [(LATENTS, &to_host(&no_motion(encoder)?)?, Storage::F32)];
            self.cache.put(key, &entry, &BTreeMap::new())?;
        }
        Ok(())
    }

    /// The motion [frames, width] of frames without a face.
    pub(super) fn without_faces(&self, own: &AnimateKeys, frames: usize) -> Result<Tensor> {
        let key = own.no_face.as_ref().ok_or_else(|| missing("the motion of a frame without a face"))?;
        let one = self.tensor(key, LATENTS)?;
        Ok(one.broadcast_as((frames, one.dim(1)?))?.contiguous()?)
    }

    /// What Animate is shown of a window with the latents [c, t, h, w]; `continued` are the latents of a clip of which only the first
    /// frame is given.
    pub(super) fn animated(
        &self,
        own: &Accompanied,
        (latents, continued): (&Tensor, Option<&Key>),
        left_out: LeftOut,
        cond: Conditioning<Raw>,
    ) -> Result<PictureInputs> {
        let read = |key: Option<&Key>, name: &str, what: &str| -> Result<Tensor> {
            self.tensor(key.ok_or_else(|| missing(what))?, name)
        };
        let (keys, is_first_given) = (&own.animate, !left_out.start);
        let poses = read(own.control.as_ref(), LATENTS, "a pose clip")?;
        let faces = read(keys.faces.as_ref(), LATENTS, "a face clip")?;
        let around = keys.has_mask.then(|| read(keys.given.as_ref(), MASK, "a mask")).transpose()?;
        let given = match (keys.has_mask, is_first_given) {
            (false, true) => read(continued, LATENTS, "a first frame")?,
            (true, true) => read(keys.given.as_ref(), CONTINUED, "a first frame")?,
            (_, false) => read(keys.given.as_ref(), LATENTS, "what is given")?,
        };
        Shown {
            reference: read(own.references.first(), LATENTS, "a reference picture")?,
            poses: if left_out.control { poses.zeros_like()? } else { poses },
            faces: if left_out.faces { self.without_faces(keys, faces.dim(0)?)? } else { faces },
            mask: mask_with_first(around, latents, is_first_given)?,
            given,
            cond,
        }
        .inputs()
    }
}

fn missing(what: &str) -> Error {
    Error::CacheEntryGone { why: format!("the clip has no {what}") }
}
