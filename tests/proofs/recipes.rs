//! Recipes: each one that is shipped is read, and the page that documents the keys names all of them and no other.

use std::collections::BTreeMap;

use data::DataConfig;
use models::adapter::LoraConfig;
use proofs::source::{File, files, root};
use serde_json::{Value, json};
use trainer::base::ModelConfig;
use trainer::devices::DevicesConfig;
use trainer::memory::MemoryConfig;
use trainer::optim::OptimizerConfig;
use trainer::recipe::{CheckpointConfig, ExportConfig, Recipe, RunConfig, TrainConfig};
use trainer::sample::SampleConfig;

fn shipped() -> Vec<File> {
    files(&[".toml"]).into_iter().filter(|file| file.path.starts_with("recipes/")).collect()
}

/// Every section of a recipe with all of its keys, those without a default as null.
fn sections() -> Value {
    let data: DataConfig = serde_json::from_value(json!({ "folder": "clips" })).unwrap();
    json!({
        "run": RunConfig::default(),
        "model": ModelConfig::default(),
        "data": data,
        "adapter": LoraConfig::default(),
        "train": TrainConfig::default(),
        "optimizer": OptimizerConfig::default(),
        "devices": DevicesConfig::default(),
        "memory": MemoryConfig::default(),
        "checkpoint": CheckpointConfig::default(),
        "sample": SampleConfig::default(),
        "export": ExportConfig::default(),
    })
}

/// The dotted keys below `value` with their defaults; an empty table is a key whose entries the user names.
fn keys_below(key: &str, value: &Value, keys: &mut BTreeMap<String, Value>) {
    match value.as_object().filter(|table| !table.is_empty()) {
        Some(table) => {
            for (name, value) in table {
                let below = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                keys_below(&below, value, keys);
            }
        }
        None => drop(keys.insert(key.to_owned(), value.clone())),
    }
}

/// (key, default) of the rows of the tables of `page` that begin with a key in backticks.
fn documented(page: &str) -> BTreeMap<String, String> {
    let row = |line: &str| {
        let mut cells = line.strip_prefix("| `")?.split(" | ");
        let key = cells.next()?.strip_suffix('`')?.to_owned();
        Some((key, cells.next()?.trim().to_owned()))
    };
    page.lines().filter_map(row).collect()
}

/// The TOML value that a cell is, in backticks or not; `None` for words.
fn literal(cell: &str) -> Option<toml::Value> {
    let bare = cell.strip_prefix('`').and_then(|rest| rest.strip_suffix('`')).unwrap_or(cell);
    toml::from_str::<toml::Table>(&format!("value = {bare}")).ok()?.remove("value")
}

#[test]
fn every_shipped_recipe_is_read() {
    let recipes = shipped();
    assert!(!recipes.is_empty(), "no recipe is shipped");
    for file in recipes {
        Recipe::read(&root().join(&file.path)).unwrap_or_else(|error| panic!("{}: {error}", file.path));
    }
}

#[test]
fn the_page_of_keys_names_every_key_and_no_other() {
    let page = std::fs::read_to_string(root().join("recipes/README.md")).unwrap();
    let (mut keys, documented) = (BTreeMap::new(), documented(&page));
    keys_below("", &sections(), &mut keys);
    let missing: Vec<&String> = keys.keys().filter(|key| !documented.contains_key(*key)).collect();
    let unknown: Vec<&String> = documented.keys().filter(|key| !keys.contains_key(*key)).collect();
    assert!(missing.is_empty(), "keys that recipes/README.md does not document: {missing:#?}");
    assert!(unknown.is_empty(), "keys that recipes/README.md documents and no recipe has: {unknown:#?}");
}

/// A default that is written as a value is the default; words are for what depends on something else.
#[test]
fn the_page_of_keys_tells_the_defaults() {
    let page = std::fs::read_to_string(root().join("recipes/README.md")).unwrap();
    let (mut keys, documented) = (BTreeMap::new(), documented(&page));
    keys_below("", &sections(), &mut keys);
    let is_open = |default: &Value| default.is_null() || *default == json!([]) || *default == json!({});
    // The folder of the clips has no default, and the published negative prompt is too long for a table.
    let has_words = |key: &str| matches!(key, "data.folder" | "sample.negative");
    let mut compared = 0;
    for (key, cell) in documented.iter().filter(|(key, _)| !is_open(&keys[*key]) && !has_words(key)) {
        let default = &keys[key];
        let told =
            literal(cell).unwrap_or_else(|| panic!("{key}: the default is {default}, the page says {cell}"));
        let numbers = |value: Value| value.as_f64().map_or(value, |number| json!(number));
        let told = numbers(serde_json::to_value(told).unwrap());
        assert_eq!(told, numbers(default.clone()), "{key}");
        compared += 1;
    }
    assert!(compared > 30, "only {compared} defaults compared");
}

/// The sections above are those of a recipe: one that has each of them, with each of their keys that has a default, is
/// read, and one with a key more is refused by that key, with the nearest one that there is.
#[test]
fn a_recipe_with_every_key_is_read_and_one_with_another_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("all.toml");
    let mut sections = sections();
    for section in sections.as_object_mut().unwrap().values_mut() {
        section.as_object_mut().unwrap().retain(|_, value| !value.is_null());
    }
    sections["train"]["timesteps"].as_object_mut().unwrap().retain(|_, value| !value.is_null());
    let text = |value: &Value| toml::to_string(value).unwrap();
    std::fs::write(&path, text(&sections)).unwrap();
    Recipe::read(&path).unwrap();

    for (section, wrong, nearest) in
        [("train", "step", "steps"), ("optimizer", "learning_rate", "lr"), ("data", "frame", "frames")]
    {
        let mut changed = sections.clone();
        changed[section][wrong] = json!(1);
        std::fs::write(&path, text(&changed)).unwrap();
        let error = Recipe::read(&path).unwrap_err().to_string();
        assert!(error.contains(wrong) && error.contains(nearest), "{error}");
    }
}
