//! `--set key=value`: overrides a setting of the recipe.

use std::str::FromStr;

use toml::{Table, Value};

use crate::error::{Error, Result};

/// A dotted key of a recipe with its value.
#[derive(Debug, Clone, PartialEq)]
pub struct Assignment {
    /// Such as `train.steps`.
    pub key: String,
    /// The value, as in a recipe.
    pub value: Value,
}

/// Keys that exclude each other: setting one removes the other.
const EITHER_OR: [[&str; 2]; 2] = [["train.steps", "train.epochs"], ["data.folder", "data.import"]];

impl FromStr for Assignment {
    type Err = String;

    /// Reads `key=value`. The value is TOML; anything else, such as `fp8` or `clips/cats`, is a string.
    fn from_str(text: &str) -> Result<Self, String> {
        let (key, value) = text.split_once('=').ok_or("write key=value, such as train.steps=20")?;
        let (key, value) = (key.trim().to_owned(), value.trim());
        let is_word = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_alphanumeric() || c == '_');
        if !key.contains('.') || !key.split('.').all(is_word) {
            return Err(format!(
                "\"{key}\" is not a dotted key; write section.key=value, such as train.steps=20"
            ));
        }
        let parsed = toml::from_str::<Table>(&format!("value = {value}")).ok();
        let parsed = parsed.filter(|table| table.len() == 1).and_then(|mut table| table.remove("value"));
        Ok(Self { key, value: parsed.unwrap_or_else(|| Value::String(value.to_owned())) })
    }
}

impl Assignment {
    /// Sets the value in `recipe`.
    ///
    /// # Errors
    /// If the key is not in a section.
    pub fn apply(&self, recipe: &mut Table) -> Result<()> {
        for other in EITHER_OR.iter().filter(|pair| pair.contains(&self.key.as_str())).flatten() {
            let (section, name) = other.split_once('.').unwrap_or(("", other));
            if let Some(section) = recipe.get_mut(section).and_then(Value::as_table_mut) {
                section.remove(name);
            }
        }
        let mut table = recipe;
        let (sections, name) = self.key.rsplit_once('.').unwrap_or(("", &self.key));
        for section in sections.split('.') {
            let below = table.entry(section).or_insert_with(|| Value::Table(Table::new()));
            table = below.as_table_mut().ok_or_else(|| Error::Setting {
                key: format!("--set {}", self.key),
                why: format!("{section} is not a section of a recipe"),
            })?;
        }
        table.insert(name.to_owned(), self.value.clone());
        Ok(())
    }
}
