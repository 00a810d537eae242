//! The `[adapter]` section of a recipe: the kind of the adapters, the modules that get one, and their scale.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::delta::AdapterKind;
use crate::dit::LayerId;
use crate::dit::modules::CHAINS;
use crate::expert::Expert;
use crate::{Error, Result};

/// The adapter that is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// `lora`; `dora`, which also trains the length of each row of the weight; `loha`, two products of thin factors
    /// multiplied number by number; `lokr`, a Kronecker product, the smallest of them. Default `lora`.
    pub kind: AdapterKind,
    /// Rank of the factors. Default: the largest of the files that training begins with, else 32.
    pub rank: Option<usize>,
    /// Alpha: the delta is multiplied by alpha / rank. Default: the rank, so that the factor is 1.
    pub alpha: Option<f64>,
    /// `standard` scales by alpha / rank, `rslora` by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).
    /// Default `standard`.
    pub scaling: Scaling,
    /// Fraction of the adapters' input that is dropped in training, 0 to below 1. Default 0.
    pub dropout: f64,
    /// LoKr only: the most rows and columns of the coarse matrix, as LyCORIS's `factor`. Default: as close to the square roots of
    /// the widths as possible, which makes the adapter smallest.
    pub factor: Option<usize>,
    /// An adapter file of any format, or a PEFT folder, that training starts from, relative to the recipe. Factors of another
    /// rank are resized to `rank`. Default: none, training starts with an adapter that has no effect.
    pub init_from: Option<PathBuf>,
    /// The same for the adapter of the expert for high noise alone, of a model of two, in place of `init_from`. Default: none.
    pub init_from_high: Option<PathBuf>,
    /// The same for the adapter of the expert for low noise alone. Default: none.
    pub init_from_low: Option<PathBuf>,
    /// Official module names inside a block, `*` and `?` as wildcards; of a model with a side chain (VACE), inside its blocks.
    /// Default: q, k, v, o of both attentions and both layers of the feed-forward. A name with `blocks.`, `vace_blocks.` or
    /// `face_adapter.fuser_blocks.` (Animate) or `audio_injector.injector.` (S2V) in front is matched whole (`blocks.1?.ffn.*`), and
    /// face blocks and injectors are matched by such a name alone.
    pub targets: Vec<String>,
    /// Ranks of some of the modules, by patterns as in `targets`, such as `{ "ffn.*" = 16, "blocks.0.*" = 64 }`; the others have `rank`.
    /// Default: none.
    pub rank_by_module: BTreeMap<String, usize>,
    /// Alphas of some of the modules likewise; the others have `alpha`, which is each one's own rank unless it is set. Default: none.
    pub alpha_by_module: BTreeMap<String, f64>,
    /// Adapters that are added to the base for the time of the training, so that what is learnt is the difference to both. They are
    /// not in the files of the run. Default: none.
    pub start_on: Vec<StartOn>,
}

/// An adapter that is added to the base for the time of a training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartOn {
    /// Its file in any format, or its PEFT folder, relative to the recipe.
    pub path: PathBuf,
    /// What its changes are multiplied by. Default 1.
    #[serde(default = "one")]
    pub strength: f64,
    /// The expert that it is for, of a model of two. Default: each that is trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expert: Option<Expert>,
    /// SHA-256 of the file, which it must have; a run that goes on must find the file that it began with. Default: as it is found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

fn one() -> f64 {
    1.0
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
            kind: AdapterKind::Lora,
            rank: None,
            alpha: None,
            scaling: Scaling::Standard,
            dropout: 0.0,
            factor: None,
            init_from: None,
            init_from_high: None,
            init_from_low: None,
            rank_by_module: BTreeMap::new(),
            alpha_by_module: BTreeMap::new(),
            start_on: Vec::new(),
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
    /// The same for `module`, whose rank and alpha may be its own.
    #[must_use]
    pub fn of(&self, module: &str) -> Self {
        let rank = self.rank_by_module.iter().find(|(pattern, _)| names_module(pattern, module));
        let alpha = self.alpha_by_module.iter().find(|(pattern, _)| names_module(pattern, module));
        Self {
            rank: rank.map(|(_, rank)| *rank).or(self.rank),
            alpha: alpha.map(|(_, alpha)| *alpha).or(self.alpha),
            rank_by_module: BTreeMap::new(),
            alpha_by_module: BTreeMap::new(),
            ..self.clone()
        }
    }

    /// The ranks in words: `32`, or `32 and by module 16, 64`.
    pub fn ranks(&self) -> String {
        let mut others: Vec<usize> = self.rank_by_module.values().copied().collect();
        others.sort_unstable();
        others.dedup();
        let others: Vec<String> = others.iter().map(usize::to_string).collect();
        match others.as_slice() {
            [] => self.rank().to_string(),
            _ => format!("{} and by module {}", self.rank(), others.join(", ")),
        }
    }

    /// The rank, settled; of modules without one of their own.
    pub fn rank(&self) -> usize {
        self.rank.unwrap_or(32)
    }

    /// The file that the adapter of a network starts from: of `expert`, or of a model with one network.
    pub fn begins_with(&self, expert: Option<Expert>) -> Option<&Path> {
        let own = match expert {
            None => &None,
            Some(Expert::High) => &self.init_from_high,
            Some(Expert::Low) => &self.init_from_low,
        };
        own.as_deref().or(self.init_from.as_deref())
    }

    /// Alpha, settled; of modules without one of their own.
    pub fn alpha(&self) -> f64 {
        self.alpha.unwrap_or(self.rank() as f64)
    }

    /// A width of a LoKr as coarse times fine: coarse is the largest divisor not above `factor` and the width's square root, as
    /// in LyCORIS.
    pub(super) fn split(&self, width: usize) -> (usize, usize) {
        let root = width.isqrt();
        let most = self.factor.map_or(root, |factor| factor.min(root)).max(1);
        let coarse = (1..=most).rev().find(|coarse| width.is_multiple_of(*coarse)).unwrap_or(1);
        (coarse, width / coarse)
    }

    /// Whether a LoKr's fine matrix of this size is stored as low-rank factors: if these are smaller.
    pub(super) fn is_thin(&self, rows: usize, columns: usize) -> bool {
        2 * self.rank() < rows.max(columns)
    }

    /// Number of trained parameters of a module.
    pub fn numbers(&self, out: usize, input: usize) -> usize {
        let thin = self.rank() * (out + input);
        match self.kind {
            AdapterKind::Lora => thin,
            AdapterKind::Dora => thin + out,
            AdapterKind::Loha => 2 * thin,
            AdapterKind::Lokr => {
                let ((o1, o2), (i1, i2)) = (self.split(out), self.split(input));
                o1 * i1 + if self.is_thin(o2, i2) { self.rank() * (o2 + i2) } else { o2 * i2 }
            }
        }
    }

    /// The scale of the product of the factors.
    pub fn scale(&self) -> f64 {
        match self.scaling {
            Scaling::Standard => self.alpha() / self.rank() as f64,
            Scaling::RsLora => self.alpha() / (self.rank() as f64).sqrt(),
        }
    }

    /// The modules of `modules` (official name, out, in) that match the targets, in the order given.
    ///
    /// # Errors
    /// If a pattern matches nothing, with the pattern and the names that exist.
    pub fn select(&self, modules: &[(String, usize, usize)]) -> Result<Vec<Target>> {
        let in_side_chain = |module: &str| {
            crate::names::split_layer(module).is_some_and(|(layer, _)| layer.chain() == LayerId::SIDE_BLOCKS)
        };
        // Parts between the blocks are only meant by their whole names.
        let in_main = |module: &str| {
            crate::names::split_layer(module).is_some_and(|(layer, _)| layer.chain() == LayerId::BLOCKS)
        };
        let has_side_chain = modules.iter().any(|(module, ..)| in_side_chain(module));
        let hit = |pattern: &str, module: &str| {
            let local = crate::names::split_layer(module).map_or(module, |(_, local)| local);
            match names_chain(pattern) {
                true => glob(pattern, module),
                false if has_side_chain => in_side_chain(module) && glob(pattern, local),
                false => in_main(module) && glob(pattern, local),
            }
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

/// Whether `pattern` names `module`: by its name inside its layer, or by its whole name where the pattern begins as such a name does
/// (`blocks.1?.ffn.*`).
pub fn names_module(pattern: &str, module: &str) -> bool {
    let local = crate::names::split_layer(module).map_or(module, |(_, local)| local);
    glob(pattern, if names_chain(pattern) { module } else { local })
}

/// Whether a pattern is for whole module names, not for those inside a layer.
fn names_chain(pattern: &str) -> bool {
    CHAINS.iter().any(|chain| pattern.strip_prefix(chain.name).is_some_and(|rest| rest.starts_with('.')))
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
