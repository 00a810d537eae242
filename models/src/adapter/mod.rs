//! Adapters in memory: low-rank factors by the official name of the module they are attached to.

mod lora;

pub use lora::{Adapter, Adapters, LoraConfig, Scaling, Target};
