//! Video files and captions to buckets, frames and cached latents; finished clips out.
//!
//! The path of a clip: [`scan()`] finds it, [`decode::probe`] reads its size and times, [`bucket`] decides in which size and
//! length it is trained and which windows of it, [`clip`] decodes, resamples and crops them, and [`cache`] keeps what an
//! encoder returned for them. [`order`] decides in which order they are trained, [`out`] writes finished clips.
//!
//! This crate depends on neither models nor a tensor library: it builds and tests without a GPU.

pub mod atomic;
pub mod audio;
pub mod bucket;
pub mod cache;
mod caption_files;
pub mod captions;
pub mod checks;
pub mod clip;
mod colour;
pub mod companions;
pub mod config;
mod crop;
pub mod dataset;
pub mod decode;
pub mod error;
mod fixes;
pub mod glob;
pub mod hashes;
mod import;
pub mod key;
mod look;
pub mod mask;
pub mod media;
pub mod metadata;
mod named;
pub mod order;
pub mod out;
pub mod picture;
pub mod preview;
mod random;
pub mod resample;
pub mod scan;
mod shards;
mod single;
mod skips;
mod source;
pub mod tensor;
mod unusable;
mod waveform;

pub use audio::{SPEECH_RATE, SpeechTrack, read_speech, speech_seconds};
pub use bucket::{Bucket, BucketRow, BucketTable, Buckets, Window};
pub use cache::{Cache, Entry, Lookup, MissReason};
pub use caption_files::{CaptionFile, HasCaption, caption_files};
pub use captions::{CaptionRules, CaptionSource, PerFile, has_trigger, with_class};
pub use checks::{Checked, Finding, check};
pub use clip::Clip;
pub use companions::{Accompanying, Companion, Companions};
pub use config::{
    AudioSource, DataConfig, EmptyCaptions, Extract, ForExpert, LearnFrom, LossMasks, MaskPlace,
    MaskReduction, SetConfig, SetFacts, SizeMultiple, Stills, Takes, Unfit,
};
pub use crop::Crop;
pub use dataset::{Dataset, Footage, Watch};
pub use error::{DataError, Result};
pub use hashes::ContentHashes;
pub use key::Key;
pub use mask::MaskRule;
pub use media::Media;
pub use named::{COMPANION_KEYS, Named};
pub use order::{Batch, Cursor, Order, OrderItem};
pub use out::{
    Film, Mp4Writer, SheetRow, SheetStyle, contact_sheet, middle_frame, pcm, picture_table, titled_sheet,
    write_commented_gif, write_commented_mp4, write_commented_webp, write_gif, write_mp4, write_wav,
    write_webp,
};
pub use picture::Picture;
pub use preview::write_preview;
pub use scan::{Item, media_at, scan};
pub use single::{clip_frames, pictures_of, read_clip};
pub use source::{Scene, Source};
pub use tensor::{HostTensor, Storage};
