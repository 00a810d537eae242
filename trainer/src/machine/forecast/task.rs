//! What is to be forecast: a model, an adapter, a micro-batch.

use kernels::DType;
use kernels::attention::Calls;
use kernels::device::Repeatability;
use models::adapter::{Kind, LoraConfig, Target};
use models::dit::{Base, DitConfig};
use models::names::split_layer;
use serde::{Deserialize, Serialize};

use super::ledger::Shadow;
use crate::learning::optim::Rule;

/// A training step whose memory is asked for.
#[derive(Debug, Clone)]
pub struct Task<'a> {
    /// Sizes of the model.
    pub dit: &'a DitConfig,
    /// How it is held.
    pub base: Base,
    /// Modules with an adapter.
    pub targets: &'a [Target],
    /// Its kind. What those beside LoRA allocate in a pass is an estimate, from above.
    pub kind: Kind,
    /// A LoKr's factor.
    pub factor: Option<usize>,
    /// Its rank.
    pub rank: usize,
    /// Whether its input is dropped out.
    pub dropout: bool,
    /// Samples of a micro-batch.
    pub batch: usize,
    /// Micro-batches of a step.
    pub accumulate: usize,
    /// (frames, height, width) of the latents of a sample.
    pub latents: (usize, usize, usize),
    /// The networks that are trained.
    pub networks: Networks,
    /// The optimiser.
    pub rule: Rule,
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
}

/// What runs the operations of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// Plain operations in f32.
    Cpu,
    /// A GPU's kernels, attention in chunks.
    Chunked,
    /// A GPU's kernels, attention by cuDNN.
    Cudnn(Repeatability),
}

/// The sizes of a task that the mirror counts with, as numbers of bytes are: in u64.
#[derive(Debug, Clone)]
pub(super) struct Sizes {
    pub batch: u64,
    /// Of one sample.
    pub tokens: u64,
    pub dim: u64,
    pub ffn: u64,
    pub heads: u64,
    pub text_len: u64,
    pub text_dim: u64,
    /// Numbers of the network's input for a micro-batch.
    pub input: u64,
    /// Numbers of a micro-batch's latents, which it predicts.
    pub latents: u64,
    /// Rows of a sample's picture; 0 where the model has no image branch.
    pub picture_rows: u64,
    /// Width of its states.
    pub picture_dim: u64,
    pub rank: u64,
    pub adapter: LoraConfig,
    pub has_dropout: bool,
    pub is_coded: bool,
    pub compute: DType,
    pub stream: DType,
    /// Which layers of each block have an adapter.
    pub adapted: Vec<[bool; LAYERS.len()]>,
}

/// The linear layers of a block, in the order of `models::dit::block`, those of the image branch last.
pub(super) const LAYERS: [&str; 12] = [
    "self_attn.q",
    "self_attn.k",
    "self_attn.v",
    "self_attn.o",
    "cross_attn.q",
    "cross_attn.k",
    "cross_attn.v",
    "cross_attn.o",
    "ffn.0",
    "ffn.2",
    "cross_attn.k_img",
    "cross_attn.v_img",
];

impl Engine {
    /// Whether operations are single kernels.
    pub fn is_gpu(self) -> bool {
        self != Self::Cpu
    }

    pub(super) fn is_cudnn(self) -> bool {
        matches!(self, Self::Cudnn(_))
    }
}

impl Task<'_> {
    /// Tokens of a sample.
    pub fn tokens(&self) -> usize {
        let (frames, height, width) = self.latents;
        self.dit.tokens(frames, height, width)
    }

    pub(super) fn sizes(&self) -> Sizes {
        let (dit, frozen) = (self.dit, self.base.frozen);
        let (frames, height, width) = self.latents;
        Sizes {
            batch: self.batch as u64,
            tokens: self.tokens() as u64,
            dim: dit.dim as u64,
            ffn: dit.ffn_dim as u64,
            heads: dit.heads as u64,
            text_len: dit.text_len as u64,
            text_dim: dit.text_dim as u64,
            input: (self.batch * dit.in_channels * frames * height * width) as u64,
            latents: (self.batch * dit.out_channels * frames * height * width) as u64,
            picture_rows: dit.image.map_or(0, |image| image.rows()) as u64,
            picture_dim: dit.image.map_or(0, |image| image.dim) as u64,
            rank: self.rank as u64,
            adapter: LoraConfig {
                kind: self.kind,
                rank: Some(self.rank),
                factor: self.factor,
                ..LoraConfig::default()
            },
            has_dropout: self.dropout,
            is_coded: frozen.is_coded(),
            compute: frozen.compute,
            stream: self.base.stream,
            adapted: self.adapted(),
        }
    }

    fn adapted(&self) -> Vec<[bool; LAYERS.len()]> {
        let mut adapted = vec![[false; LAYERS.len()]; self.dit.layers];
        for (id, local) in self.targets.iter().filter_map(|target| split_layer(&target.module)) {
            let layer = LAYERS.iter().position(|name| *name == local);
            if let (Some(layers), Some(layer)) = (adapted.get_mut(id.index()), layer) {
                layers[layer] = true;
            }
        }
        adapted
    }
}

impl Sizes {
    /// Width out and in of a layer of [`LAYERS`].
    pub fn layer(&self, layer: usize) -> (u64, u64) {
        match LAYERS[layer] {
            "ffn.0" => (self.ffn, self.dim),
            "ffn.2" => (self.dim, self.ffn),
            _ => (self.dim, self.dim),
        }
    }

    /// Trained numbers of a module.
    pub fn trained(&self, out: u64, input: u64) -> u64 {
        self.adapter.numbers(out as usize, input as usize) as u64
    }

    /// Numbers of the adapters of a block.
    pub fn factors(&self, block: usize) -> u64 {
        let of_layer = |layer: usize| {
            let (out, input) = self.layer(layer);
            self.trained(out, input)
        };
        (0..LAYERS.len()).filter(|layer| self.adapted[block][*layer]).map(of_layer).sum()
    }

    /// Numbers of the stream of a micro-batch.
    pub fn stream_numbers(&self) -> u64 {
        self.batch * self.tokens * self.dim
    }

    /// Workspace of cuDNN's backward.
    pub fn attention_workspace(&self, q: &Shadow, k: &Shadow, repeatability: Repeatability) -> u64 {
        let of_sample = |x: &Shadow| (x.numbers / self.dim / self.batch) as usize;
        let shape = [self.batch, self.heads, self.dim / self.heads].map(|n| n as usize);
        Calls::of(shape, [of_sample(q), of_sample(k)], repeatability).workspace as u64
    }
}
