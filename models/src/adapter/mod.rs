//! Adapters: changes of weights by the official name of the module they belong to, in memory and in files.

mod apply;
mod change;
mod config;
mod decompose;
pub mod files;
mod fresh;
mod kind;
mod set;

pub use apply::{Applied, ApplyMode, Source, apply, complete};
pub use change::{Change, DoraPair, LoraPair, Magnitude};
pub use config::{Kind, LoraConfig, Scaling, Target};
pub use decompose::{Rank, Reduced, extract, resize};
pub use fresh::check_beginning;
pub use kind::{Backward, Delta, Site};
pub use set::{Adapter, Adapters};
