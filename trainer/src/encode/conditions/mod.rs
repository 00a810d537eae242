//! What control models are conditioned on besides text, made from pixels the same way for training, for sampling and for
//! probes.
//!
//! Videos and pictures are [1, 3, f, h, w] in -1..1, masks [1, 1, f, h, w] in 0..1, where 1 is to be generated. Sources:
//! aigc-apps/VideoX-Fun videox_fun/pipeline/pipeline_wan_fun_control.py and pipeline_wan_fun_inpaint.py; Wan-Video/Wan2.1
//! wan/vace.py; Wan-Video/Wan2.2 wan/animate.py.

pub mod animate;
pub mod camera;
pub mod fun;
pub mod given;
pub mod speech;
pub mod vace;

use kernels::{DType, Device, Tensor};
use models::vae::{TEMPORAL_RATIO, Tiling, Vae};

use crate::error::{Error, Result};

/// Between what is given and what is generated.
const HALF: f64 = 0.5;

/// The latents [1, c, t, h, w] f32 on the host of `video`.
///
/// # Errors
/// Sizes that the VAE does not take.
pub fn latents(vae: &Vae, video: &Tensor) -> Result<Tensor> {
    Ok(latents_there(vae, video)?.to_device(&Device::Cpu)?)
}

/// [`latents`] before they go to the host.
pub(crate) fn latents_there(vae: &Vae, video: &Tensor) -> Result<Tensor> {
    let latents = vae.encode(&video.to_device(vae.device())?, Tiling::Off)?;
    Ok(latents.to_dtype(DType::F32)?)
}

/// `x` [1, c, f, h, w], f = 4n + 1, with the frames of a latent frame side by side: [1, 4c, n + 1, h, w], channel c * 4 + k for frame
/// k. The first latent frame has the first frame four times.
///
/// # Errors
/// Another number of frames.
pub fn by_latent_frame(x: &Tensor) -> Result<Tensor> {
    let (batch, channels, frames, height, width) = x.dims5()?;
    if frames % TEMPORAL_RATIO != 1 {
        let why = format!("{frames} frames are not of the form 4n+1");
        return Err(Error::Setting { key: "frames of a clip".into(), why });
    }
    let first = x.narrow(2, 0, 1)?.contiguous()?;
    let mut parts = vec![first; TEMPORAL_RATIO];
    if frames > 1 {
        parts.push(x.narrow(2, 1, frames - 1)?.contiguous()?);
    }
    let count = frames / TEMPORAL_RATIO + 1;
    Ok(Tensor::cat(&parts, 2)?
        .reshape(&[batch, channels, count, TEMPORAL_RATIO, height, width][..])?
        .transpose(2, 3)?
        .contiguous()?
        .reshape((batch, channels * TEMPORAL_RATIO, count, height, width))?)
}
