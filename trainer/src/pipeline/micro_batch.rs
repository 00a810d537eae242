//! What goes into the pipeline when it trains.

use kernels::Tensor;
use models::dit::{Dropout, NetworkInput};

/// A micro-batch to train on.
#[derive(Debug, Clone)]
pub struct MicroBatch {
    /// What the network sees.
    pub input: NetworkInput,
    /// The velocity noise - x0, [b, c, t, h, w] f32.
    pub target: Tensor,
    /// What each sample's error counts for in the mean over the micro-batch, `[b]`. A step's losses are summed, so these
    /// hold the micro-batch's share of the step too.
    pub weights: Vec<f32>,
    /// What counts in the mean, broadcast over the latents; `None` for all.
    pub mask: Option<Tensor>,
    /// Dropout of the adapters' input.
    pub dropout: Option<Dropout>,
}
