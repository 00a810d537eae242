//! Sampling: clips from prompts through the stages that also train.

mod config;
pub mod estimate;
mod exchange;
pub mod magcache;
mod make;
mod output;
mod prompted;
mod session;
mod steps;

pub use config::{ClipFormat, ClipLayout, Prompts, SampleConfig};
pub use make::{Course, Stepped, files, latents};
pub use output::{CONTACT_SHEET, ClipFiles, Sampled, clip_files, clip_name, write_clips};
pub use prompted::{Prompted, starting_noise};
pub use session::{Half, Session, StepDone};
