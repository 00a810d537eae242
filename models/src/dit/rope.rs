//! The rotary table over three axes: time, height, width.
//!
//! Source: Wan-Video/Wan2.1 wan/modules/model.py `rope_params`, `rope_apply`.

use kernels::{Device, Tensor};

use crate::Result;

const THETA: f64 = 10000.0;

/// (cos, sin), each [l, h/2] f32, for a grid of (frames, rows, columns) tokens and heads of size `head_size`.
///
/// Of the h/2 pairs, height and width get a third each (rounded down), time the rest; angles are computed in f64.
pub fn table(head_size: usize, grid: (usize, usize, usize), device: &Device) -> Result<(Tensor, Tensor)> {
    let count = |n: usize| (0..n).map(|at| at as f64).collect::<Vec<_>>();
    table_at(head_size, &[count(grid.0), count(grid.1), count(grid.2)], device)
}

/// [`table`] of tokens at every combination of these times, rows and columns.
///
/// # Errors
/// When the tensor library fails.
pub fn table_at(head_size: usize, at: &[Vec<f64>; 3], device: &Device) -> Result<(Tensor, Tensor)> {
    let pairs = head_size / 2;
    let side = pairs / 3;
    let axes = [(&at[0], pairs - 2 * side), (&at[1], side), (&at[2], side)];
    let grid = (at[0].len(), at[1].len(), at[2].len());
    let make = |f: fn(f64) -> f64| {
        // Each axis has few angles; the device spreads them over the grid.
        let spread = |axis: usize| {
            let (positions, pairs) = axes[axis];
            let values =
                || axis_angles(positions, pairs).concat().into_iter().map(|angle| f(angle) as f32).collect();
            let mut own = [1, 1, 1, pairs];
            own[axis] = positions.len();
            let all = (grid.0, grid.1, grid.2, pairs);
            Tensor::from_fn::<f32>(&own[..], device, values)?.broadcast_as(all)?.contiguous()
        };
        let whole = Tensor::cat(&[spread(0)?, spread(1)?, spread(2)?], 3)?;
        whole.reshape((grid.0 * grid.1 * grid.2, pairs))
    };
    Ok((make(f64::cos)?, make(f64::sin)?))
}

/// Angles [position][pair] of one axis: position * theta^(-2i / (2 pairs)).
fn axis_angles(positions: &[f64], pairs: usize) -> Vec<Vec<f64>> {
    let frequency = |i: usize| THETA.powf(-(i as f64) / pairs as f64);
    positions.iter().map(|position| (0..pairs).map(|i| position * frequency(i)).collect()).collect()
}
