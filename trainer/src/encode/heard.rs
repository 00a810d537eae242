//! What Wan 2.2 S2V hears and sees: the speech encoder's states of the audio, a reference picture, and a pose clip where there is one.
//! Made the same way for training clips and for clips that are asked for.
//!
//! Of a training clip the first frame is the reference picture, and all frames behind it are learnt, each with the sound at its own time.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use data::{
    Accompanying, ContentHashes, DataError, Dataset, Key, Media, SPEECH_RATE, Storage, Window, read_speech,
};
use kernels::Tensor;
use models::dit::Conditioning;
use models::dit::animate::POSE;
use models::dit::control::REFERENCE;
use models::dit::speech::AUDIO;
use models::vae::Vae;
use models::wav2vec::SpeechEncoder;
use models::weights::Checkpoint;

use super::accompanied::{LeftOut, companion};
use super::conditions::speech::{at_middle_rate, of_frames, pose_latents};
use super::requested::video;
use super::{Encoding, LATENTS, LatentStore, PictureInputs, STATES, to_host};
use crate::error::{Error, Result};

/// The keys of S2V's own entries.
#[derive(Debug, Clone, Default)]
pub(super) struct SpeechKeys {
    /// The states of the audio, a column for each frame.
    pub audio: Option<Key>,
    /// The file of the audio.
    pub file: PathBuf,
    /// The latents of the pose clip.
    pub poses: Option<Key>,
}

/// A speech encoder with the states of the file that it heard last: the windows of a clip follow each other.
pub(super) struct Listener {
    encoder: SpeechEncoder,
    last: Option<(PathBuf, Heard)>,
}

/// The states of a file.
struct Heard {
    /// [l, n, c] at the rate that frames pick theirs from.
    states: Tensor,
    seconds: f64,
}

impl Listener {
    pub fn new(encoder: SpeechEncoder) -> Self {
        Self { encoder, last: None }
    }

    /// The states [l, c, count] of the frames from number `start` on at `fps` frames a second of the audio at `path`, zeros behind its end;
    /// it must last for the first `needed` frames, up to one.
    ///
    /// # Errors
    /// Audio that cannot be read, or is too short.
    pub fn heard(
        &mut self,
        path: &Path,
        ((start, count), needed): ((usize, usize), usize),
        fps: f64,
    ) -> Result<Tensor> {
        let known = self.last.take().filter(|(last, _)| last == path);
        let heard = match known {
            Some((_, heard)) => heard,
            None => self.listen(path)?,
        };
        let needed = needed as f64 / fps;
        if heard.seconds + 1.0 / fps < needed {
            let seconds = heard.seconds;
            let reason = format!(
                "its audio lasts {seconds:.2} seconds and the clip needs {needed:.2}: audio must be as long as the clip"
            );
            return Err(DataError::unreadable(path, reason).into());
        }
        let states = of_frames(&heard.states, (start, count), fps);
        self.last = Some((path.to_owned(), heard));
        states
    }

    fn listen(&self, path: &Path) -> Result<Heard> {
        let samples = read_speech(path)?;
        let least = self.encoder.sizes().samples_of_one_state();
        if samples.len() < least {
            let reason =
                format!("its audio of {} samples is too short: {least} are the least", samples.len());
            return Err(DataError::unreadable(path, reason).into());
        }
        let seconds = samples.len() as f64 / f64::from(SPEECH_RATE);
        Ok(Heard { states: at_middle_rate(&self.encoder.encode(&samples)?)?, seconds })
    }
}

/// Frames of a training clip of `frames` that are learnt and heard: all but the first.
fn learnt(frames: u32) -> usize {
    frames.saturating_sub(1) as usize
}

impl Encoding<'_> {
    /// What identifies the speech encoder in the keys of its entries; nothing is loaded.
    pub(super) fn speech_identity(&self) -> Result<String> {
        let path = self.residents.model().speech_encoder()?;
        let file = Checkpoint::open(path).map_err(models::Error::from)?;
        Ok(file.fingerprint().map_err(models::Error::from)?)
    }
}

impl LatentStore {
    /// Finds the keys of what S2V hears and sees of a window, for weights of the identities `vae` and `speech`.
    pub(super) fn name_heard(
        &self,
        dataset: &Dataset,
        window: &Window,
        (vae, speech): (&str, &str),
        hashes: &mut ContentHashes,
    ) -> Result<SpeechKeys> {
        let companions = &dataset.sources[window.source].companions;
        let Some(track) = &companions.speech else {
            let why = "clips without speech: name data.audio".into();
            return Err(Error::Setting { key: "data.audio".into(), why });
        };
        let content = hashes.of(&Media::Video(track.path.clone()))?;
        let (first, count) = (window.start + 1, learnt(window.bucket.frames));
        let frames = format!("{count} frames from {first} at {}", dataset.fps);
        let poses = match &companions.control {
            Some(control) => {
                let content = hashes.of(&control.media)?;
                let clip = dataset.companion_key(window, Accompanying::Control, &content, vae);
                Some(Key::of(&["poses behind the first frame", &clip.to_string()]))
            }
            None => None,
        };
        let audio = Some(Key::of(&["heard", &content, &frames, speech]));
        Ok(SpeechKeys { audio, file: track.path.clone(), poses })
    }

    /// Encodes the poses of a window, where it has some.
    pub(super) fn put_poses(
        &self,
        dataset: &Dataset,
        (window, own): (Window, &SpeechKeys),
        vae: &Vae,
    ) -> Result<()> {
        let Some(key) = &own.poses else { return Ok(()) };
        let clip = companion(dataset, &window, Accompanying::Control)?;
        let frames = video(&clip)?.narrow(2, 1, learnt(window.bucket.frames))?.contiguous()?;
        self.put(key, (LATENTS, &pose_latents(vae, &frames)?.squeeze(0)?), &clip)
    }

    /// Encodes the audio of every window that is not cached.
    pub(super) fn encode_heard(&mut self, dataset: &Dataset, with: &mut Encoding) -> Result<()> {
        let mut missing = Vec::new();
        for (index, own) in self.accompanied.iter().enumerate().filter(|(index, _)| self.share.has(*index)) {
            if let Some(key) = &own.speech.audio
                && self.missing(key)?.is_some()
            {
                missing.push((index, *key));
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        self.cache.check_writable()?;
        let mut listener = Listener::new(with.residents.speech_encoder()?);
        let bar = with.residents.ui().bar("listening to clips", missing.len());
        for (index, key) in missing {
            let (own, window) = (&self.accompanied[index].speech, dataset.windows[index]);
            let frames = (window.start + 1, learnt(window.bucket.frames));
            let needed = frames.0 + frames.1;
            let states = listener.heard(&own.file, (frames, needed), dataset.fps)?;
            let meta = BTreeMap::from([("source".to_owned(), own.file.display().to_string())]);
            self.cache.put(&key, &[(STATES, &to_host(&states)?, Storage::F32)], &meta)?;
            with.interrupt.check()?;
            bar.inc(1);
        }
        bar.finish();
        Ok(())
    }

    /// What S2V is shown of a window with the latents [c, 1 + t, h, w], of which the first is the reference.
    pub(super) fn heard(
        &self,
        own: &SpeechKeys,
        latents: &Tensor,
        left_out: LeftOut,
    ) -> Result<PictureInputs> {
        let gone = || Error::CacheEntryGone { why: "the clip has no audio".into() };
        let audio = self.tensor(own.audio.as_ref().ok_or_else(gone)?, STATES)?;
        let reference = latents.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?;
        let poses = match own.poses.as_ref().filter(|_| !left_out.control) {
            Some(key) => self.tensor(key, LATENTS)?,
            None => without_first(latents)?.zeros_like()?,
        };
        // As beside the negative prompt: no sound is zeros, not silence.
        let audio = if left_out.audio { audio.zeros_like()? } else { audio };
        let cond = Conditioning::new().with(AUDIO, audio).with(REFERENCE, reference).with(POSE, poses);
        Ok(PictureInputs { cond, ..PictureInputs::default() })
    }

    /// The latents [c, t, h, w] that are learnt of the window `index`: all of them, but for S2V, for which the first is the reference
    /// picture.
    ///
    /// # Errors
    /// As [`LatentStore::latents`].
    pub fn learnt(&self, index: usize) -> Result<Tensor> {
        let latents = self.latents(index)?;
        match self.control_model.as_ref().is_some_and(|dit| dit.control.speech.is_some()) {
            true => without_first(&latents),
            false => Ok(latents),
        }
    }
}

/// Latents [c, 1 + t, h, w] without the first frame.
fn without_first(latents: &Tensor) -> Result<Tensor> {
    Ok(latents.narrow(1, 1, latents.dim(1)? - 1)?.contiguous()?)
}
