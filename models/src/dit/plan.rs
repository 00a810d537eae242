//! Activation checkpointing and offload, layer by layer: what is kept of a forward, and where.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::layer_id::LayerId;
use crate::{Error, Result};

/// Which activations of a layer's forward are kept; the rest is recomputed. The gradients are the same to the bit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// The layer's input: least memory, one more forward.
    #[default]
    Input,
    /// The input with the self-attention's output and log-sum-exp: recomputing needs no self-attention.
    Attention,
    /// All outputs of products and attentions: only norms, positions and sums are recomputed.
    All,
}

/// Where kept activations are stored until the backward.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeepPlace {
    /// On the device.
    #[default]
    Device,
    /// Offloaded to host memory, and copied back one layer ahead of their use.
    Host,
    /// Offloaded to host memory, and copied back when they are used: the device waits for the copy, and has room for one layer's
    /// activations less.
    HostUntilUsed,
}

/// What one layer's forward keeps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockPlan {
    /// Which activations.
    pub keep: Keep,
    /// Where.
    pub place: KeepPlace,
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
        plan.ok_or_else(|| Error::Mismatch(format!("there is no plan of what to keep of the layer {id}")))
    }
}

impl FromIterator<(LayerId, BlockPlan)> for Plans {
    fn from_iter<I: IntoIterator<Item = (LayerId, BlockPlan)>>(plans: I) -> Self {
        Self(plans.into_iter().collect())
    }
}
