//! LoRA: which modules get factors, how they start, what they are scaled by.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The adapter that is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// Rank of the factors. Default 32.
    pub rank: usize,
    /// Alpha: the delta is multiplied by alpha / rank. Default: the rank, so that the factor is 1.
    pub alpha: Option<f64>,
    /// `standard` scales by alpha / rank, `rslora` by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).
    /// Default `standard`.
    pub scaling: Scaling,
    /// Share of the adapters' input that is dropped in training, 0 to below 1. Default 0.
    pub dropout: f64,
    /// Official module names inside a block, `*` and `?` as wildcards. Default: q, k, v, o of both attentions and
    /// both layers of the feed-forward. A name with `blocks.` in front is matched whole (`blocks.1?.ffn.*`).
    pub targets: Vec<String>,
}

/// How the delta is scaled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scaling {
    /// alpha / rank.
    Standard,
    /// alpha / sqrt(rank).
    RsLora,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            rank: 32,
            alpha: None,
            scaling: Scaling::Standard,
            dropout: 0.0,
            targets: ["self_attn.[qkvo]", "cross_attn.[qkvo]", "ffn.[02]"].map(String::from).to_vec(),
        }
    }
}

/// A module that an adapter is attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Official module name.
    pub module: String,
    /// Width of the output.
    pub out: usize,
    /// Width of the input.
    pub input: usize,
}

impl LoraConfig {
    /// Alpha, settled.
    pub fn alpha(&self) -> f64 {
        self.alpha.unwrap_or(self.rank as f64)
    }

    /// What the product of the factors is multiplied by.
    pub fn scale(&self) -> f64 {
        match self.scaling {
            Scaling::Standard => self.alpha() / self.rank as f64,
            Scaling::RsLora => self.alpha() / (self.rank as f64).sqrt(),
        }
    }

    /// The modules of `modules` (official name, out, in) that the targets name, in the order given.
    ///
    /// # Errors
    /// When a pattern matches nothing, naming the pattern and what there is to match.
    pub fn select(&self, modules: &[(String, usize, usize)]) -> Result<Vec<Target>> {
        let hit = |pattern: &str, module: &str| {
            let local = crate::names::split_block(module).map_or(module, |(_, local)| local);
            glob(pattern, if pattern.starts_with("blocks.") { module } else { local })
        };
        for pattern in &self.targets {
            if !modules.iter().any(|(module, ..)| hit(pattern, module)) {
                let first = modules.iter().filter(|(module, ..)| module.starts_with("blocks.0."));
                let known: Vec<&str> = first.map(|(module, ..)| &module["blocks.0.".len()..]).collect();
                return Err(Error::Mismatch(format!(
                    "the adapter target \"{pattern}\" matches no module of this model; the modules of a block are: {}",
                    known.join(", ")
                )));
            }
        }
        let chosen =
            modules.iter().filter(|(module, ..)| self.targets.iter().any(|pattern| hit(pattern, module)));
        Ok(chosen
            .map(|(module, out, input)| Target { module: module.clone(), out: *out, input: *input })
            .collect())
    }
}

/// Whether `text` matches `pattern`: `*` any run, `?` any one character, `[abc]` one of these.
fn glob(pattern: &str, text: &str) -> bool {
    let mut rest = pattern.chars();
    match rest.next() {
        None => text.is_empty(),
        Some('*') => {
            let starts = text.char_indices().map(|(i, _)| i).chain([text.len()]);
            starts.into_iter().any(|start| glob(rest.as_str(), &text[start..]))
        }
        Some(first) => {
            let mut letters = text.chars();
            let Some(letter) = letters.next() else { return false };
            match (first, rest.as_str().split_once(']')) {
                ('[', Some((set, behind))) => set.contains(letter) && glob(behind, letters.as_str()),
                _ => (first == '?' || first == letter) && glob(rest.as_str(), letters.as_str()),
            }
        }
    }
}
