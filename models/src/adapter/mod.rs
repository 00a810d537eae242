//! Adapters: low-rank factors by the official name of the module they are attached to, in memory and in files.

pub mod files;
mod lora;

pub use lora::{Adapter, Adapters, LoraConfig, Scaling, Target};
