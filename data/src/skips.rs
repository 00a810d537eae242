//! Clips that are left out by name: `data.skip`.

use std::collections::BTreeSet;

use crate::config::DataConfig;
use crate::error::{DataError, Result};
use crate::glob;

/// The clips that were left out by name, and which patterns matched one.
#[derive(Debug, Default)]
pub(crate) struct Skips {
    used: BTreeSet<String>,
    names: Vec<String>,
}

impl Skips {
    /// Whether the clip `id` of the set called `set` is left out by the patterns of `config`: they match names with the set in front
    /// and without.
    pub fn take(&mut self, config: &DataConfig, id: &str, set: &str) -> bool {
        let below = id.strip_prefix(set).and_then(|rest| rest.strip_prefix('/')).unwrap_or(id);
        let matching = |pattern: &&String| glob::matches(pattern, id) || glob::matches(pattern, below);
        let before = self.names.len();
        for pattern in config.skip.iter().filter(matching) {
            self.used.insert(pattern.clone());
            self.names.truncate(before);
            self.names.push(id.to_owned());
        }
        self.names.len() > before
    }

    /// Checks that each pattern of `config` and its sets left out a clip, except those that `is_late`. `known` are the names of
    /// clips that are left.
    ///
    /// # Errors
    /// A pattern that matches nothing.
    pub fn check<'a>(
        &self,
        config: &DataConfig,
        is_late: &dyn Fn(&str) -> bool,
        known: impl Iterator<Item = &'a str>,
    ) -> Result<()> {
        let of_sets = config.sets.iter().filter_map(|set| set.skip.as_ref()).flatten();
        let unused = |pattern: &&String| !self.used.contains(*pattern) && !is_late(pattern);
        let Some(pattern) = config.skip.iter().chain(of_sets).find(unused) else { return Ok(()) };
        let known: Vec<&str> = known.take(5).collect();
        let reason = format!("\"{pattern}\" matches no clip; clips are named like {}", known.join(", "));
        Err(DataError::Config { key: "skip", reason })
    }

    /// A line about what was left out, if anything was.
    pub fn note(&self) -> Option<String> {
        let (count, names) = (self.names.len(), self.names.join(", "));
        (count > 0).then(|| format!("left out by data.skip ({count}): {names}"))
    }
}
