//! Checkpoints on disk: opened, checked against what a model expects, read tensor by tensor; and written.
//!
//! A [`Checkpoint`] is the files on disk, by the names in them. [`Weights`] are a checkpoint matched to a model, by official
//! names: every tensor is used exactly once. Both read names, shapes and types from headers alone.

mod checkpoint;
mod copy;
mod dtype;
mod entry;
mod error;
mod fingerprint;
mod folder;
mod frozen;
mod header;
mod kind;
mod loader;
mod patch;
mod pickle;
mod pth;
mod quantised;
mod quantised_file;
mod quantised_writer;
mod read;
mod seeded;
pub mod side_by_side;
mod stored;
mod write;

pub use checkpoint::{Checkpoint, StoredCodes};
pub use copy::{Copied, write_copy};
pub use dtype::StoredDType;
pub use entry::Entry;
pub use error::{MismatchReport, Result, WeightsError};
pub use frozen::{Frozen, Storage};
pub use kind::FileKind;
pub use loader::{TensorClass, TensorSpec, Weights};
pub use patch::{Patch, Patches};
pub use quantised::Grid;
pub use quantised_file::{CacheOutcome, QuantisedFile};
pub use write::{Entered, tensor_hash, write_atomically, write_safetensors, write_streamed};
