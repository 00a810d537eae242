//! Sampling: clips from prompts through the stages that also train.

mod config;
pub mod estimate;
mod exchange;
mod likeness;
pub mod magcache;
mod make;
mod output;
mod pieces;
mod preview;
mod prompted;
mod session;
mod steps;
mod writer;

pub use config::{ClipFormat, ClipLayout, Prompts, SampleConfig};
pub use likeness::Likeness;
pub use make::{Course, Stepped, files, latents};
pub use output::{CONTACT_SHEET, ClipFiles, Sampled, clip_files, clip_name, write_clips};
pub use pieces::{PAST_PIXELS, Piece};
pub use preview::{PreviewPlan, Previews, preview_file, preview_video};
pub use prompted::{Prompted, starting_noise};
pub use session::{Half, Session, StepDone};
pub(crate) use writer::Own;
