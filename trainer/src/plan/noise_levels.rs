//! How often each noise level will be drawn, and how much it counts.

use models::expert::Expert;
use serde::Serialize;

use super::Planned;
use crate::error::Result;

/// Parts of 0..1 that are counted.
const PARTS: usize = 20;
/// Sigmas of a part at which its weight is taken.
const POINTS: usize = 50;

/// The noise levels of one network.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NoiseLevels {
    /// The expert; nothing in a model of one network.
    pub expert: Option<Expert>,
    /// The ends of the parts of 0..1, one more than there are parts.
    pub sigmas: Vec<f64>,
    /// The probability that a sample is drawn in each part.
    pub share: Vec<f64>,
    /// The part that those samples have in the sum of all weights (`train.timesteps.weighting`), at the same error.
    pub weighted: Vec<f64>,
}

/// The noise levels that each network of `planned` is trained on, over all of its clips.
///
/// # Errors
/// A distribution that never falls into its range.
pub fn noise_levels(planned: &Planned) -> Result<Vec<NoiseLevels>> {
    let timesteps = &planned.plan.train.timesteps;
    let defaults = planned.dit.defaults(planned.plan.model.dits.networks());
    let mut buckets: Vec<(usize, f64)> = Vec::new();
    for row in planned.dataset.table().rows {
        let (_, height, width) = defaults.latents(row.bucket.frames, row.bucket.height, row.bucket.width);
        buckets.push(((height / 2) * (width / 2), row.windows as f64));
    }
    if buckets.is_empty() {
        buckets.push((0, 1.0));
    }
    let windows: f64 = buckets.iter().map(|(_, windows)| windows).sum();
    let of = |range: crate::learning::NoiseRange| {
        let cut = timesteps.within(range)?;
        let mut share = vec![0.0; PARTS];
        for (tokens, count) in &buckets {
            let part = cut.for_tokens(*tokens).histogram(PARTS);
            share.iter_mut().zip(part).for_each(|(sum, part)| *sum += part * count / windows);
        }
        let weight = |part: usize| {
            let sigma = |point: usize| (part as f64 + (point as f64 + 0.5) / POINTS as f64) / PARTS as f64;
            (0..POINTS).map(|point| cut.weight(sigma(point))).sum::<f64>() / POINTS as f64
        };
        let counted: Vec<f64> = share.iter().enumerate().map(|(part, share)| share * weight(part)).collect();
        let sum: f64 = counted.iter().sum();
        let weighted = counted.iter().map(|part| if sum > 0.0 { part / sum } else { 0.0 }).collect();
        let sigmas = (0..=PARTS).map(|part| part as f64 / PARTS as f64).collect();
        Ok(NoiseLevels { expert: range.expert(), sigmas, share, weighted })
    };
    planned.plan.trained_ranges().into_iter().map(of).collect()
}
