//! The provenance of an adapter, as strings of a file's header.

use std::collections::BTreeMap;

use super::Style;
use crate::Expert;

/// How an adapter was trained. [`Provenance::metadata`] formats it for a style of file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Provenance {
    /// The adapter's name.
    pub title: String,
    /// What it was trained on, such as "Wan2.1-T2V-1.3B".
    pub base_model: String,
    /// The expert of a two-expert model, as in the header: "high_noise" or "low_noise".
    pub expert: Option<Expert>,
    /// Rank of the factors.
    pub rank: usize,
    /// Alpha of the training; the delta is alpha / rank times the product.
    pub alpha: f64,
    /// Optimiser steps made.
    pub steps: u64,
    /// Epochs begun.
    pub epochs: u64,
    /// Seed of the run.
    pub seed: u64,
    /// Learning rate, per optimiser step.
    pub learning_rate: f64,
    /// Width, height in pixels and frames of the largest bucket.
    pub resolution: Option<(usize, usize, usize)>,
    /// Hash of the settled plan of the run.
    pub plan_hash: String,
    /// The adapters that were added to the base while it was trained, each with strength and SHA-256.
    pub start_on: Vec<String>,
    /// When it was written, as ISO 8601; left out if unknown.
    pub date: Option<String>,
}

/// The string of a header that names the adapters below one.
pub(super) const START_ON: &str = "tandem.start_on";

impl Provenance {
    /// Header strings: `format`, `tandem.*` and `modelspec.*` for every style, `ss_*` as well for kohya.
    /// Sources: Stability-AI/ModelSpec; kohya-ss musubi-tuner hv_train_network.py.
    pub fn metadata(&self, style: Style) -> BTreeMap<String, String> {
        let mut out = BTreeMap::new();
        let mut put = |key: &str, value: &dyn std::fmt::Display| {
            out.insert(key.to_owned(), value.to_string());
        };
        put("format", &"pt");
        put("software", &format!("tandem {}", env!("CARGO_PKG_VERSION")));
        put("tandem.plan_hash", &self.plan_hash);
        put("tandem.base_model", &self.base_model);
        put("tandem.steps", &self.steps);
        put("tandem.rank", &self.rank);
        put("tandem.alpha", &self.alpha);
        put("modelspec.sai_model_spec", &"1.0.0");
        put("modelspec.architecture", &"wan2.1/lora");
        put("modelspec.implementation", &"https://github.com/Wan-Video/Wan2.1");
        put("modelspec.title", &self.title);
        if let Some(expert) = &self.expert {
            put("tandem.expert", &expert.suffix());
        }
        if !self.start_on.is_empty() {
            put(START_ON, &self.start_on.join(", "));
        }
        if let Some((width, height, frames)) = self.resolution {
            put("tandem.resolution", &format!("{width}x{height}x{frames}"));
            put("modelspec.resolution", &format!("{width}x{height}"));
        }
        if let Some(date) = &self.date {
            put("modelspec.date", date);
        }
        if style.is_kohya() {
            put("ss_network_module", &"networks.lora_wan");
            put("ss_network_dim", &self.rank);
            put("ss_network_alpha", &self.alpha);
            put("ss_base_model_version", &"wan");
            put("ss_sd_model_name", &self.base_model);
            put("ss_output_name", &self.title);
            put("ss_steps", &self.steps);
            put("ss_epoch", &self.epochs);
            put("ss_seed", &self.seed);
            put("ss_learning_rate", &self.learning_rate);
        }
        out
    }
}
