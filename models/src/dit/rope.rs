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
    let pairs = head_size / 2;
    let side = pairs / 3;
    let axes = [(grid.0, pairs - 2 * side), (grid.1, side), (grid.2, side)];
    let make = |f: fn(f64) -> f64| {
        // Each axis has few angles; the device spreads them over the grid.
        let spread = |axis: usize| {
            let (positions, pairs) = axes[axis];
            let values =
                || axis_angles(positions, pairs).concat().into_iter().map(|angle| f(angle) as f32).collect();
            let mut own = [1, 1, 1, pairs];
            own[axis] = positions;
            let all = (grid.0, grid.1, grid.2, pairs);
            Tensor::from_fn::<f32>(&own[..], device, values)?.broadcast_as(all)?.contiguous()
        };
        let whole = Tensor::cat(&[spread(0)?, spread(1)?, spread(2)?], 3)?;
        whole.reshape((grid.0 * grid.1 * grid.2, pairs))
    };
    Ok((make(f64::cos)?, make(f64::sin)?))
}

/// Angles [position][pair] of one axis: position * theta^(-2i / (2 pairs)).
fn axis_angles(positions: usize, pairs: usize) -> Vec<Vec<f64>> {
    let frequency = |i: usize| THETA.powf(-(i as f64) / pairs as f64);
    (0..positions).map(|position| (0..pairs).map(|i| position as f64 * frequency(i)).collect()).collect()
}
