//! The speech of a clip: an audio file, or the audio track of a video, as mono samples at the rate of speech encoders.

use std::fs::File;
use std::path::{Path, PathBuf};

use rubato::audioadapter_buffers::direct::SequentialSliceOfVecs;
use rubato::{Fft, FixedSync, Resampler};
use symphonia::core::codecs::audio::{AudioDecoder, AudioDecoderOptions};
use symphonia::core::errors::Error as SymphoniaError;
use symphonia::core::formats::probe::Hint;
use symphonia::core::formats::{FormatOptions, FormatReader, TrackType};
use symphonia::core::io::MediaSourceStream;
use symphonia::core::meta::MetadataOptions;

use crate::config::AudioSource;
use crate::decode::{check_regular, sound_offset};
use crate::error::{DataError, Result};
use crate::media::{Media, VIDEO_EXTENSIONS};
use crate::named::AUDIO;
use crate::scan::Item;

/// Samples a second of what is read.
pub const SPEECH_RATE: u32 = 16_000;
/// The longest audio that is read, in seconds: its states have to fit into host memory at once.
const MAX_SECONDS: f64 = 300.0;
/// Frames that are resampled at a time.
const CHUNK: usize = 4096;
/// Extensions of audio files, in the order in which they are looked for.
pub const AUDIO_EXTENSIONS: [&str; 7] = ["wav", "flac", "mp3", "m4a", "aac", "ogg", "mka"];
/// What to do about audio in a form that is not read.
const CONVERT: &str = "convert it to WAV (ffmpeg -i IN -vn OUT.wav)";

/// The speech of a clip, from the clip's first frame on.
#[derive(Debug, Clone, PartialEq)]
pub struct SpeechTrack {
    /// An audio file, or a video with an audio track.
    pub path: PathBuf,
    /// How long it lasts, in seconds.
    pub seconds: f64,
}

impl SpeechTrack {
    /// The speech of the clip `item`, whose path below its data folder is `stem` and which lasts `frames` frames at `fps` frames a second.
    ///
    /// # Errors
    /// Speech that is missing, that cannot be read, or that ends more than a frame before the clip.
    pub(crate) fn of(
        item: &Item,
        stem: &Path,
        source: &AudioSource,
        (frames, fps): (usize, f64),
    ) -> Result<Self> {
        let path = find(item, stem, source)?;
        let seconds = Track::open(&path)?.seconds()?;
        let needed = frames as f64 / fps;
        if seconds + 1.0 / fps < needed {
            let reason = format!(
                "its audio lasts {seconds:.2} seconds and its clip {} lasts {needed:.2}: audio must be as long as the clip",
                item.id
            );
            return Err(DataError::unreadable(path, reason));
        }
        Ok(Self { path, seconds })
    }
}

/// The file with the speech of `item`.
fn find(item: &Item, stem: &Path, source: &AudioSource) -> Result<PathBuf> {
    let own = item.media.path();
    if let Some(path) = item.named.one(AUDIO) {
        let reason = || format!("it is named as data.audio of {}, and there is no such file", item.id);
        return match path.is_file() {
            true => Ok(path.to_owned()),
            false => Err(DataError::unreadable(path, reason())),
        };
    }
    match source {
        AudioSource::Folder(folder) => {
            let stem = folder.join(stem);
            let reason = || {
                format!(
                    "there is none for {}: data.audio needs an audio file of this name ({})",
                    item.id,
                    AUDIO_EXTENSIONS.join(", ")
                )
            };
            let extensions = [&AUDIO_EXTENSIONS[..], &VIDEO_EXTENSIONS].concat();
            with_stem(&stem, &extensions).ok_or_else(|| DataError::unreadable(&stem, reason()))
        }
        AudioSource::Own => {
            let stem = match item.media {
                Media::Pictures { .. } => own.to_path_buf(),
                _ => own.with_extension(""),
            };
            match (with_stem(&stem, &AUDIO_EXTENSIONS), &item.media) {
                (Some(found), _) => Ok(found),
                (None, Media::Video(_)) => Ok(own.to_path_buf()),
                (None, _) => {
                    let reason =
                        "it has no audio track: put an audio file of its name beside it, or name data.audio";
                    Err(DataError::unreadable(own, reason))
                }
            }
        }
    }
}

/// The file called `stem` with any of `extensions`.
fn with_stem(stem: &Path, extensions: &[&str]) -> Option<PathBuf> {
    let named = |extension: &&str| {
        let mut name = stem.as_os_str().to_os_string();
        name.push(".");
        name.push(extension);
        PathBuf::from(name)
    };
    extensions.iter().map(named).find(|path| path.is_file())
}

/// The samples of the first audio track of the file at `path`: the mean of its channels, at [`SPEECH_RATE`]. Those of a video begin with
/// its first frame.
///
/// # Errors
/// A file without audio, in a form that is not read, that is damaged, or that lasts more than five minutes.
pub fn read_speech(path: &Path) -> Result<Vec<f32>> {
    let track = Track::open(path)?;
    let (rate, offset) = (track.rate, track.offset);
    let samples = begun(track.decoded()?, (offset * f64::from(rate)).round() as i64);
    if samples.is_empty() {
        return Err(DataError::unreadable(path, "its audio track has no samples"));
    }
    resampled(samples, rate).map_err(|reason| {
        DataError::unreadable(path, format!("its audio at {rate} Hz cannot be resampled: {reason}"))
    })
}

/// How long the first audio track of the file at `path` lasts, in seconds.
///
/// # Errors
/// As [`read_speech`].
pub fn speech_seconds(path: &Path) -> Result<f64> {
    Track::open(path)?.seconds()
}

/// `samples` from number `start` on; silence stands for those before the first.
fn begun(mut samples: Vec<f32>, start: i64) -> Vec<f32> {
    let count = start.unsigned_abs() as usize;
    match start >= 0 {
        true => samples.drain(..count.min(samples.len())).for_each(drop),
        false => drop(samples.splice(0..0, std::iter::repeat_n(0.0, count))),
    }
    samples
}

/// An audio track that is ready to be decoded.
struct Track<'a> {
    path: &'a Path,
    format: Box<dyn FormatReader>,
    decoder: Box<dyn AudioDecoder>,
    id: u32,
    /// Samples a second.
    rate: u32,
    /// Samples of each channel, where the file's header says.
    frames: Option<u64>,
    /// Seconds of it before the first frame of the video that it is in.
    offset: f64,
}

impl<'a> Track<'a> {
    fn open(path: &'a Path) -> Result<Self> {
        let refuse = |reason: String| DataError::unreadable(path, reason);
        check_regular(path)?;
        let file = File::open(path).map_err(DataError::io("open", path))?;
        let mut hint = Hint::new();
        if let Some(extension) = path.extension().and_then(|extension| extension.to_str()) {
            hint.with_extension(extension);
        }
        let stream = MediaSourceStream::new(Box::new(file), Default::default());
        let (format, meta) = (FormatOptions::default(), MetadataOptions::default());
        let format = symphonia::default::get_probe()
            .probe(&hint, stream, format, meta)
            .map_err(|error| refuse(format!("no audio can be read from it ({error}): {CONVERT}")))?;
        let Some(track) = format.default_track(TrackType::Audio) else {
            return Err(refuse("it has no audio track".into()));
        };
        let parameters = track.codec_params.as_ref().and_then(|all| all.audio());
        let known = parameters.and_then(|own| Some((own, own.sample_rate.filter(|rate| *rate > 0)?)));
        let Some((parameters, rate)) = known else {
            return Err(refuse(format!("its audio track is in a form that is not read: {CONVERT}")));
        };
        let decoder = symphonia::default::get_codecs()
            .make_audio_decoder(parameters, &AudioDecoderOptions::default())
            .map_err(|error| refuse(format!("its audio cannot be decoded ({error}): {CONVERT}")))?;
        let (id, frames) = (track.id, track.num_frames);
        let offset = sound_offset(path)?;
        let track = Self { path, format, decoder, id, rate, frames, offset };
        match track.frames.map(|frames| frames as f64 / f64::from(rate)) {
            Some(seconds) if seconds > MAX_SECONDS => Err(track.too_long()),
            _ => Ok(track),
        }
    }

    fn too_long(&self) -> DataError {
        let reason = format!("its audio is longer than {MAX_SECONDS} seconds: cut it");
        DataError::unreadable(self.path, reason)
    }

    /// By its header, or by decoding it where that says nothing.
    fn seconds(self) -> Result<f64> {
        let (rate, offset) = (f64::from(self.rate), self.offset);
        let frames = match self.frames {
            Some(frames) if frames > 0 => frames as f64,
            _ => self.decoded()?.len() as f64,
        };
        Ok((frames / rate - offset).max(0.0))
    }

    /// The mean of its channels, at its own rate.
    fn decoded(mut self) -> Result<Vec<f32>> {
        let path = self.path;
        let damaged =
            |error: SymphoniaError| DataError::unreadable(path, format!("its audio is damaged: {error}"));
        let most = (MAX_SECONDS * f64::from(self.rate)) as usize;
        let (mut samples, mut interleaved) = (Vec::new(), Vec::<f32>::new());
        loop {
            let packet = match self.format.next_packet() {
                Ok(Some(packet)) => packet,
                Ok(None) => break,
                // A header may claim more than was written; the length is checked by what is there.
                Err(SymphoniaError::IoError(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                    break;
                }
                Err(error) => return Err(damaged(error)),
            };
            if packet.track_id != self.id {
                continue;
            }
            let frame = self.decoder.decode(&packet).map_err(damaged)?;
            let channels = frame.spec().channels().count().max(1);
            frame.copy_to_vec_interleaved(&mut interleaved);
            let mean = |frame: &[f32]| frame.iter().sum::<f32>() / channels as f32;
            samples.extend(interleaved.chunks_exact(channels).map(mean));
            if samples.len() > most {
                return Err(self.too_long());
            }
        }
        Ok(samples)
    }
}

/// `samples` at [`SPEECH_RATE`], as long as they were.
fn resampled(samples: Vec<f32>, rate: u32) -> std::result::Result<Vec<f32>, String> {
    if rate == SPEECH_RATE {
        return Ok(samples);
    }
    let words = |error: &dyn std::fmt::Display| error.to_string();
    let (from, to) = (rate as usize, SPEECH_RATE as usize);
    let mut resampler =
        Fft::<f32>::new(from, to, CHUNK, 1, FixedSync::Both).map_err(|error| words(&error))?;
    let (count, channel) = (samples.len(), [samples]);
    let input = SequentialSliceOfVecs::new(&channel, 1, count).map_err(|error| words(&error))?;
    Ok(resampler.process_all(&input, count, None).map_err(|error| words(&error))?.take_data())
}
