//! How much a step is: what its loss is a mean over, and tokens.

use models::dit::config::PATCH;
use serde::{Deserialize, Serialize};

/// What the loss of a step is a mean over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MeanOver {
    /// Its samples: a short clip counts as much as a long one.
    #[default]
    Samples,
    /// Their tokens: a clip counts by its size and length.
    Tokens,
}

/// Tokens of a clip whose latents have (frames, height, width): two by two latents each.
pub fn tokens_of((frames, height, width): (usize, usize, usize)) -> usize {
    frames * (height / PATCH) * (width / PATCH)
}
