//! Activation checkpointing and offload, layer by layer: how much of a forward is kept, and where it waits.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::layer_id::LayerId;
use crate::{Error, Result};

/// How much of a layer's forward is kept. The gradients are the same to the bit; what is not kept is recomputed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// The layer's input: the least memory, one more forward.
    #[default]
    Input,
    /// The input with the self-attention's output and log-sum-exp: recomputing needs no self-attention.
    Attention,
    /// All outputs of products and attentions: only norms, positions and sums are recomputed.
    All,
}

/// Where what is kept waits for the backward.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// On the device.
    #[default]
    Device,
    /// Offloaded to host memory, and back one layer ahead of its use.
    Host,
    /// Offloaded to host memory, and back when it is used: the device waits for the copy, and holds one layer less.
    HostUntilUsed,
}

/// How one layer's forward is kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockPlan {
    /// How much is kept.
    pub keep: Keep,
    /// Where.
    pub place: Place,
}

/// The plan of each layer of a model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plans(BTreeMap<LayerId, BlockPlan>);

impl Plans {
    /// The plan of the layer `id`.
    ///
    /// # Errors
    /// When it has none.
    pub fn of(&self, id: LayerId) -> Result<BlockPlan> {
        let plan = self.0.get(&id).copied();
        plan.ok_or_else(|| Error::Mismatch(format!("nothing says what is kept of the layer {id}")))
    }
}

impl FromIterator<(LayerId, BlockPlan)> for Plans {
    fn from_iter<I: IntoIterator<Item = (LayerId, BlockPlan)>>(plans: I) -> Self {
        Self(plans.into_iter().collect())
    }
}
