//! The keys of an adapter file by module.

use std::collections::BTreeMap;
use std::path::Path;

use super::error::AdapterFileError;
use super::keys::{self, KeyStyle, Meaning, Part};
use crate::Expert;
use crate::weights::Checkpoint;

/// Keys quoted in an error.
const EXAMPLES: usize = 4;

/// The keys of one module by their meaning.
pub(super) type Keys = BTreeMap<Part, String>;

/// All keys of a file.
pub(super) struct Sorted {
    pub modules: BTreeMap<String, Keys>,
    /// The style of the first key.
    pub style: KeyStyle,
    pub expert: Option<Expert>,
}

/// Sorts the keys of `file`.
///
/// # Errors
/// Keys that are not understood, two keys for one thing, keys of two experts, and files without an adapter.
pub(super) fn sort(path: &Path, file: &Checkpoint) -> Result<Sorted, AdapterFileError> {
    let mut modules: BTreeMap<String, Keys> = BTreeMap::new();
    let (mut unknown, mut style, mut experts) = (Vec::new(), None, BTreeMap::new());
    for key in file.names() {
        let Some(Meaning { module, part, style: spelt, expert }) = keys::parse(key) else {
            unknown.push(key.to_owned());
            continue;
        };
        style.get_or_insert(spelt);
        if let Some(expert) = expert {
            experts.entry(expert).or_insert_with(|| key.to_owned());
        }
        let keys = modules.entry(module.clone()).or_default();
        if let Some(first) = keys.insert(part, key.to_owned()) {
            let (path, second) = (path.to_owned(), key.to_owned());
            return Err(AdapterFileError::Duplicate { path, module, first, second });
        }
    }
    if let (Some(high), Some(low)) = (experts.get(&Expert::High), experts.get(&Expert::Low)) {
        let (path, first, second) = (path.to_owned(), high.clone(), low.clone());
        return Err(AdapterFileError::MixedExperts { path, first, second });
    }
    match style {
        Some(style) if unknown.is_empty() => {
            // Single models have `transformer.` too: only `transformer_2.` identifies an expert.
            let expert = experts.contains_key(&Expert::Low).then_some(Expert::Low);
            Ok(Sorted { modules, style, expert })
        }
        None if !unknown.iter().any(|key| key.contains("lora") || foreign_kind(key).is_some()) => {
            Err(AdapterFileError::NotAnAdapter { path: path.to_owned(), keys: unknown.len() })
        }
        _ => Err(unknown_keys(path, unknown)),
    }
}

fn unknown_keys(path: &Path, mut unknown: Vec<String>) -> AdapterFileError {
    let hint = unknown.iter().find_map(|key| foreign_kind(key));
    let count = unknown.len();
    unknown.truncate(EXAMPLES);
    AdapterFileError::UnknownKeys {
        path: path.to_owned(),
        count,
        examples: unknown,
        hint: hint.unwrap_or("they name no module of the Wan transformer; is the adapter for another model?"),
    }
}

/// What kind of unsupported file it is, by words in its keys.
fn foreign_kind(key: &str) -> Option<&'static str> {
    let has = |words: &[&str]| words.iter().any(|word| key.contains(word));
    if has(&["hada_t1", "hada_t2", "lokr_t1", "lokr_t2", "lora_mid"]) {
        Some(
            "factors of convolutions in Tucker form cannot be used; Wan's blocks have no convolutions to adapt",
        )
    } else if has(&[".oft_", ".boft_", ".glora_", ".a1.weight", ".vera_"]) {
        Some(
            "adapters of this kind (OFT, GLoRA, VeRA) cannot be used; extract a plain LoRA from the merged weights",
        )
    } else if has(&["lora_te", "text_encoder."]) {
        Some("adapters of the text encoder cannot be used; export the transformer's part alone")
    } else if has(&[".set_weight", ".reshape_weight"]) {
        Some("whole weights in place of the model's cannot be used; extract a plain LoRA first")
    } else if has(&[".dora_scale", ".hada_", ".lokr_", ".diff"]) {
        Some("they name no module of the Wan transformer; is the adapter for another model?")
    } else {
        None
    }
}
