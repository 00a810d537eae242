//! Sampling: clips from prompts through the stages that also train.

mod config;
pub mod estimate;
mod latents;
mod output;
mod shares;

pub use config::{ClipFormat, Prompts, SampleConfig};
pub use latents::{Prompted, Sampling, generate, starting_noise};
pub use output::{CONTACT_SHEET, ClipFiles, Sampled, clip_files, clip_name, write_clips};
pub use shares::Share;
