//! Root-mean-square norm over the channels of a picture or video, forward only: the norm of the Wan VAEs.

use crate::Tensor;
use candle_core::{D, DType, Result, bail};
use rayon::prelude::*;

use crate::cpu::{computed, is_cpu_f32};
use crate::gpu::{File, Gpu, Launch, suffix};
use crate::profile::{self, Class};
use crate::video::planes;

/// What follows the norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    Identity,
    /// `x / (1 + exp(-x))`.
    Silu,
}

/// Norms below this count as this, so that a black pixel divides by something. Source: torch `F.normalize`.
const SMALLEST_NORM: f32 = 1e-12;

/// `activation(x / max(||x||, 1e-12) sqrt(C) gamma)`, the norm over the channels of each pixel, in f32.
///
/// `x` is [B,C,...], `gamma` holds C values. Source: Wan-Video/Wan2.1 `wan/modules/vae.py`, `RMS_norm`.
///
/// # Errors
/// If `gamma` does not have one value per channel.
pub fn channel_norm(x_bc: &Tensor, gamma: &Tensor, activation: Activation) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x_bc.device());
    let channels = x_bc.dim(1)?;
    if gamma.elem_count() != channels {
        bail!("channel_norm: {channels} channels, but {} gains", gamma.elem_count());
    }
    on_gpu!(x_bc, |gpu| gpu.channel_norm(x_bc, gamma, activation)?);
    match is_cpu_f32(x_bc) && is_cpu_f32(gamma) {
        true => on_cpu(x_bc, gamma, activation),
        false => by_tensors(x_bc, gamma, activation),
    }
}

/// The readable definition, on any device.
fn by_tensors(x: &Tensor, gamma: &Tensor, activation: Activation) -> Result<Tensor> {
    let (batch, channels) = (x.dim(0)?, x.dim(1)?);
    let flat = x.reshape((batch, channels, ()))?.to_dtype(DType::F32)?;
    let norm = flat.sqr()?.sum_keepdim(D::Minus2)?.sqrt()?.maximum(SMALLEST_NORM)?;
    let gain = (gamma.to_dtype(DType::F32)?.reshape((1, channels, 1))? * (channels as f64).sqrt())?;
    let y = flat.broadcast_div(&norm)?.broadcast_mul(&gain)?;
    let y = match activation {
        Activation::Identity => y,
        Activation::Silu => y.silu()?,
    };
    y.reshape(x.shape())?.to_dtype(x.dtype())
}

fn on_cpu(x: &Tensor, gamma: &Tensor, activation: Activation) -> Result<Tensor> {
    let (batch, channels) = (x.dim(0)?, x.dim(1)?);
    let pixels = x.elem_count() / (batch * channels).max(1);
    if x.elem_count() == 0 {
        return Ok(x.clone());
    }
    computed([x, gamma], x.shape(), |[values, gamma]| {
        let scales = inverse_norms(values, batch, channels, pixels);
        let mut y = vec![0f32; values.len()];
        y.par_chunks_mut(pixels).zip(values.par_chunks(pixels)).enumerate().for_each(|(row, (y, x))| {
            let scale = &scales[row / channels * pixels..][..pixels];
            let gain = gamma[row % channels];
            let normed = x.iter().zip(scale).map(|(x, s)| x * s * gain);
            match activation {
                Activation::Identity => y.iter_mut().zip(normed).for_each(|(y, v)| *y = v),
                Activation::Silu => y.iter_mut().zip(normed).for_each(|(y, v)| *y = v / (1.0 + (-v).exp())),
            }
        });
        y
    })
}

/// `sqrt(C) / max(||x||, 1e-12)` of each pixel: [batch, pixels].
fn inverse_norms(x: &[f32], batch: usize, channels: usize, pixels: usize) -> Vec<f32> {
    const RUN: usize = 1024;
    let mut scales = vec![0f32; batch * pixels];
    for (item, scales) in scales.chunks_exact_mut(pixels).enumerate() {
        scales.par_chunks_mut(RUN).enumerate().for_each(|(run, scales)| {
            for channel in 0..channels {
                let row = &x[(item * channels + channel) * pixels + run * RUN..][..scales.len()];
                scales.iter_mut().zip(row).for_each(|(sum, x)| *sum += x * x);
            }
            let root = (channels as f32).sqrt();
            scales.iter_mut().for_each(|sum| *sum = root / sum.sqrt().max(SMALLEST_NORM));
        });
    }
    scales
}

impl Gpu {
    fn channel_norm(&self, x: &Tensor, gamma: &Tensor, activation: Activation) -> Result<Option<Tensor>> {
        const THREADS: usize = 256;
        let channels = x.dim(1)?;
        let Some(suffix) = suffix(x.dtype()).filter(|_| channels % 4 == 0) else { return Ok(None) };
        let Some(rows) = self.pixels(x, 4)? else { return Ok(None) };
        let gamma = gamma.to_dtype(x.dtype())?.flatten_all()?.contiguous()?;
        let y = self.empty(rows.shape(), x.dtype())?;
        // Three loads of four channels for each thread of the narrow levels, up to a whole warp for a pixel.
        let lanes = (channels / 12).next_power_of_two().clamp(8, 32);
        let count = x.elem_count() / channels;
        let launch = Launch::new(self, File::Volume, &format!("channel_norm_{suffix}"))?;
        let launch = launch.tensor(&rows)?.tensor(&gamma)?.tensor(&y)?.size(count).int(channels).int(lanes);
        let launch = launch.int(usize::from(activation == Activation::Silu));
        launch.rows(count.div_ceil(THREADS / lanes), THREADS)?;
        planes(&y).map(Some)
    }
}
