//! Video files and captions to buckets, frames and cached latents; finished clips out.
//!
//! The way of a clip: [`scan()`] finds it, [`decode::probe`] reads its size and times, [`bucket`] says in which size and
//! length it is trained and which windows of it, [`clip`] decodes, resamples and crops them, and [`cache`] keeps what an
//! encoder made of them. [`order`] says in which order they are trained, [`out`] writes finished clips.
//!
//! This crate knows neither models nor tensors on devices: it builds and tests without a GPU.

mod colour;
pub mod config;
pub mod decode;
pub mod error;
pub mod glob;
pub mod metadata;
pub mod scan;

pub use config::{CaptionSource, DataConfig, EmptyCaptions, Extract, SizeMultiple, Stills};
pub use error::{DataError, Result};
pub use scan::{Item, Media, scan};
