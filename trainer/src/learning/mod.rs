//! Rules of learning that do not depend on a run: optimisers, averages, learning rates, losses, priors, noise levels.

pub mod ema;
pub mod loss;
pub mod lr;
pub mod mask;
pub mod noise;
mod noise_range;
pub mod optim;
pub mod patterns;
pub mod prior;
pub mod slider;
pub mod step_size;

pub use noise_range::NoiseRange;
