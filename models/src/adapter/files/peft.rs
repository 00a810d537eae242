//! PEFT's settings: the alpha of files without alpha tensors.
//!
//! diffusers keeps them in the header under `lora_adapter_metadata`, PEFT in `adapter_config.json` beside the file.
//! Source of the rules: huggingface/peft src/peft/tuners/lora/{config,layer}.py.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use super::error::AdapterFileError;
use super::keys::KeyStyle;

const HEADER_KEY: &str = "lora_adapter_metadata";
/// The settings of a PEFT adapter folder.
pub(super) const CONFIG_FILE: &str = "adapter_config.json";

/// How PEFT scales B A.
pub struct Settings {
    alpha: f64,
    /// Alphas of modules, by the end of their (diffusers) names.
    patterns: Vec<(String, f64)>,
    /// The rank, if given, and those of modules by the end of their names.
    rank: Option<f64>,
    ranks: Vec<(String, f64)>,
    rslora: bool,
    place: &'static str,
}

impl Settings {
    /// The settings for the file at `path`, if there are any.
    pub fn find(
        path: &Path,
        metadata: &BTreeMap<String, String>,
        style: KeyStyle,
    ) -> Result<Option<Self>, AdapterFileError> {
        if let Some(text) = metadata.get(HEADER_KEY) {
            let all = parse(path, HEADER_KEY, text)?;
            let prefixes = ["transformer.", "transformer_2."];
            let strip =
                |key: &str| prefixes.iter().find_map(|p| key.strip_prefix(p)).unwrap_or(key).to_owned();
            let settings: Map<String, Value> = all.into_iter().map(|(key, v)| (strip(&key), v)).collect();
            return Self::from_map(path, HEADER_KEY, &settings).map(Some);
        }
        if style != KeyStyle::Peft {
            return Ok(None);
        }
        match std::fs::read_to_string(path.with_file_name(CONFIG_FILE)) {
            Ok(text) => Self::from_map(path, CONFIG_FILE, &parse(path, CONFIG_FILE, &text)?).map(Some),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(refuse(path, CONFIG_FILE, e)),
        }
    }

    fn from_map(
        path: &Path,
        place: &'static str,
        settings: &Map<String, Value>,
    ) -> Result<Self, AdapterFileError> {
        let number = |key: &str, value: &Value| {
            let finite = value.as_f64().filter(|v| v.is_finite() && *v != 0.0);
            finite.ok_or_else(|| refuse(path, place, format!("{key} is {value}, not a number other than 0")))
        };
        let alpha =
            settings.get("lora_alpha").ok_or_else(|| refuse(path, place, "there is no lora_alpha"))?;
        match settings.get("peft_type").and_then(Value::as_str) {
            None | Some("LORA") => {}
            Some(other) => {
                return Err(refuse(path, place, format!("peft_type is {other}, and only LORA can be read")));
            }
        }
        let by_module = |key: &str| match settings.get(key) {
            Some(Value::Object(map)) => {
                map.iter().map(|(module, value)| Ok((module.clone(), number(module, value)?))).collect()
            }
            _ => Ok(Vec::new()),
        };
        let rank = settings.get("r").map(|value| number("r", value)).transpose()?;
        let rslora = settings.get("use_rslora").and_then(Value::as_bool).unwrap_or(false);
        let (alpha, patterns) = (number("lora_alpha", alpha)?, by_module("alpha_pattern")?);
        Ok(Self { alpha, patterns, rank, ranks: by_module("rank_pattern")?, rslora, place })
    }

    /// Refuses tensors of another rank than the settings say: it would be ambiguous what alpha is divided by.
    pub fn check_rank(&self, path: &Path, diffusers_name: &str, rank: usize) -> Result<(), AdapterFileError> {
        match of_module(&self.ranks, diffusers_name).or(self.rank) {
            Some(stated) if stated != rank as f64 => Err(refuse(
                path,
                self.place,
                format!(
                    "it says rank {stated} for {diffusers_name}, whose tensors have rank {rank}; correct one of them"
                ),
            )),
            _ => Ok(()),
        }
    }

    /// The alpha of a module by its diffusers name, such that scale = alpha / rank.
    pub fn alpha(&self, diffusers_name: &str, rank: usize) -> f32 {
        let own = of_module(&self.patterns, diffusers_name).unwrap_or(self.alpha);
        // rsLoRA divides by sqrt(rank) where files divide by the rank.
        (if self.rslora { own * (rank as f64).sqrt() } else { own }) as f32
    }
}

/// The number of the first pattern that matches the end of a module's name; in PEFT a pattern may begin with `^`.
fn of_module(patterns: &[(String, f64)], name: &str) -> Option<f64> {
    let fits = |pattern: &str| match pattern.strip_prefix('^') {
        Some(whole) => whole == name,
        None => name.strip_suffix(pattern).is_some_and(|head| head.is_empty() || head.ends_with('.')),
    };
    patterns.iter().find(|(pattern, _)| fits(pattern)).map(|(_, number)| *number)
}

fn parse(path: &Path, place: &str, text: &str) -> Result<Map<String, Value>, AdapterFileError> {
    serde_json::from_str(text).map_err(|e| refuse(path, place, e))
}

fn refuse(path: &Path, place: &str, reason: impl std::fmt::Display) -> AdapterFileError {
    AdapterFileError::Settings { path: path.to_owned(), place: place.to_owned(), reason: reason.to_string() }
}
