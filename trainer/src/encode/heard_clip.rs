//! What S2V hears and sees of a clip that is asked for, piece by piece.

use std::collections::BTreeMap;
use std::path::Path;

use data::{Bucket, ContentHashes, Key, Media, Storage, read_clip};
use kernels::{DType, Device, Tensor};
use models::dit::animate::POSE;
use models::dit::control::REFERENCE;
use models::dit::speech::AUDIO;
use models::dit::{Conditioning, DitConfig};
use models::vae::Vae;

use super::conditions::speech::pose_latents;
use super::heard::Listener;
use super::length;
use super::prompt::ClipRequest;
use super::requested::{RequestKeys, named, video};
use super::{Encoding, LATENTS, LatentStore, Later, PictureInputs, STATES, to_host};
use crate::error::{Error, Result};

/// The pixel of a frame without a pose: black.
const NO_POSE: f32 = -1.0;

impl LatentStore {
    /// Encodes the audio of `requests` that is not cached, for S2V.
    ///
    /// # Errors
    /// Audio that cannot be read or is shorter than its clip, an encoder that does not open.
    pub(super) fn encode_heard_of(
        &mut self,
        requests: &[ClipRequest],
        hashes: &mut ContentHashes,
        with: &mut Encoding,
    ) -> Result<()> {
        let dit = with.residents.dit().clone();
        if dit.control.speech.is_none() {
            return Ok(());
        }
        let (identity, fps) = (with.speech_identity()?, dit.kind.facts().whole.fps);
        let mut listener = None;
        for request in requests {
            let Some(path) = &request.conditions.audio else { continue };
            let count = request.pieces(&dit) * length::heard(request, &dit);
            let content = hashes.of(&Media::Video(path.clone()))?;
            let key = Key::of(&["asked audio", &content, &count.to_string(), &identity]);
            if self.missing(&key)?.is_some() {
                let listener = match &mut listener {
                    Some(listener) => listener,
                    None => listener.insert(Listener::new(with.residents.speech_encoder()?)),
                };
                let needed = (request.frames + length::DROPPED) as usize;
                let states = listener.heard(path, ((0, count), needed), fps)?;
                self.cache.put(&key, &[(STATES, &to_host(&states)?, Storage::F32)], &BTreeMap::new())?;
            }
            if let Some(keys) = self.requested.get_mut(&named(request)) {
                keys.audio = Some(key);
            }
            with.interrupt.check()?;
        }
        Ok(())
    }

    /// What S2V is shown of `request`, whose entries are `keys`, as a batch of one.
    pub(super) fn heard_of(
        &self,
        request: &ClipRequest,
        keys: &RequestKeys,
        dit: &DitConfig,
    ) -> Result<PictureInputs> {
        let gone = |what: &str| Error::CacheEntryGone { why: format!("the clip has no {what}") };
        let audio = self.tensor(&keys.audio.ok_or_else(|| gone("audio"))?, STATES)?.unsqueeze(0)?;
        let reference = keys.references.first().ok_or_else(|| gone("reference picture"))?;
        let lead = self.tensor(reference, LATENTS)?.unsqueeze(0)?;
        let ((frames, height, width), count) = (request.latents(dit), length::heard(request, dit));
        let poses = match &keys.control {
            Some(key) => self.tensor(key, LATENTS)?.unsqueeze(0)?,
            None => {
                let shape = (1, dit.out_channels, frames * request.pieces(dit), height, width);
                Tensor::zeros(shape, DType::F32, &Device::Cpu)?
            }
        };
        let piece = |n: usize| -> Result<Conditioning<_>> {
            let audio = audio.narrow(3, n * count, count)?.contiguous()?;
            let poses = poses.narrow(2, n * frames, frames)?.contiguous()?;
            Ok(Conditioning::new().with(AUDIO, audio).with(POSE, poses))
        };
        let later = |n: usize| Ok::<_, Error>(Later { cond: piece(n)?, scene: None });
        let silence = audio.narrow(3, 0, count)?.contiguous()?.zeros_like()?;
        Ok(PictureInputs {
            cond: piece(0)?.with(REFERENCE, lead.squeeze(2)?),
            negative: Conditioning::new().with(AUDIO, silence),
            lead_bcthw: Some(lead),
            later: (1..request.pieces(dit)).map(later).collect::<Result<_>>()?,
            ..PictureInputs::default()
        })
    }
}

/// The latents [1, c, t, h, w] of the pose clip at `path` for all pieces of `request`, each encoded by itself; frames behind the end of the
/// file are black.
///
/// # Errors
/// A file that cannot be read, or is shorter than the clip.
pub(super) fn poses_of(
    path: &Path,
    request: &ClipRequest,
    (vae, dit): (&Vae, &DitConfig),
    fps: f64,
) -> Result<Tensor> {
    let (pieces, count) = (request.pieces(dit), length::heard(request, dit));
    let there = data::clip_frames(path, fps)?.unwrap_or(pieces * count).min(pieces * count);
    let frames = there.max(request.frames as usize) as u32;
    let bucket = Bucket { width: request.width, height: request.height, frames };
    let clip = video(&read_clip(path, fps, bucket)?)?;
    let missing = pieces * count - frames as usize;
    let mut parts = vec![clip.clone()];
    if missing > 0 {
        let shape = (1, 3, missing, request.height as usize, request.width as usize);
        parts.push(Tensor::full(NO_POSE, shape, clip.device())?);
    }
    let whole = Tensor::cat(&parts, 2)?;
    let piece = |n: usize| pose_latents(vae, &whole.narrow(2, n * count, count)?.contiguous()?);
    Ok(Tensor::cat(&(0..pieces).map(piece).collect::<Result<Vec<_>>>()?, 2)?)
}
