//! What a training step keeps between forward and backward, and where.

use clap::ValueEnum;
use models::dit::pass::FFN_TOKENS;
use models::dit::{BlockPlan, Keep, Place};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The memory of a training step. None of it changes a result by more than the order of sums.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// What each block keeps of its forward for its backward. Default `auto`.
    pub keep: KeepConfig,
    /// Whether what is kept waits in host memory. Default `auto`.
    pub offload: Offload,
    /// The most tokens of a clip that go through a feed-forward layer at once. Default 8192.
    pub ffn_tokens: usize,
}

/// What is kept of each block.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum KeepConfig {
    /// As the plan finds best.
    #[default]
    Auto,
    /// Its input: the backward makes the rest again.
    Inputs,
    /// Its input and what its self-attention made.
    Attention,
    /// All that its backward needs: the fastest, and by far the most memory.
    All,
}

/// Whether what is kept waits in host memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Offload {
    /// As the plan finds best.
    #[default]
    Auto,
    /// It stays on the device.
    Never,
    /// It goes out to host memory, and comes back one block ahead of its use.
    Always,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self { keep: KeepConfig::default(), offload: Offload::default(), ffn_tokens: FFN_TOKENS }
    }
}

impl MemoryConfig {
    /// Checks the values.
    ///
    /// # Errors
    /// Naming the key and what it must be.
    pub fn check(&self) -> Result<()> {
        match self.ffn_tokens {
            0 => Err(Error::Setting { key: "memory.ffn_tokens".into(), why: "must be at least 1".into() }),
            _ => Ok(()),
        }
    }
}

/// What becomes of each of the model's `blocks` blocks. What is left to the plan is the least device memory that costs
/// no copies: inputs, on the device.
pub fn choose(config: &MemoryConfig, blocks: usize) -> Vec<BlockPlan> {
    let keep = match config.keep {
        KeepConfig::Auto | KeepConfig::Inputs => Keep::Input,
        KeepConfig::Attention => Keep::Attention,
        KeepConfig::All => Keep::All,
    };
    let place = match config.offload {
        Offload::Auto | Offload::Never => Place::Device,
        Offload::Always => Place::Host,
    };
    vec![BlockPlan { keep, place }; blocks]
}
