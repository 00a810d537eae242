//! Tandem: trains LoRA adapters for the Wan video models on few cards, and samples through the same forward pass.

pub mod error;
pub mod pipeline;
pub mod solver;
pub mod tensorboard;

pub use error::{Error, Result};
