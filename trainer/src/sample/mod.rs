//! Sampling: clips from prompts through the stages that also train.

mod config;
mod latents;
mod output;

pub use config::{ClipFormat, SampleConfig};
pub use latents::{Prompted, generate, starting_noise};
pub use output::{CONTACT_SHEET, clip_name, write_clips};
