//! The head: last norm, projection to pixels of latent, unpatchify. Runs in f32, its linear layer included.

use kernels::weight::Weight;
use kernels::{DType, Device, Tensor, norm};

use super::config::{DitConfig, PATCH};
use super::input::{Context, Positions};
use super::reader::Reader;
use super::role::Role;
use crate::Result;
use crate::weights::{Frozen, Weights};

/// The frozen head.
#[derive(Debug, Clone)]
pub struct Head {
    modulation: Tensor,
    weight: Weight,
    bias: Tensor,
    eps: f64,
}

impl Head {
    /// Reads `head.*`.
    pub fn load(weights: &Weights, config: &DitConfig, device: &Device) -> Result<Self> {
        // In f32 for every dtype of the blocks.
        let read = Reader::outside(weights, Frozen::F32, device);
        let (weight, bias) = read.dense("head.head")?;
        Ok(Self { modulation: read.tensor("head.modulation", "")?, weight, bias, eps: config.eps })
    }

    /// Every tensor of the head.
    pub(super) fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let Self { modulation, weight, bias, .. } = self;
        weight.tensors_mut().into_iter().chain([modulation, bias]).collect()
    }

    /// The stream `x` [b, l, d] -> velocity [b, c, t, h, w] f32. Tokens in front of those of the latents are dropped.
    pub fn forward(&self, x: &Tensor, context: &Context) -> Result<Tensor> {
        let (shift, scale) = self.modulation(context)?;
        let x = &of_latents(x, &context.positions)?;
        let y = norm::modulated_layer_norm(x, &shift, &scale, self.eps, DType::F32)?;
        let tokens = kernels::linear::forward(&y, &self.weight, Some(&self.bias), None)?;
        unpatchify(&tokens, context.positions.grid)
    }

    /// The gradient of the stream `x`, f32, zero at the tokens that were dropped; `d_velocity` [b, c, t, h, w].
    pub fn backward(&self, x: &Tensor, d_velocity: &Tensor, context: &Context) -> Result<Tensor> {
        let (_, scale) = self.modulation(context)?;
        let (seen, in_front) = (of_latents(x, &context.positions)?, context.positions.in_front);
        let nothing = Tensor::zeros(seen.shape(), DType::F32, x.device())?;
        let dy = kernels::linear::backward_input(&patchify(d_velocity)?, &self.weight, None)?;
        let dx = norm::modulated_layer_norm_backward(&seen, &dy, &scale, self.eps, &nothing)?;
        match x.dim(1)? - seen.dim(1)? {
            0 => Ok(dx),
            dropped => Ok(dx.pad_with_zeros(1, in_front, dropped - in_front)?),
        }
    }

    /// (shift, scale), each [b, g, 1, d], for the tokens of the latents: the head's own rows plus the unprojected time embedding.
    fn modulation(&self, context: &Context) -> Result<(Tensor, Tensor)> {
        let time_bgd = of_latent_groups(context.cond.require(Role::TIME)?, &context.positions)?;
        let rows = time_bgd.unsqueeze(2)?.broadcast_add(&self.modulation.unsqueeze(1)?)?;
        Ok((rows.narrow(2, 0, 1)?.contiguous()?, rows.narrow(2, 1, 1)?.contiguous()?))
    }
}

/// The tokens of the stream [b, l, d] that are the latents'.
fn of_latents(x: &Tensor, positions: &Positions) -> Result<Tensor> {
    let (frames, height, width) = positions.grid;
    let count = frames * (height / PATCH) * (width / PATCH);
    match x.dim(1)? == count {
        true => Ok(x.clone()),
        false => Ok(x.narrow(1, positions.in_front, count)?.contiguous()?),
    }
}

/// The rows of a time embedding [b, g, d] that are those of the latents' tokens: all where every token shares one, else without
/// those of the tokens in front, which are whole groups.
fn of_latent_groups(time_bgd: &Tensor, positions: &Positions) -> Result<Tensor> {
    let (groups, (frames, height, width)) = (time_bgd.dim(1)?, positions.grid);
    let tokens = positions.in_front + frames * (height / PATCH) * (width / PATCH);
    match (groups, positions.in_front) {
        (1, _) | (_, 0) => Ok(time_bgd.clone()),
        (_, in_front) => {
            let dropped = in_front * groups / tokens;
            Ok(time_bgd.narrow(1, dropped, groups - dropped)?.contiguous()?)
        }
    }
}

/// Tokens [b, l, 4c], values ordered (dy, dx, channel), to [b, c, t, h, w].
fn unpatchify(tokens: &Tensor, (frames, height, width): (usize, usize, usize)) -> Result<Tensor> {
    let (batch, _, values) = tokens.dims3()?;
    let (rows, columns, channels) = (height / PATCH, width / PATCH, values / (PATCH * PATCH));
    let grid = tokens.reshape(&[batch, frames, rows, columns, PATCH, PATCH, channels][..])?;
    Ok(grid
        .permute([0, 6, 1, 2, 4, 3, 5])?
        .contiguous()?
        .reshape((batch, channels, frames, height, width))?)
}

/// The inverse of [`unpatchify`].
fn patchify(x: &Tensor) -> Result<Tensor> {
    let (batch, channels, frames, height, width) = x.dims5()?;
    let (rows, columns) = (height / PATCH, width / PATCH);
    let grid = x.contiguous()?.reshape(&[batch, channels, frames, rows, PATCH, columns, PATCH][..])?;
    let tokens = grid.permute([0, 2, 3, 5, 4, 6, 1])?.contiguous()?;
    Ok(tokens.reshape((batch, frames * rows * columns, channels * PATCH * PATCH))?)
}
