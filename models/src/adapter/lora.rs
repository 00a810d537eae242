//! LoRA: which modules get factors, how they start, what they are scaled by.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use kernels::low_rank::Factors;
use kernels::random::Key;
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

/// The factors attached to one module.
#[derive(Debug, Clone)]
pub struct Adapter {
    factors: Factors,
    trainable: bool,
}

impl Adapter {
    /// Factors that are only applied.
    pub fn frozen(factors: Factors) -> Self {
        Self { factors, trainable: false }
    }

    /// Factors whose gradients are wanted.
    pub fn trainable(factors: Factors) -> Self {
        Self { factors, trainable: true }
    }

    /// A [r, in], B [out, r], scale.
    pub fn factors(&self) -> &Factors {
        &self.factors
    }

    /// Whether its gradients are wanted.
    pub fn is_trainable(&self) -> bool {
        self.trainable
    }
}

/// The adapters of a model, or of the part of it that one device holds, by official module name.
///
/// A module has at most one trainable adapter and any number of frozen ones.
#[derive(Debug, Clone, Default)]
pub struct Adapters {
    by_module: BTreeMap<String, Vec<Adapter>>,
}

impl Adapters {
    /// Fresh trainable factors for `targets`: A uniform in ±1/sqrt(in) (Kaiming with a = sqrt 5, as PEFT and kohya
    /// start it), B zero, so that the model starts unchanged. A is a function of `seed` and the module's name alone.
    pub fn fresh(targets: &[Target], config: &LoraConfig, seed: u64, device: &Device) -> Result<Self> {
        let mut adapters = Self::default();
        for target in targets {
            let key = Key::new(seed, "adapter", &[]).child(&target.module, 0);
            let bound = 1.0 / (target.input as f64).sqrt();
            let count = (config.rank * target.input) as u64;
            let a: Vec<f32> = (0..count).map(|i| ((2.0 * key.uniform(i) - 1.0) * bound) as f32).collect();
            let factors = Factors {
                a: Tensor::from_vec(a, (config.rank, target.input), device)?,
                b: Tensor::zeros((target.out, config.rank), candle_core::DType::F32, device)?,
                scale: config.scale(),
            };
            adapters.attach(target.module.clone(), Adapter::trainable(factors));
        }
        Ok(adapters)
    }

    /// Adds `adapter` to the module of the official name `module`.
    pub fn attach(&mut self, module: String, adapter: Adapter) {
        self.by_module.entry(module).or_default().push(adapter);
    }

    /// The adapters of one module.
    pub fn of(&self, module: &str) -> &[Adapter] {
        self.by_module.get(module).map_or(&[], Vec::as_slice)
    }

    /// Every module with its adapters, ordered by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[Adapter])> {
        self.by_module.iter().map(|(module, adapters)| (module.as_str(), adapters.as_slice()))
    }

    /// The part whose modules `keep` wants, on `device`.
    pub fn part(&self, device: &Device, keep: impl Fn(&str) -> bool) -> Result<Self> {
        let mut part = Self::default();
        for (module, adapters) in self.iter().filter(|(module, _)| keep(module)) {
            for Adapter { factors, trainable } in adapters {
                let (a, b) = (factors.a.to_device(device)?, factors.b.to_device(device)?);
                let factors = Factors { a, b, scale: factors.scale };
                part.attach(module.to_owned(), Adapter { factors, trainable: *trainable });
            }
        }
        Ok(part)
    }

    /// The trainable tensors by official name (`<module>.lora_A.weight`, `<module>.lora_B.weight`), ordered by name.
    pub fn parameters(&self) -> BTreeMap<String, Tensor> {
        let mut parameters = BTreeMap::new();
        for (module, adapters) in self.iter() {
            for adapter in adapters.iter().filter(|adapter| adapter.trainable) {
                parameters.insert(format!("{module}.lora_A.weight"), adapter.factors.a.clone());
                parameters.insert(format!("{module}.lora_B.weight"), adapter.factors.b.clone());
            }
        }
        parameters
    }

    /// Puts new values in place of the trainable tensors; names that are not given stay as they are.
    pub fn set_parameters(&mut self, parameters: &BTreeMap<String, Tensor>) {
        for (module, adapters) in &mut self.by_module {
            for adapter in adapters.iter_mut().filter(|adapter| adapter.trainable) {
                if let Some(a) = parameters.get(&format!("{module}.lora_A.weight")) {
                    adapter.factors.a = a.clone();
                }
                if let Some(b) = parameters.get(&format!("{module}.lora_B.weight")) {
                    adapter.factors.b = b.clone();
                }
            }
        }
    }
}
