//! Rules of learning that do not depend on a run: optimisers, learning rates, noise levels.

pub mod lr;
pub mod noise;
mod noise_range;
pub mod optim;

pub use noise_range::NoiseRange;
