//! What goes into the pipeline when it trains.

use kernels::Tensor;
use kernels::loss::{Penalty, Reduction};
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
    /// What the error of an element counts for.
    pub objective: Objective,
    /// Dropout of the adapters' input.
    pub dropout: Option<Dropout>,
}

/// What the error of an element counts for. The default is the mean square error.
#[derive(Debug, Clone, Default)]
pub struct Objective {
    /// What an error counts for, without weights. Its factor is in the weights of the samples.
    pub penalty: Penalty,
    /// The scale of the errors of each sample, `[b]`, where the penalty has one; else empty.
    pub scale: Vec<f32>,
    /// Weights of elements (a mask of the clip), [b, 1, t, h, w] f32 at least 0; `None` for ones.
    pub weights: Option<Tensor>,
    /// How the weighted errors become one number.
    pub reduction: Reduction,
    /// The share of the base's own prediction in the target, 0 to 1 f32, which broadcasts to [b, c, t, h, w]; `None` where the target
    /// is that of the clips alone. [`super::Pipeline::with_base_targets`] puts the prediction there.
    pub of_base: Option<Tensor>,
    /// What the base predicts for other texts, which is added to what it predicts for the micro-batch's own.
    pub guides: Vec<Guide>,
}

/// What the base predicts for another text.
#[derive(Debug, Clone)]
pub struct Guide {
    /// What the prediction of each sample is multiplied by, [b, 1, 1, 1, 1] f32.
    pub factor: Tensor,
    /// The text states [b, s, width].
    pub text: Tensor,
}
