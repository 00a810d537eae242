//! The video VAEs: pixels to latents and back, causal in time, chunk by chunk.
//!
//! Wan 2.1 and Wan 2.2 are two arrangements (`plan`) of the same parts (`parts`).

mod bands;
mod frames;
mod names;
mod network;
mod parts;
mod plan;
mod scaling;
mod sizes;
mod tiling;
mod tiny;

use std::path::Path;

use kernels::resample::{fold_pixels, unfold_pixels};
use kernels::{DType, Device, Tensor};
use sha2::{Digest, Sha256};

use crate::weights::{Checkpoint, Weights};
use crate::{Error, Movable, Result};

use network::Network;
use parts::{Builder, History, Part};
use scaling::Scaling;
use tiling::{Axis, tiled};

pub use bands::Bands;
pub use frames::FrameSink;
pub use network::Probe;
pub use scaling::VaeConfig;
pub use sizes::{Generation, Naming, Sizes};
pub use tiling::{Tiles, Tiling};
pub use tiny::{TinyDecoder, TinyLatents, TinySizes, TinyStream};

/// Frames of video per latent frame, but for the first, which is one frame.
pub const TEMPORAL_RATIO: usize = 4;

/// Pixels per latent along each axis, inside the network (without the folding of Wan 2.2).
const NETWORK_RATIO: usize = 8;

/// A VAE with its weights on one device; clones share them.
#[derive(Debug, Clone)]
pub struct Vae {
    sizes: Sizes,
    scaling: Scaling,
    encoder: Network,
    /// Official `conv1`: after the encoder.
    to_moments: Part,
    /// Official `conv2`: before the decoder.
    from_latents: Part,
    decoder: Network,
    dtype: DType,
    device: Device,
    fingerprint: String,
}

impl Vae {
    /// Loads a VAE from a `.safetensors` or `.pth` file, or a diffusers `vae` folder, with official or diffusers names.
    ///
    /// `config` is a diffusers `config.json` (latent statistics); without it, one beside the weights in a folder is
    /// used, else the published statistics. Sizes are read from the tensors.
    ///
    /// # Errors
    /// Anything that [`Weights::open`] refuses, and files that hold no Wan VAE.
    pub fn load(path: &Path, config: Option<&Path>, dtype: DType, device: &Device) -> Result<Self> {
        let (weights, sizes, config) = Self::open(path, config)?;
        Self::build(&weights, sizes, &config, dtype, device)
    }

    /// [`Vae::fingerprint`] of the VAE at `path`, from headers and samples of the bytes, without loading it.
    ///
    /// # Errors
    /// Those of [`Vae::load`], but for values that are read there alone.
    pub fn fingerprint_at(path: &Path, config: Option<&Path>) -> Result<String> {
        let (weights, sizes, config) = Self::open(path, config)?;
        fingerprint(&weights, &Scaling::new(&sizes, &config)?)
    }

    fn open(path: &Path, config: Option<&Path>) -> Result<(Weights, Sizes, VaeConfig)> {
        let checkpoint = Checkpoint::open(path)?;
        let (sizes, naming) = Sizes::detect(&checkpoint)?;
        let to_file = |name: &str| match naming {
            Naming::Official => None,
            Naming::Diffusers => names::to_diffusers(name, sizes.generation),
        };
        let weights = Weights::from_checkpoint(checkpoint, &sizes.tensors(), to_file, |_| false)?;
        let beside = path.join("config.json");
        let config = match config {
            Some(config) => VaeConfig::read(config)?,
            None if beside.is_file() => VaeConfig::read(&beside)?,
            None => VaeConfig::default(),
        };
        Ok((weights, sizes, config))
    }

    /// A VAE of these sizes with weights made from `seed`, for measuring speed and memory.
    pub fn seeded(sizes: Sizes, seed: u64, dtype: DType, device: &Device) -> Result<Self> {
        let weights = Weights::seeded(sizes.tensors(), seed);
        Self::build(&weights, sizes, &VaeConfig::default(), dtype, device)
    }

    fn build(
        weights: &Weights,
        sizes: Sizes,
        config: &VaeConfig,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let scaling = Scaling::new(&sizes, config)?;
        let mut builder = Builder { weights, dtype, device, slots: 0 };
        let [to_moments, from_latents] = plan::latent_convs(&sizes);
        Ok(Self {
            to_moments: builder.part(&to_moments)?,
            from_latents: builder.part(&from_latents)?,
            encoder: Network::build(&plan::encoder(&sizes), &mut builder)?,
            decoder: Network::build(&plan::decoder(&sizes), &mut builder)?,
            fingerprint: fingerprint(weights, &scaling)?,
            device: device.clone(),
            sizes,
            scaling,
            dtype,
        })
    }

    /// The same VAE on another device.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn copied_to(&self, device: &Device) -> Result<Self> {
        let mut copy = self.clone();
        copy.move_to(device)?;
        Ok(copy)
    }

    /// Which VAE this is, and how wide.
    pub fn sizes(&self) -> &Sizes {
        &self.sizes
    }

    /// The dtype of its weights and of the computation.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The device that the weights are on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// A text that identifies weights and statistics, for the keys of caches.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Encodes `video` `[B,3,T,H,W]` in -1..1 to scaled latents `[B,C,1+(T-1)/4,H/8,W/8]` (Wan 2.2: H/16, W/16) in f32:
    /// the means of the posterior, nothing is drawn.
    ///
    /// # Errors
    /// If T is not 4n+1, or H or W is not a multiple of the ratio: nothing is dropped or cropped silently.
    pub fn encode(&self, video_b3thw: &Tensor, tiling: Tiling) -> Result<Tensor> {
        self.encode_probed(video_b3thw, tiling, None)
    }

    /// [`Vae::encode`], showing every stage's output of every chunk to `probe`.
    pub fn encode_probed(
        &self,
        video_b3thw: &Tensor,
        tiling: Tiling,
        probe: Option<&mut Probe>,
    ) -> Result<Tensor> {
        self.scaling.scale(&self.raw_means(video_b3thw, tiling, probe)?)
    }

    /// The means before scaling, as diffusers' `encode(..).latent_dist.mean` gives them.
    pub fn raw_means(
        &self,
        video_b3thw: &Tensor,
        tiling: Tiling,
        mut probe: Option<&mut Probe>,
    ) -> Result<Tensor> {
        self.check_video(video_b3thw)?;
        let (_, _, _, height, width) = video_b3thw.dims5()?;
        let x = video_b3thw.to_device(&self.device)?.to_dtype(self.dtype)?;
        let x = fold_pixels(&x, self.sizes.patch())?;
        match tiling {
            Tiling::On(tiles) if height > tiles.size.0 || width > tiles.size.1 => {
                // Tile sizes are not divided by the folding of Wan 2.2: so it is in diffusers.
                let axis = |size: usize, stride: usize| {
                    let (latent_size, keep) = (size / NETWORK_RATIO, stride / NETWORK_RATIO);
                    Axis { size, stride, keep, blend: latent_size.saturating_sub(keep) }
                };
                let axes = checked_axes(tiles, axis)?;
                let ratio = self.sizes.spatial_ratio();
                tiled(&x, axes, (height / ratio, width / ratio), |tile| self.means(tile, &mut probe))
            }
            _ => self.means(&x, &mut probe),
        }
    }

    /// Decodes scaled latents [B,C,T',H',W'] to video [B,3,1+4(T'-1),8H',8W'] (Wan 2.2: 16H', 16W') in f32, clamped
    /// to -1..1.
    ///
    /// # Errors
    /// Latents with another number of channels than this VAE's, and a video that is not finite.
    pub fn decode(&self, latents_bcthw: &Tensor, tiling: Tiling) -> Result<Tensor> {
        self.decode_probed(latents_bcthw, tiling, None)
    }

    /// [`Vae::decode`], showing every stage's output of every chunk to `probe`.
    pub fn decode_probed(
        &self,
        latents_bcthw: &Tensor,
        tiling: Tiling,
        mut probe: Option<&mut Probe>,
    ) -> Result<Tensor> {
        let z = self.unscaled(latents_bcthw)?;
        let pixels = match self.decoding_tiles(&z, tiling)? {
            Some(axes) => self.tiled_pixels(&z, axes, &mut probe)?,
            None => self.pixels(&z, &mut probe)?,
        };
        let pixels = unfold_pixels(&pixels.to_dtype(DType::F32)?, self.sizes.patch())?;
        // Before the clamp, which turns what is not a number into black on a GPU. A sum is not finite where a number is not.
        let sum = pixels.sum_all()?;
        if !sum.is_shadow() && !sum.to_scalar::<f32>()?.is_finite() {
            return Err(Error::NotFinite { what: "the decoded video" });
        }
        Ok(pixels.clamp(-1f32, 1f32)?)
    }

    /// What the decoder takes of the DiT's latents, on its device and in its dtype.
    fn unscaled(&self, latents_bcthw: &Tensor) -> Result<Tensor> {
        let (_, channels, frames, height, width) = latents_bcthw.dims5()?;
        if channels != self.sizes.latent || frames * height * width == 0 {
            return Err(Error::Mismatch(format!(
                "the VAE decodes latents [B, {}, T, H, W], not {:?}",
                self.sizes.latent,
                latents_bcthw.dims()
            )));
        }
        Ok(self.scaling.unscale(&latents_bcthw.to_device(&self.device)?)?.to_dtype(self.dtype)?)
    }

    /// The tiles that `z` is decoded in; none where it is decoded whole.
    fn decoding_tiles(&self, z: &Tensor, tiling: Tiling) -> Result<Option<(Axis, Axis)>> {
        let (ratio, patch) = (self.sizes.spatial_ratio(), self.sizes.patch());
        let (_, _, _, height, width) = z.dims5()?;
        match tiling {
            Tiling::On(tiles) if height > tiles.size.0 / ratio || width > tiles.size.1 / ratio => {
                let axis = |size: usize, stride: usize| Axis {
                    size: size / ratio,
                    stride: stride / ratio,
                    keep: stride / patch,
                    blend: (size / patch).saturating_sub(stride / patch),
                };
                checked_axes(tiles, axis).map(Some)
            }
            _ => Ok(None),
        }
    }

    fn tiled_pixels(&self, z: &Tensor, axes: (Axis, Axis), probe: &mut Option<&mut Probe>) -> Result<Tensor> {
        let (_, _, _, height, width) = z.dims5()?;
        let out = (height * NETWORK_RATIO, width * NETWORK_RATIO);
        tiled(z, axes, out, |tile| self.pixels(tile, probe))
    }

    /// Raw means of a tile; the log-variances after them are not used.
    fn means(&self, x: &Tensor, probe: &mut Option<&mut Probe>) -> Result<Tensor> {
        // The first frame alone, then four at a time: one latent frame each.
        let chunks = (0..latent_frames(x.dim(2)?)).map(|i| match i {
            0 => (0, 1),
            _ => (TEMPORAL_RATIO * (i - 1) + 1, TEMPORAL_RATIO),
        });
        let moments = self.encoder.run(x, chunks, probe)?;
        let moments = self.to_moments.forward(moments, &mut History::new(0))?;
        Ok(moments.narrow(1, 0, self.sizes.latent)?)
    }

    fn pixels(&self, z: &Tensor, probe: &mut Option<&mut Probe>) -> Result<Tensor> {
        let z = self.from_latents.forward(z.clone(), &mut History::new(0))?;
        self.decoder.run(&z, (0..z.dim(2)?).map(|i| (i, 1)), probe)
    }

    fn check_video(&self, video: &Tensor) -> Result<()> {
        let ratio = self.sizes.spatial_ratio();
        let fail =
            |why: String| Err(Error::Mismatch(format!("the VAE cannot encode {:?}: {why}", video.dims())));
        match video.dims() {
            [_, 3, t, ..] if t % TEMPORAL_RATIO != 1 => fail(format!(
                "{t} frames are not 4n+1; cut the clip to {} frames",
                TEMPORAL_RATIO * (t.saturating_sub(1) / TEMPORAL_RATIO) + 1
            )),
            [_, 3, _, h, w] if h % ratio != 0 || w % ratio != 0 || h * w == 0 => {
                fail(format!("height and width must be multiples of {ratio}"))
            }
            [_, 3, _, _, _] => Ok(()),
            _ => fail("it takes [batch, 3, frames, height, width]".to_owned()),
        }
    }
}

impl Movable for Vae {
    fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let ends = [&mut self.to_moments, &mut self.from_latents].into_iter().flat_map(Part::tensors_mut);
        ends.chain(self.encoder.tensors_mut()).chain(self.decoder.tensors_mut()).collect()
    }

    fn move_to(&mut self, device: &Device) -> Result<()> {
        for tensor in self.tensors_mut() {
            *tensor = tensor.to_device(device)?;
        }
        self.device = device.clone();
        Ok(())
    }
}

/// Latent frames of a clip of `frames` frames (4n+1).
pub fn latent_frames(frames: usize) -> usize {
    1 + frames.saturating_sub(1) / TEMPORAL_RATIO
}

fn checked_axes(tiles: Tiles, axis: impl Fn(usize, usize) -> Axis) -> Result<(Axis, Axis)> {
    let axes = (axis(tiles.size.0, tiles.stride.0), axis(tiles.size.1, tiles.stride.1));
    let fits = |a: Axis| a.stride > 0 && a.keep > 0 && a.size >= a.stride;
    match fits(axes.0) && fits(axes.1) {
        true => Ok(axes),
        false => Err(Error::Mismatch(format!(
            "tiles of {:?} pixels every {:?} do not work: the step must be at least one latent and at most a tile",
            tiles.size, tiles.stride
        ))),
    }
}

/// Identifies weights and statistics.
fn fingerprint(weights: &Weights, scaling: &Scaling) -> Result<String> {
    let identity = format!("{} {}", weights.fingerprint()?, scaling.identity());
    Ok(Sha256::digest(identity).iter().map(|b| format!("{b:02x}")).collect())
}
