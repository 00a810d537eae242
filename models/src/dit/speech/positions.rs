//! The positions of S2V's tokens: those of the clip, of a reference picture far behind it, and of the past before it.

use kernels::{Device, Tensor};

use super::super::config::PATCH;
use super::super::rope;
use super::PACKS;
use crate::Result;

/// The time of a reference picture.
const REFERENCE_TIME: f64 = 30.0;
/// The times of each pack of the past.
const PAST_TIMES: [&[f64]; 3] = [&[-1.0], &[-3.0], &[-19.0, -14.0, -9.0, -4.0]];

/// Cosines and sines [l, h/2] f32 of the rotary angles of all tokens, in their order, of a clip with the latents `grid` = (frames,
/// height, width).
///
/// # Errors
/// When the tensor library fails.
pub fn table(
    head_size: usize,
    grid: (usize, usize, usize),
    has_past: bool,
    device: &Device,
) -> Result<(Tensor, Tensor)> {
    let (rows, columns) = (grid.1 / PATCH, grid.2 / PATCH);
    let count = |n: usize| (0..n).map(|at| at as f64).collect::<Vec<_>>();
    let mut parts = vec![
        [count(grid.0), count(rows), count(columns)],
        [vec![REFERENCE_TIME], count(rows), count(columns)],
    ];
    if has_past {
        for ((_, _, patch), times) in PACKS.into_iter().zip(PAST_TIMES) {
            let side = |all: usize| sampled(all, all / patch);
            parts.push([times.to_vec(), side(rows), side(columns)]);
        }
    }
    let parts = parts.iter().map(|axes| rope::table_at(head_size, axes, device));
    let (cos, sin): (Vec<Tensor>, Vec<Tensor>) = parts.collect::<Result<Vec<_>>>()?.into_iter().unzip();
    Ok((Tensor::cat(&cos, 0)?, Tensor::cat(&sin, 0)?))
}

/// `count` whole positions spread over those of 0..`all`, ends included.
fn sampled(all: usize, count: usize) -> Vec<f64> {
    let last = (all - 1) as f64;
    let at = |i: usize| match (i + 1 == count, count) {
        (_, 1) => 0.0,
        (true, _) => last,
        (false, _) => (i as f64 * last / (count - 1) as f64).trunc(),
    };
    (0..count).map(at).collect()
}
