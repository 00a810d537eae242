//! The defaults of another trainer in the plan of a resumed run.

use toml::{Table, Value};

use super::{Plan, Planned};
use crate::error::{Error, Result};

impl Planned {
    /// Takes over the values that the preset of `train.like` had in `stored`, the plan of a resumed run: presets are corrected from
    /// one version to the next, and a run goes on as it began.
    ///
    /// # Errors
    /// A plan that cannot be written as TOML.
    pub fn keep_preset_of(&mut self, stored: &Plan) -> Result<()> {
        let is_same = stored.train.like == self.plan.train.like;
        if !is_same || self.taken.is_empty() {
            return Ok(());
        }
        let text = |why: String| Error::PlanText { why };
        let table = |plan: &Plan| Table::try_from(plan).map_err(|error| text(error.to_string()));
        let (mut own, theirs) = (table(&self.plan)?, table(stored)?);
        for taken in &self.taken {
            let path: Vec<&str> = taken.key.split('.').collect();
            put(&mut own, &path, found(&theirs, &path));
        }
        self.plan = own.try_into().map_err(|error: toml::de::Error| text(error.to_string()))?;
        Ok(())
    }
}

/// The value at `path`.
fn found<'a>(table: &'a Table, path: &[&str]) -> Option<&'a Value> {
    match path {
        [] => None,
        [name] => table.get(*name),
        [section, rest @ ..] => found(table.get(*section)?.as_table()?, rest),
    }
}

/// Puts `value` at `path`, or nothing where there is none.
fn put(table: &mut Table, path: &[&str], value: Option<&Value>) {
    match (path, value) {
        ([name], Some(value)) => drop(table.insert((*name).to_owned(), value.clone())),
        ([name], None) => drop(table.remove(*name)),
        ([section, rest @ ..], value) => {
            if let Some(below) = table.get_mut(*section).and_then(Value::as_table_mut) {
                put(below, rest, value);
            }
        }
        ([], _) => {}
    }
}
