//! What a clip starts from: text states, a picture, noise.

use kernels::random::Key;
use kernels::{Device, Tensor};
use models::dit::config::PATCH;
use models::dit::{Conditioning, DitConfig, Raw, Role};

use crate::encode::prompt::ClipRequest;
use crate::encode::{LatentStore, PictureInputs};
use crate::error::Result;
use crate::pipeline::NetworkInput;

/// A request with its text states, its picture and its starting noise.
#[derive(Debug, Clone)]
pub struct Prompted {
    /// What is asked for.
    pub request: ClipRequest,
    /// What the network is conditioned on for the prompt alone: text states [1, s, text_dim].
    pub positive: Conditioning<Raw>,
    /// The same for the negative prompt, and what a model is shown otherwise beside it; not read when the guidance is 1.
    pub negative: Conditioning<Raw>,
    /// Latents at sigma 1, [1, c, t, h, w] f32.
    pub noise_bcthw: Tensor,
    /// What the network is shown of the picture, on the device of the noise.
    pub shown: PictureInputs,
}

impl Prompted {
    /// A request to the model `dit` that starts from `noise_bcthw`, with its text states and its picture out of the cache.
    ///
    /// # Errors
    /// When the prompt, the negative prompt or the picture was not encoded.
    pub fn new(
        request: &ClipRequest,
        noise_bcthw: Tensor,
        encoded: &LatentStore,
        dit: &DitConfig,
    ) -> Result<Self> {
        let states = |prompt: &str| -> Result<Conditioning<Raw>> {
            Ok(Conditioning::new().with(Role::TEXT, encoded.text(prompt)?.unsqueeze(0)?))
        };
        let shown = encoded.shown_of(request, dit)?.to_device(noise_bcthw.device())?;
        Ok(Self {
            request: request.clone(),
            positive: states(&request.prompt)?,
            negative: states(&request.negative)?.merged(shown.negative.clone()),
            shown,
            noise_bcthw,
        })
    }

    /// The same on `device`.
    pub(super) fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self {
            request: self.request.clone(),
            positive: self.positive.to_device(device)?,
            negative: self.negative.to_device(device)?,
            noise_bcthw: self.noise_bcthw.to_device(device)?,
            shown: self.shown.to_device(device)?,
        })
    }

    /// The network's input at `latents` and `timestep` for `half`, the positive or the negative conditioning.
    pub(super) fn input(
        &self,
        latents: &Tensor,
        timestep: f32,
        half: &Conditioning<Raw>,
    ) -> Result<NetworkInput> {
        let x_bcthw = match &self.shown.beside_bcthw {
            Some(beside) => Tensor::cat(&[latents, beside], 1)?,
            None => latents.clone(),
        };
        let (_, _, frames, height, width) = latents.dims5()?;
        let timestep = match &self.shown.first_bcthw {
            None => Tensor::new(&[timestep], &Device::Cpu)?,
            // The picture's tokens are clean.
            Some(_) => {
                let of_frame = (height / PATCH) * (width / PATCH);
                let times: Vec<f32> = (0..frames * of_frame)
                    .map(|token| if token < of_frame { 0.0 } else { timestep })
                    .collect();
                Tensor::from_vec(times, (1, frames * of_frame), &Device::Cpu)?
            }
        };
        let cond = self.shown.cond.clone().merged(half.clone());
        Ok(NetworkInput { x_bcthw, cond: cond.with(Role::TIMESTEP, timestep) })
    }
}

/// The noise that a request to the model `dit` starts from, [1, channels, t, h, w] f32: a function of its seed and size.
pub fn starting_noise(request: &ClipRequest, dit: &DitConfig, device: &Device) -> Result<Tensor> {
    let (frames, height, width) = request.latents(dit);
    let channels = dit.out_channels;
    let noise = Key::new(request.seed, "sample", &[]).normals(channels * frames * height * width);
    let shape = (1, channels, frames, height, width);
    Ok(Tensor::from_vec(noise, shape, &Device::Cpu)?.to_device(device)?)
}
