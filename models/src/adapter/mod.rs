//! Adapters: changes of weights by the official name of the module they belong to, in memory and in files.

mod apply;
mod average;
mod config;
mod decompose;
pub mod files;
mod fresh;

pub use apply::{Applied, ApplyMode, Source, apply, complete};
pub use average::average;
pub use config::{LoraConfig, Scaling, StartOn, Target, names_module};
pub use decompose::{Rank, Reduced, extract, resize};
pub use fresh::check_beginning;

pub use crate::delta::{
    Adapter, AdapterKind, Adapters, Backward, Change, Delta, DoraPair, LoraPair, Magnitude, Site,
};
