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
pub mod captions;
pub mod checks;
pub mod clip;
mod colour;
pub mod companions;
pub mod config;
pub mod dataset;
pub mod decode;
pub mod error;
pub mod glob;
pub mod hashes;
mod import;
pub mod key;
pub mod mask;
pub mod media;
pub mod metadata;
pub mod order;
pub mod out;
pub mod picture;
pub mod preview;
mod random;
pub mod resample;
pub mod scan;
pub mod tensor;
mod unusable;
mod waveform;

pub use audio::{SPEECH_RATE, SpeechTrack, read_speech, speech_seconds};
pub use bucket::{Bucket, BucketRow, BucketTable, Buckets, Window};
pub use cache::{Cache, Entry, Lookup, MissReason};
pub use captions::{CaptionRules, CaptionSource, PerFile, has_trigger, with_class};
pub use checks::{Checked, Finding, check};
pub use clip::Clip;
pub use companions::{Accompanying, Companion, Companions};
pub use config::{
    AudioSource, DataConfig, EmptyCaptions, Extract, ForExpert, LearnFrom, LossMasks, MaskPlace,
    MaskReduction, SetConfig, SetFacts, SizeMultiple, Stills, Unfit,
};
pub use dataset::{Dataset, Footage, Source, Watch, clip_frames, read_clip};
pub use error::{DataError, Result};
pub use hashes::ContentHashes;
pub use key::Key;
pub use mask::MaskRule;
pub use media::Media;
pub use order::{Batch, Cursor, Order, OrderItem};
pub use out::{
    Film, Mp4Writer, SheetRow, SheetStyle, contact_sheet, middle_frame, picture_table, titled_sheet,
    write_commented_gif, write_commented_mp4, write_commented_webp, write_gif, write_mp4, write_webp,
};
pub use picture::Picture;
pub use preview::write_preview;
pub use scan::{Item, media_at, scan};
pub use tensor::{HostTensor, Storage};
