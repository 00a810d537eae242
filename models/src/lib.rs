//! The models of Tandem: Wan DiT, VAE, UMT5, their adapters, and the files all of these are stored in.
//!
//! Everything here is a pure function of weights and inputs: nothing draws a random number from a
//! generator with state, and only [`adapter::files`] and [`weights`] touch the disk.

pub mod adapter;
pub mod clip;
pub mod contents;
pub mod delta;
pub mod dit;
pub mod error;
pub mod expert;
pub mod kind;
pub mod movable;
pub mod names;
mod open;
pub mod picture;
pub mod published;
mod taps;
pub mod text;
pub mod umt5;
pub mod vae;
pub mod wav2vec;
pub mod weights;

pub use contents::Contents;
pub use error::{Error, Result};
pub use expert::Expert;
pub use movable::Movable;
pub use open::open_dit;
