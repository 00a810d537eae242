//! The pictures that clips are to start or end with: through the VAE, and through CLIP where the model looks at them.

use std::collections::BTreeMap;
use std::path::Path;

use data::{ContentHashes, DataError, Key, Picture, Storage};
use kernels::{Device, Tensor};
use models::clip::{Clip, normalised};
use models::dit::{Conditioning, DitConfig, Pictures, Role};
use models::vae::{Tiling, Vae};

use super::picture_inputs::{GivenFrames, PictureInputs, condition, with_mask};
use super::{Encoding, LATENTS, LatentStore, STATES, storage, to_host};
use crate::encode::prompt::ClipRequest;
use crate::error::Result;
use crate::solver::Convention;

/// The entries of a request's pictures.
#[derive(Debug, Clone)]
pub(super) struct PictureKeys {
    latents: Key,
    states: Option<Key>,
}

/// Aspects that differ by less are taken for the same: sizes are rounded to the model's multiple.
const SAME_ASPECT: f64 = 0.05;

impl LatentStore {
    /// Encodes the pictures of `requests`, and their other conditions, that are not cached.
    ///
    /// # Errors
    /// Pictures that cannot be read, encoders that do not open, a cache that takes no files.
    pub fn encode_pictures(&mut self, requests: &[ClipRequest], with: &mut Encoding) -> Result<()> {
        if with.residents.dit().pictures() == Pictures::Condition {
            return self.encode_conditions(requests, with);
        }
        let requests: Vec<&ClipRequest> = requests.iter().filter(|request| request.image.is_some()).collect();
        if requests.is_empty() {
            return Ok(());
        }
        let (pictures, sees_two) = (with.residents.dit().pictures(), with.sees_two());
        let identity = with.vae_identity()?;
        let mut hashes = ContentHashes::open(&self.cache);
        let mut contents = Vec::new();
        for request in &requests {
            let mut hash = |path: &Path| hashes.of(&data::Media::Still(path.to_owned()));
            let named = [&request.image, &request.last_image].into_iter().flatten();
            contents.push(named.map(|path| hash(path)).collect::<data::Result<Vec<_>>>()?.join(" "));
        }
        for (request, content) in requests.iter().zip(&contents) {
            let size = format!("{}x{}x{}", request.width, request.height, request.frames);
            let latents = Key::of(&["picture", content, &size, request.convention.key(), &identity]);
            if self.missing(&latents)?.is_some() {
                let host = to_host(&latents_of(request, &*with.residents.vae()?, pictures)?)?;
                self.cache.put(&latents, &[(LATENTS, &host, Storage::F32)], &BTreeMap::new())?;
            }
            self.pictures.insert(named(request), PictureKeys { latents, states: None });
        }
        with.residents.rest_encoders()?;
        if with.residents.dit().image.is_some() {
            let identity = with.clip_identity()?;
            for (request, content) in requests.iter().zip(&contents) {
                let states = states_key(content, request.convention, sees_two, &identity);
                if self.missing(&states)?.is_some() {
                    let tensor = states_of(request, &*with.residents.clip()?, sees_two)?;
                    let entry = [(STATES, &to_host(&tensor)?, storage(&tensor))];
                    self.cache.put(&states, &entry, &BTreeMap::new())?;
                }
                if let Some(keys) = self.pictures.get_mut(&named(request)) {
                    keys.states = Some(states);
                }
            }
        }
        Ok(())
    }

    /// What the network of `dit` is shown of the pictures of `request`, a batch of one on the host.
    ///
    /// # Errors
    /// When they were not encoded, or an entry was removed or damaged.
    pub fn shown(&self, request: &ClipRequest, dit: &DitConfig) -> Result<PictureInputs> {
        let Some(keys) = self.pictures.get(&named(request)) else { return Ok(PictureInputs::default()) };
        let latents = self.tensor(&keys.latents, LATENTS)?;
        let states = keys.states.as_ref().map(|key| self.tensor(key, STATES)).transpose()?;
        let states = states.map(|states| states.unsqueeze(0)).transpose()?;
        let cond = Conditioning::new().with_optional(Role::PICTURE, states);
        let ends = if request.last_image.is_some() { GivenFrames::Both } else { GivenFrames::First };
        let first = dit.kind.facts().in_place.then(|| latents.narrow(1, 0, 1)?.contiguous()?.unsqueeze(0));
        let beside = match dit.pictures() {
            Pictures::InPlace => None,
            _ => Some(with_mask(&latents, ends)?.unsqueeze(0)?),
        };
        let first_bcthw = first.transpose()?;
        Ok(PictureInputs { beside_bcthw: beside, first_bcthw, cond, ..PictureInputs::default() })
    }
}

/// The key of CLIP's states of the pictures whose hashes are `content`, one or two with a space between: of both where the
/// model `sees_two`, else of the first alone.
fn states_key(content: &str, convention: Convention, sees_two: bool, identity: &str) -> Key {
    let first = content.split(' ').next().unwrap_or(content);
    match sees_two {
        true => Key::of(&["pictures", content, convention.key(), identity]),
        false => Key::of(&["picture", first, convention.key(), identity]),
    }
}

/// What distinguishes the pictures of one request from those of another.
fn named(request: &ClipRequest) -> String {
    let ClipRequest { image, last_image, width, height, frames, convention, .. } = request;
    format!("{image:?} {last_image:?} {width}x{height}x{frames} {convention:?}")
}

/// The latents [c, t, h, w] of what is known of the clip: of the picture alone where it takes the first frame's place,
/// else of a clip that is grey but for its ends.
fn latents_of(request: &ClipRequest, vae: &Vae, pictures: Pictures) -> Result<Tensor> {
    let read = |path: &Path| -> Result<Tensor> {
        let picture = Picture::open(path)?;
        let scaled = fitted(&picture, request, pictures);
        let scaled = scaled.ok_or_else(|| DataError::unreadable(path, "it cannot be scaled"))?;
        let size = (request.height as usize, request.width as usize);
        Ok(models::picture::resize_bicubic(&planes(&scaled)?.unsqueeze(0)?, size)?.squeeze(0)?)
    };
    let first = read(request.image.as_deref().unwrap_or(Path::new("")))?;
    match pictures {
        Pictures::InPlace => {
            let video = first.unsqueeze(1)?.unsqueeze(0)?.to_device(vae.device())?;
            Ok(vae.encode(&video, Tiling::Off)?.squeeze(0)?.to_device(&Device::Cpu)?)
        }
        _ => {
            let last = request.last_image.as_deref().map(read).transpose()?;
            condition(vae, &first, last.as_ref(), request.frames as usize)
        }
    }
}

/// The picture in the aspect of the clip, and at its size where it is not left to the official code's own bicubic filter.
fn fitted(picture: &Picture, request: &ClipRequest, pictures: Pictures) -> Option<Picture> {
    let ClipRequest { width, height, convention, .. } = *request;
    let aspect = |w: u32, h: u32| f64::from(w) / f64::from(h);
    let ratio = aspect(picture.width(), picture.height()) / aspect(width, height);
    let is_same = (ratio - 1.0).abs() < SAME_ASPECT;
    let bicubic = pictures == Pictures::Beside && convention == Convention::Official;
    match (bicubic, is_same) {
        (true, true) => Some(picture.clone()),
        (true, false) => picture.cut_to_aspect(width, height),
        (false, true) => picture.stretched(width, height),
        (false, false) => picture.covering(width, height),
    }
}

/// [3, h, w] in -1..1.
pub(super) fn planes(picture: &Picture) -> Result<Tensor> {
    let shape = (3, picture.height() as usize, picture.width() as usize);
    Ok(Tensor::from_vec(picture.planes(), shape, &Device::Cpu)?)
}

/// CLIP's states [rows, width] of the request's picture, or of both one behind the other where the model `sees_two`.
fn states_of(request: &ClipRequest, clip: &Clip, sees_two: bool) -> Result<Tensor> {
    let mut named: Vec<&Path> = request.image.as_deref().into_iter().collect();
    if sees_two {
        named.extend(request.last_image.as_deref());
    }
    let mut states = Vec::new();
    for path in named {
        let picture = Picture::open(path)?;
        let pixels = match request.convention {
            Convention::Official => clip.pixels(&planes(&picture)?.unsqueeze(0)?)?,
            Convention::Diffusers => {
                let square = picture.thumbnail(clip.image() as u32);
                let square = square.ok_or_else(|| DataError::unreadable(path, "it cannot be scaled"))?;
                normalised(&planes(&square)?.affine(0.5, 0.5)?.unsqueeze(0)?)?
            }
        };
        states.push(clip.encode(&pixels)?.squeeze(0)?);
    }
    Ok(Tensor::cat(&states, 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The states of two pictures are other than those of the first alone, whichever model was there first.
    #[test]
    fn states_of_one_picture_and_of_two_have_keys_of_their_own() {
        let key = |content, sees_two| states_key(content, Convention::Official, sees_two, "clip");
        assert_ne!(key("a b", true), key("a b", false));
        // The second is not looked at; entries that other versions made of one picture are found.
        assert_eq!(key("a b", false), key("a", false));
        assert_eq!(key("a", false), Key::of(&["picture", "a", "Official", "clip"]));
    }
}
