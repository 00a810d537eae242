//! Tandem: trains LoRA adapters for the Wan video models on few cards, and samples through the same forward pass.
//!
//! Recipe -> [`plan`] -> [`encode`] (the cache) -> [`run`] (the [`pipeline`] over devices) -> [`export`]; [`sample`] uses
//! the same pipeline.

pub mod adapters;
pub mod background;
pub mod base;
pub mod batch;
pub mod bench;
pub mod bounds;
pub mod bytes;
pub mod checkpoint;
pub mod cli;
pub mod devices;
pub mod doctor;
pub mod draft;
pub mod encode;
pub mod error;
pub mod export;
pub mod forecast;
pub mod hub;
pub mod inspect;
pub mod interrupt;
pub mod like;
pub mod lr;
pub mod memory;
pub mod metrics;
pub mod noise;
pub mod optim;
pub mod pipeline;
pub mod plan;
pub mod precision;
pub mod probe;
pub mod prompt;
pub mod recipe;
pub mod run;
pub mod sample;
pub mod solver;
pub mod tensorboard;
pub mod ui;

pub use error::{Error, Result};
