//! What has to be the same on all replicas of a run, by key: what is trained, but no path, device or memory of a host.

use std::collections::BTreeMap;

use super::Plan;
use super::difference::leaves;
use crate::error::Result;
use crate::recipe::Recipe;

/// Keys that have to be the same, with those that begin with them.
const COMMON: [&str; 13] = [
    "tandem",
    "run.seed",
    "model.name",
    "model.expert",
    "model.boundary",
    "model.base",
    "model.stream",
    "model.precision.",
    "data.",
    "dataset.",
    "adapter.",
    "train.",
    "optimizer.",
];
/// Keys below those that belong to a host.
const OWN: [&str; 5] = [
    "data.folder",
    "data.import",
    "adapter.init_from",
    "model.precision.streamed",
    // The clips that were left out are in the digest.
    "dataset.skipped",
];

impl Plan {
    /// The settings of the plan that all replicas share.
    ///
    /// # Errors
    /// When it cannot be written as text.
    pub fn common_settings(&self) -> Result<BTreeMap<String, String>> {
        Ok(common(leaves(self)?))
    }
}

/// The settings of a recipe that all replicas share, as far as they can be told before the clips are read.
///
/// # Errors
/// When they cannot be written as text.
pub fn of_recipe(recipe: &Recipe) -> Result<BTreeMap<String, String>> {
    let Recipe { adapter, train, optimizer, data, .. } = recipe;
    let mut all = BTreeMap::new();
    for (section, own) in [
        ("adapter", leaves(adapter)?),
        ("train", leaves(train)?),
        ("optimizer", leaves(optimizer)?),
        ("data", leaves(data)?),
    ] {
        all.extend(own.into_iter().map(|(key, value)| (format!("{section}.{key}"), value)));
    }
    Ok(common(all))
}

/// Whether `key` is a path of `adapter.start_on`, whose files are told by their hashes.
pub(crate) fn is_path_of_start(key: &str) -> bool {
    key.starts_with("adapter.start_on.") && key.ends_with(".path")
}

fn common(mut all: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let is_common = |key: &str| COMMON.iter().any(|prefix| key.starts_with(prefix));
    let is_own = |key: &str| OWN.iter().any(|own| key.starts_with(own)) || is_path_of_start(key);
    all.retain(|key, _| is_common(key) && !is_own(key));
    all
}
