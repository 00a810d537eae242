//! What is to be forecast: a model, an adapter, a micro-batch.

use std::collections::BTreeMap;
use std::sync::Arc;

use kernels::device::Repeatability;
use kernels::loss::{Penalty, Reduction};
use models::adapter::{AdapterKind, LoraConfig, Target};
use models::dit::{Architecture, Base, DitConfig};
use serde::{Deserialize, Serialize};

use crate::learning::ema::EmaConfig;
use crate::learning::optim::{NormLimit, OptimizerConfig, Rule};

/// A training step whose memory is asked for.
#[derive(Debug, Clone)]
pub struct Task<'a> {
    /// The model.
    pub dit: Arc<dyn Architecture>,
    /// How it is held.
    pub base: Base,
    /// Modules with an adapter.
    pub targets: &'a [Target],
    /// Its kind.
    pub kind: AdapterKind,
    /// A LoKr's factor.
    pub factor: Option<usize>,
    /// Its rank.
    pub rank: usize,
    /// Ranks of modules by pattern, where they have their own.
    pub ranks: BTreeMap<String, usize>,
    /// Whether its input is dropped out.
    pub dropout: bool,
    /// Samples of a micro-batch.
    pub batch: usize,
    /// Micro-batches of a step.
    pub accumulate: usize,
    /// Micro-batches of a step besides, whose latents are the smallest that there are.
    pub small: Option<SmallBatches>,
    /// Replicas that exchange gradients.
    pub replicas: usize,
    /// (frames, height, width) of the latents of a sample.
    pub latents: (usize, usize, usize),
    /// Whether its samples are clips that continue others, as the pieces of long clips of S2V do.
    pub continues: bool,
    /// The networks that are trained.
    pub networks: Networks,
    /// Where the networks are while clips are decoded.
    pub decoding: Decoding,
    /// The optimiser.
    pub rule: Rule,
    /// The average of the adapters.
    pub ema: EmaConfig,
    /// The limit of the norm of each change.
    pub norm_limit: Option<NormLimit>,
    /// What errors count for.
    pub objective: LossTask,
}

/// Micro-batches of the smallest clips, which a step of so many tokens may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SmallBatches {
    /// How many, at most.
    pub count: usize,
    /// (frames, height, width) of their latents.
    pub latents: (usize, usize, usize),
}

/// The loss of a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LossTask {
    /// What an error counts for.
    pub penalty: Penalty,
    /// How errors become one number.
    pub reduction: Reduction,
    /// Whether elements have weights.
    pub masks: Masks,
    /// Micro-batches of a step whose target holds what the base predicts, at most.
    pub of_base: usize,
    /// What the base predicts for other texts besides, for each of them.
    pub guides: usize,
}

/// Whether the clips of a run have masks of the loss.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Masks {
    /// They have none.
    #[default]
    None,
    /// They have some.
    Given,
}

/// The networks that a run trains, and where they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Networks {
    /// One.
    #[default]
    One,
    /// One of two experts, with clips: they go through the other one too, and while it is on the devices, the matrices of the
    /// trained one wait in host memory.
    MakesRoom,
    /// Two experts, both on the devices.
    SideBySide,
    /// Two experts, of which one is on the devices; the other one's matrices wait in host memory.
    InTurn,
}

impl Networks {
    /// How many are trained.
    pub fn count(self) -> u64 {
        match self {
            Self::One | Self::MakesRoom => 1,
            Self::SideBySide | Self::InTurn => 2,
        }
    }

    /// How many are on the devices at once.
    pub fn on_devices(self) -> u64 {
        match self {
            Self::SideBySide => 2,
            Self::One | Self::MakesRoom | Self::InTurn => 1,
        }
    }
}

/// Where the networks of a run are while the VAE decodes clips on the first device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decoding {
    /// On the devices, beside the VAE.
    #[default]
    Beside,
    /// Their matrices wait in pinned host memory.
    Alone,
}

/// What runs the operations of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Engine {
    /// Plain operations in f32.
    Cpu,
    /// A GPU's kernels, attention in chunks.
    Chunked,
    /// A GPU's kernels, attention by cuDNN.
    Cudnn(Repeatability),
}

impl Engine {
    /// Whether operations are single kernels.
    pub fn is_gpu(self) -> bool {
        self != Self::Cpu
    }
}

impl<'a> Task<'a> {
    /// Calls of the network alone, on latents of (frames, height, width): nothing is trained.
    pub fn without_training(
        dit: impl Into<Arc<dyn Architecture>>,
        base: Base,
        latents: (usize, usize, usize),
    ) -> Task<'a> {
        Task {
            dit: dit.into(),
            base,
            targets: &[],
            kind: AdapterKind::Lora,
            factor: None,
            rank: 1,
            ranks: BTreeMap::new(),
            dropout: false,
            batch: 1,
            accumulate: 1,
            small: None,
            replicas: 1,
            latents,
            continues: false,
            networks: Networks::One,
            decoding: Decoding::Beside,
            rule: OptimizerConfig::default().rule(),
            ema: EmaConfig::default(),
            norm_limit: None,
            objective: LossTask::default(),
        }
    }
}

impl Task<'_> {
    /// Tokens of a sample.
    pub fn tokens(&self) -> usize {
        let (frames, height, width) = self.latents;
        self.config().tokens(frames, height, width)
    }

    /// The most micro-batches that may be under way at once, as far as their number says.
    pub fn under_way(&self) -> usize {
        if self.small.is_some() { usize::MAX } else { self.accumulate }
    }

    /// Its adapter.
    pub fn lora(&self) -> LoraConfig {
        LoraConfig {
            kind: self.kind,
            rank: Some(self.rank),
            rank_by_module: self.ranks.clone(),
            factor: self.factor,
            ..LoraConfig::default()
        }
    }

    /// Sizes of the model.
    pub fn config(&self) -> &DitConfig {
        self.dit.config()
    }
}
