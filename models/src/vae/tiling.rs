//! Coding a large picture in overlapping tiles, blended where they overlap.
//!
//! Source: diffusers `autoencoder_kl_wan.py`, `tiled_encode` and `tiled_decode`: same tiles, same order of blending.

use kernels::Tensor;

use crate::Result;

/// Whether pictures are encoded and decoded whole or in tiles. Tiles bound memory and change the result slightly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tiling {
    /// Whole.
    #[default]
    Off,
    /// In tiles, where the picture is larger than one tile.
    On(Tiles),
}

/// Sizes of tiles in pixels: (height, width).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiles {
    /// A tile.
    pub size: (usize, usize),
    /// From one tile to the next; the rest overlaps.
    pub stride: (usize, usize),
}

impl Default for Tiles {
    /// 256 x 256 pixels every 192, as diffusers has it.
    fn default() -> Self {
        Self { size: (256, 256), stride: (192, 192) }
    }
}

/// One axis of the tiles: what is cut from the input, and what is kept and blended of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Axis {
    pub size: usize,
    pub stride: usize,
    pub keep: usize,
    pub blend: usize,
}

/// Codes `x` [B,C,T,H,W] tile by tile with `code`; the result is cropped to `out` (height, width).
pub(super) fn tiled(
    x: &Tensor,
    (rows, columns): (Axis, Axis),
    out: (usize, usize),
    mut code: impl FnMut(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (_, _, _, height, width) = x.dims5()?;
    let mut above: Vec<Tensor> = Vec::new();
    let mut bands = Vec::new();
    for y in (0..height).step_by(rows.stride) {
        let mut current: Vec<Tensor> = Vec::new();
        let mut kept = Vec::new();
        for (column, left) in (0..width).step_by(columns.stride).enumerate() {
            let tile = x.narrow(3, y, rows.size.min(height - y))?;
            let tile = tile.narrow(4, left, columns.size.min(width - left))?;
            let mut tile = code(&tile.contiguous()?)?;
            if let Some(above) = above.get(column) {
                tile = blend(above, &tile, 3, rows.blend)?;
            }
            if let Some(left) = current.last() {
                tile = blend(left, &tile, 4, columns.blend)?;
            }
            let part = tile.narrow(3, 0, rows.keep.min(tile.dim(3)?))?;
            kept.push(part.narrow(4, 0, columns.keep.min(part.dim(4)?))?);
            current.push(tile);
        }
        bands.push(Tensor::cat(&kept, 4)?);
        above = current;
    }
    let whole = Tensor::cat(&bands, 3)?;
    Ok(whole.narrow(3, 0, out.0)?.narrow(4, 0, out.1)?.contiguous()?)
}

/// Fades from the end of `before` into the start of `tile` along `dim`, over up to `extent` steps.
fn blend(before: &Tensor, tile: &Tensor, dim: usize, extent: usize) -> Result<Tensor> {
    let (before_len, len) = (before.dim(dim)?, tile.dim(dim)?);
    let extent = extent.min(before_len).min(len);
    if extent == 0 {
        return Ok(tile.clone());
    }
    let mut shape = [1; 5];
    shape[dim] = extent;
    let ramp: Vec<f32> = (0..extent).map(|i| i as f32 / extent as f32).collect();
    let ramp = Tensor::from_vec(ramp, &shape, tile.device())?.to_dtype(tile.dtype())?;
    let fading = before.narrow(dim, before_len - extent, extent)?.broadcast_mul(&ramp.affine(-1.0, 1.0)?)?;
    let start = (fading + tile.narrow(dim, 0, extent)?.broadcast_mul(&ramp)?)?;
    Ok(Tensor::cat(&[&start, &tile.narrow(dim, extent, len - extent)?], dim)?)
}
