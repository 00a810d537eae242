//! Relative positions: each layer has a table of biases, one row per bucket of distances.
//!
//! Source: transformers `modeling_umt5.py`, `_relative_position_bucket` and `compute_bias`.

use kernels::{Device, Tensor};

use crate::Result;

/// Distances from here on share the last bucket.
const MAX_DISTANCE: f32 = 128.0;

/// The bucket of a relative position (key index minus query index), of `buckets` for both directions together.
///
/// The first quarter of the buckets of a direction is exact; the others grow with the logarithm of the distance.
pub fn bucket(relative: i64, buckets: usize) -> usize {
    let half = buckets / 2;
    let exact = half / 2;
    let distance = relative.unsigned_abs() as usize;
    let within = if distance < exact {
        distance
    } else {
        // In f32, as the model was trained: a different rounding moves a distance to the next bucket.
        let scale = (MAX_DISTANCE / exact as f32).ln();
        let log = (distance as f32 / exact as f32).ln() / scale * (half - exact) as f32;
        (exact + log as usize).min(half.saturating_sub(1))
    };
    within + if relative > 0 { half } else { 0 }
}

/// The buckets of all pairs (query, key) of `length` tokens, row by row.
pub(super) fn bucket_grid(length: usize, buckets: usize, device: &Device) -> Result<Tensor> {
    let n = length as i64;
    let grid: Vec<u32> = (0..n * n).map(|i| bucket(i % n - i / n, buckets) as u32).collect();
    Ok(Tensor::new(grid, device)?)
}

/// Biases of a layer: table [buckets, heads] and grid to [heads, length, length].
pub(super) fn bias(table: &Tensor, grid: &Tensor, length: usize) -> Result<Tensor> {
    let heads = table.dim(1)?;
    let by_head = table.t()?.contiguous()?;
    Ok(by_head.index_select(grid, 1)?.reshape((heads, length, length))?)
}
