//! Tandem: trains LoRA adapters for the Wan video models on few cards, and samples through the same forward pass.
//!
//! Recipe ([`recipe`]) -> [`plan`] -> [`encode`] (the cache) -> [`train`] (the [`pipeline`] over devices); [`sample`] uses the
//! same pipeline. Each module uses those before it in this list, and none after it; a test checks that.

pub mod watch;

pub mod replicas;

pub mod solver;

pub mod pipeline;

pub mod learning;

pub mod machine;

pub mod base;

pub mod adapters;

pub mod residents;

pub mod encode;

pub mod sample;

pub mod recipe;

pub mod plan;

pub mod report;

pub mod train;

pub mod tools;

pub mod serve;

pub mod cli;

// These belong to all.
pub mod bounds;
pub mod bytes;
pub mod error;
pub mod paths;

pub use error::{Error, Result};
