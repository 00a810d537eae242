//! The convolution on the CPU: products of the weights with tiles of the patch matrix.

use std::sync::{Mutex, PoisonError};

use candle_core::Result;
use rayon::prelude::*;

use super::Sizes;
use crate::Tensor;
use crate::cpu::computed;
use crate::cpu_gemm::{Product, add_product};

/// Output pixels of one tile, and rows of the patch matrix built at a time: together they stay in a core's cache.
const TILE_PIXELS: usize = 512;
const PATCH_ROWS: usize = 256;

/// A band of whole output rows of one frame: what one thread computes at a time.
#[derive(Clone, Copy)]
struct Tile {
    batch: usize,
    frame: usize,
    first_row: usize,
    rows: usize,
}

pub(super) fn on_cpu(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, s: Sizes) -> Result<Tensor> {
    let shape = (s.batch, s.c_out, s.out_frames, s.out_height, s.out_width);
    match bias {
        Some(bias) => {
            computed([x, weight, bias], shape, |[x, weight, bias]| tiles_on_cpu(x, weight, bias, s))
        }
        None => computed([x, weight], shape, |[x, weight]| tiles_on_cpu(x, weight, &vec![0.0; s.c_out], s)),
    }
}

fn tiles_on_cpu(x: &[f32], weight: &[f32], bias: &[f32], s: Sizes) -> Vec<f32> {
    let plane = s.out_height * s.out_width;
    let out = Mutex::new(vec![0f32; s.batch * s.c_out * s.out_frames * plane]);
    tiles(s).into_par_iter().for_each_init(Vec::new, |patches, tile| {
        let pixels = tile.rows * s.out_width;
        let values = one_tile(x, weight, bias, s, tile, patches);
        let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
        for (channel, row) in values.chunks_exact(pixels).enumerate() {
            let frame = (tile.batch * s.c_out + channel) * s.out_frames + tile.frame;
            let at = frame * plane + tile.first_row * s.out_width;
            out[at..at + pixels].copy_from_slice(row);
        }
    });
    out.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn tiles(s: Sizes) -> Vec<Tile> {
    let band = (TILE_PIXELS / s.out_width.max(1)).max(1);
    let mut tiles = Vec::new();
    for batch in 0..s.batch {
        for frame in 0..s.out_frames {
            for first_row in (0..s.out_height).step_by(band) {
                tiles.push(Tile { batch, frame, first_row, rows: band.min(s.out_height - first_row) });
            }
        }
    }
    tiles
}

/// The outputs [c_out, rows x width] of one tile: weights times patches, some rows of the patch matrix at a time.
fn one_tile(
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    s: Sizes,
    tile: Tile,
    patches: &mut Vec<f32>,
) -> Vec<f32> {
    let pixels = tile.rows * s.out_width;
    let taps = s.taps();
    let mut values = Vec::with_capacity(s.c_out * pixels);
    for b in bias {
        values.resize(values.len() + pixels, *b);
    }
    for first in (0..taps).step_by(PATCH_ROWS) {
        let rows = PATCH_ROWS.min(taps - first);
        patches.resize(PATCH_ROWS * pixels, 0.0);
        for (tap, row) in (first..first + rows).zip(patches.chunks_exact_mut(pixels)) {
            patch_row(x, s, tile, tap, row);
        }
        let shape = Product { m: s.c_out, n: pixels, k: rows, a_stride: taps };
        add_product(shape, &weight[first..], patches, &mut values);
    }
    values
}

/// One row of the patch matrix: the input of tap number `tap` (of [c_in, kt, kh, kw]) at each output pixel.
fn patch_row(x: &[f32], s: Sizes, tile: Tile, tap: usize, row: &mut [f32]) {
    let [kt, kh, kw] = s.kernel;
    let (dw, dh, dt, channel) = (tap % kw, tap / kw % kh, tap / (kw * kh) % kt, tap / (kw * kh * kt));
    let frame = tile.frame * s.geometry.time_stride + dt;
    let start = ((tile.batch * s.c_in + channel) * s.frames + frame) * s.height * s.width;
    let picture = &x[start..start + s.height * s.width];
    let stride = s.geometry.space_stride;
    for (r, out) in row.chunks_exact_mut(s.out_width).enumerate() {
        let y = ((tile.first_row + r) * stride + dh).wrapping_sub(s.geometry.padding.top);
        match y < s.height {
            true => line(&picture[y * s.width..(y + 1) * s.width], dw, s.geometry.padding.left, stride, out),
            false => out.fill(0.0),
        }
    }
}

/// `out[i] = input[i stride + dw - left]`, zero outside.
fn line(input: &[f32], dw: usize, left: usize, stride: usize, out: &mut [f32]) {
    if stride == 1 {
        // Columns before `begin` and from `end` on fall into the padding.
        let begin = left.saturating_sub(dw).min(out.len());
        let end = (input.len() + left).saturating_sub(dw).clamp(begin, out.len());
        out[..begin].fill(0.0);
        out[begin..end].copy_from_slice(&input[begin + dw - left..end + dw - left]);
        out[end..].fill(0.0);
        return;
    }
    for (i, value) in out.iter_mut().enumerate() {
        *value = input.get((i * stride + dw).wrapping_sub(left)).copied().unwrap_or(0.0);
    }
}
