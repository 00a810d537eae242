//! The rotary table over three axes: time, height, width.
//!
//! Source: Wan-Video/Wan2.1 wan/modules/model.py `rope_params`, `rope_apply`.

use candle_core::{Device, Tensor};

use crate::Result;

const THETA: f64 = 10000.0;

/// (cos, sin), each [l, h/2] f32, for a grid of (frames, rows, columns) tokens and heads of size `head_size`.
///
/// Of the h/2 pairs, height and width get a third each (rounded down), time the rest; angles are made in f64.
pub fn table(head_size: usize, grid: (usize, usize, usize), device: &Device) -> Result<(Tensor, Tensor)> {
    let pairs = head_size / 2;
    let side = pairs / 3;
    let axes = [(grid.0, pairs - 2 * side), (grid.1, side), (grid.2, side)];
    let [time, height, width] = axes.map(|(positions, pairs)| axis_angles(positions, pairs));
    let tokens = grid.0 * grid.1 * grid.2;
    let mut angles = Vec::with_capacity(tokens * pairs);
    for by_time in &time {
        for by_height in &height {
            for by_width in &width {
                angles.extend(by_time.iter().chain(by_height).chain(by_width).copied());
            }
        }
    }
    let make = |f: fn(f64) -> f64| {
        let values: Vec<f32> = angles.iter().map(|&angle| f(angle) as f32).collect();
        Tensor::from_vec(values, (tokens, pairs), device)
    };
    Ok((make(f64::cos)?, make(f64::sin)?))
}

/// Angles [position][pair] of one axis: position * theta^(-2i / (2 pairs)).
fn axis_angles(positions: usize, pairs: usize) -> Vec<Vec<f64>> {
    let frequency = |i: usize| THETA.powf(-(i as f64) / pairs as f64);
    (0..positions).map(|position| (0..pairs).map(|i| position as f64 * frequency(i)).collect()).collect()
}
