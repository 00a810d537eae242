//! PEFT's settings: the alpha of files that hold none in their tensors.
//!
//! diffusers keeps them in the header under `lora_adapter_metadata`, PEFT in `adapter_config.json` beside the file.
//! Source of the rules: huggingface/peft src/peft/tuners/lora/{config,layer}.py.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use super::error::AdapterFileError;
use super::keys::KeyStyle;

const HEADER_KEY: &str = "lora_adapter_metadata";
const CONFIG_FILE: &str = "adapter_config.json";

/// What PEFT multiplies B A by.
pub struct Settings {
    alpha: f64,
    /// Alphas of modules whose (diffusers) names end like this.
    patterns: Vec<(String, f64)>,
    rslora: bool,
}

impl Settings {
    /// The settings that go with the file at `path`, if there are any.
    pub fn find(
        path: &Path,
        metadata: &BTreeMap<String, String>,
        style: KeyStyle,
    ) -> Result<Option<Self>, AdapterFileError> {
        if let Some(text) = metadata.get(HEADER_KEY) {
            let all = parse(path, HEADER_KEY, text)?;
            let strip = |key: &str| key.strip_prefix("transformer.").unwrap_or(key).to_owned();
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

    fn from_map(path: &Path, place: &str, settings: &Map<String, Value>) -> Result<Self, AdapterFileError> {
        let number = |key: &str, value: &Value| {
            let finite = value.as_f64().filter(|v| v.is_finite() && *v != 0.0);
            finite.ok_or_else(|| refuse(path, place, format!("{key} is {value}, not a number other than 0")))
        };
        let alpha =
            settings.get("lora_alpha").ok_or_else(|| refuse(path, place, "there is no lora_alpha"))?;
        let mut patterns = Vec::new();
        if let Some(Value::Object(map)) = settings.get("alpha_pattern") {
            for (module, value) in map {
                patterns.push((module.clone(), number(module, value)?));
            }
        }
        let rslora = settings.get("use_rslora").and_then(Value::as_bool).unwrap_or(false);
        Ok(Self { alpha: number("lora_alpha", alpha)?, patterns, rslora })
    }

    /// The alpha of a module, in the sense of scale = alpha / rank, by its diffusers name.
    pub fn alpha(&self, diffusers_name: &str, rank: usize) -> f32 {
        let ends = |end: &str| {
            diffusers_name.strip_suffix(end).is_some_and(|head| head.is_empty() || head.ends_with('.'))
        };
        let own = self.patterns.iter().find(|(end, _)| ends(end)).map_or(self.alpha, |(_, alpha)| *alpha);
        // rsLoRA divides by sqrt(rank) where files divide by the rank.
        (if self.rslora { own * (rank as f64).sqrt() } else { own }) as f32
    }
}

fn parse(path: &Path, place: &str, text: &str) -> Result<Map<String, Value>, AdapterFileError> {
    serde_json::from_str(text).map_err(|e| refuse(path, place, e))
}

fn refuse(path: &Path, place: &str, reason: impl std::fmt::Display) -> AdapterFileError {
    AdapterFileError::Settings { path: path.to_owned(), place: place.to_owned(), reason: reason.to_string() }
}
