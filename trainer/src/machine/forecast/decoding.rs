//! Decoding of clips, on one device or in bands of rows on several.

use std::ops::ControlFlow;
use std::sync::Arc;

use kernels::transfer::Route;
use kernels::{DType, Device, Tensor};
use models::vae::{Bands, Sizes, Tiling, Vae};

use super::{DeviceMemory, Engine, ShadowDevice};
use crate::error::Result;

/// What each of `devices` holds at its peak while together they decode latents `[1,C,..]` of the size `latents` on the first of
/// them, in bands of one each; the numbers are bytes that each holds besides.
///
/// Bands send each other rows as they come to them, so that of bands the figure is exact up to a few rows.
///
/// # Errors
/// Sizes that the VAE does not take.
pub fn decoding(
    devices: &[(Engine, u64)],
    (sizes, dtype): (Sizes, DType),
    (frames, height, width): (usize, usize, usize),
    tiling: Tiling,
) -> Result<Vec<DeviceMemory>> {
    let shadow =
        |(index, (engine, held)): (usize, &(Engine, u64))| ShadowDevice::at(*engine, index).holding(*held);
    let shadows: Vec<ShadowDevice> = devices.iter().enumerate().map(shadow).collect();
    let vae = |shadow: &ShadowDevice| Ok(Arc::new(Vae::seeded(sizes, 0, dtype, shadow.device())?));
    let bands = Bands::new(shadows.iter().map(vae).collect::<Result<_>>()?, Route::Auto)?;
    let shape = (1, sizes.latent, frames, height, width);
    let latents = Tensor::zeros(shape, DType::F32, bands.first().device())?;
    bands.decode_frames(&latents, tiling, &mut |_| ControlFlow::Continue(()))?;
    Ok(shadows.iter().map(ShadowDevice::memory).collect())
}

/// What a device that holds so many bytes besides has at its peak while it decodes latents `[1,C,..]` of the size `latents`, and encodes the
/// last `past` frames of them again.
///
/// # Errors
/// Sizes that the VAE does not take.
pub fn continuing(
    (engine, held): (Engine, u64),
    (sizes, dtype): (Sizes, DType),
    (frames, height, width): (usize, usize, usize),
    past: usize,
) -> Result<DeviceMemory> {
    let (shadow, host) = (ShadowDevice::at(engine, 0).holding(held), Device::shadow_cpu(None));
    let vae = Vae::seeded(sizes, 0, dtype, shadow.device())?;
    let latents = Tensor::zeros((1, sizes.latent, frames, height, width), DType::F32, &host)?;
    drop(vae.decode_to_host(&latents, Tiling::Off, &host)?);
    let side = |latents: usize| latents * sizes.spatial_ratio();
    let video = Tensor::zeros((1, 3, past, side(height), side(width)), DType::F32, &host)?;
    drop(vae.encode(&video.to_device(shadow.device())?, Tiling::Off)?.to_dtype(DType::F32)?);
    Ok(shadow.memory())
}
