//! What differs between two plans, key by key.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::Plan;
use crate::error::{Error, Result};

impl Plan {
    /// What differs in `later`, as `key: here -> there`.
    pub fn differences(&self, later: &Self) -> Result<Vec<Difference>> {
        let (before, after) = (leaves(self)?, leaves(later)?);
        let keys: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
        let none = || "(not set)".to_owned();
        let changed = keys.into_iter().filter(|key| before.get(*key) != after.get(*key));
        Ok(changed
            .map(|key| Difference {
                key: key.clone(),
                before: before.get(key).cloned().unwrap_or_else(none),
                after: after.get(key).cloned().unwrap_or_else(none),
            })
            .collect())
    }
}

/// The values of `settings` by their dotted keys.
///
/// # Errors
/// What TOML has no words for.
pub(super) fn leaves(settings: &impl Serialize) -> Result<BTreeMap<String, String>> {
    let value = toml::Value::try_from(settings).map_err(|e| Error::PlanText { why: e.to_string() })?;
    let mut leaves = BTreeMap::new();
    flatten(&value, String::new(), &mut leaves);
    Ok(leaves)
}

/// A key of two plans that differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Dotted key.
    pub key: String,
    /// Value in the stored plan.
    pub before: String,
    /// Value now.
    pub after: String,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{}: {} -> {}", self.key, self.before, self.after)
    }
}

fn flatten(value: &toml::Value, key: String, leaves: &mut BTreeMap<String, String>) {
    let below = |name: &str| if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
    match value {
        toml::Value::Table(table) => table.iter().for_each(|(name, v)| flatten(v, below(name), leaves)),
        toml::Value::Array(list) if list.iter().any(toml::Value::is_table) => {
            list.iter().enumerate().for_each(|(i, v)| flatten(v, below(&i.to_string()), leaves));
        }
        leaf => {
            leaves.insert(key, leaf.to_string());
        }
    }
}
