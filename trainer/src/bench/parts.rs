//! Attention alone, the VAE, the text encoder, and reading weights.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use kernels::attention as kernel;
use models::umt5::Umt5;
use models::vae::{Tiles, Tiling, Vae, latent_frames};
use models::weights::{Checkpoint, Frozen, TensorSpec, Weights};
use serde_json::{Value, json};

use super::{ClipSize, Repeats, device_name, normal, peak_gib, reset_peak, rounded, timed};
use crate::error::Result;
use crate::precision::in_words;

/// Forward and backward of self-attention over `tokens`, [1, tokens, heads, head_size] in `dtype`.
///
/// # Errors
/// Shapes too large for the machine.
pub fn attention(
    tokens: usize,
    heads: usize,
    head_size: usize,
    dtype: DType,
    repeats: Repeats,
    device: &Device,
) -> Result<Value> {
    let made = |name: &str| -> Result<Tensor> {
        Ok(normal(name, &[1, tokens, heads, head_size], device)?.to_dtype(dtype)?)
    };
    let (q, k, v, d_out) = (made("q")?, made("k")?, made("v")?, made("d_out")?);
    reset_peak();
    let forward = timed(repeats, device, || Ok(kernel::forward(&q, &k, &v).map(drop)?))?;
    let out = kernel::forward(&q, &k, &v)?;
    let backward = timed(repeats, device, || Ok(kernel::backward(&q, &k, &v, &out, &d_out).map(drop)?))?;
    let tera = 4.0 * (tokens as f64).powi(2) * (heads * head_size) as f64 / 1e12;
    Ok(json!({
        "what": "attention", "L": tokens, "heads": heads, "head_size": head_size, "backend": "chunked",
        "dtype": dtype.as_str(), "device": device_name(device),
        "fwd_ms": rounded(forward * 1e3, 2), "fwd_tflops": rounded(tera / forward, 4),
        "bwd_ms": rounded(backward * 1e3, 2), "bwd_tflops": rounded(2.5 * tera / backward, 4),
        "peak_gib": peak_gib(device),
    }))
}

/// A measurement of a VAE.
#[derive(Debug)]
pub struct VaeBench<'a> {
    /// The VAE.
    pub vae: &'a Vae,
    /// The clip.
    pub size: ClipSize,
    /// Whole, or in the usual tiles.
    pub tiling: Tiling,
    /// How often.
    pub repeats: Repeats,
}

/// Decoding and encoding one clip.
///
/// # Errors
/// A size that the VAE does not take.
pub fn vae(bench: &VaeBench) -> Result<Value> {
    let VaeBench { vae, size, tiling, repeats } = *bench;
    let (device, ratio, tiled) = (vae.device(), vae.sizes().spatial_ratio(), tiling != Tiling::Off);
    let latent = [1, vae.sizes().latent, latent_frames(size.frames), size.height / ratio, size.width / ratio];
    let latents = normal("latents", &latent, device)?;
    let video = normal("video", &[1, 3, size.frames, size.height, size.width], device)?.clamp(-1f32, 1f32)?;
    reset_peak();
    let decode = timed(repeats, device, || Ok(vae.decode(&latents, tiling).map(drop)?))?;
    let decode_peak = peak_gib(device);
    reset_peak();
    let encode = timed(repeats, device, || Ok(vae.encode(&video, tiling).map(drop)?))?;
    Ok(json!({
        "what": match vae.sizes().generation { models::vae::Generation::Wan21 => "vae2.1", models::vae::Generation::Wan22 => "vae2.2" },
        "width": vae.sizes().decoder, "dtype": vae.dtype().as_str(), "device": device_name(device), "tiled": tiled,
        "frames": size.frames, "size": size.label(),
        "decode_s": rounded(decode, 4), "decode_peak_gib": decode_peak,
        "encode_s": rounded(encode, 4), "encode_peak_gib": peak_gib(device),
    }))
}

/// Tiles as they are used where none are named.
pub fn usual_tiles(tiled: bool) -> Tiling {
    if tiled { Tiling::On(Tiles::default()) } else { Tiling::Off }
}

/// Encoding one prompt of `tokens` tokens.
///
/// # Errors
/// When the encoder fails.
pub fn text(name: &str, umt5: &Umt5, tokens: usize, repeats: Repeats) -> Result<Value> {
    let device = umt5.device();
    let vocabulary = umt5.sizes().vocabulary;
    let ids: Vec<u32> = (0..tokens).map(|i| (i * 7919 % vocabulary) as u32).collect();
    reset_peak();
    let seconds = timed(repeats, device, || Ok(umt5.encode(&ids).map(drop)?))?;
    Ok(json!({
        "what": name, "weights": in_words(umt5.frozen()), "device": device_name(device), "tokens": tokens,
        "s": rounded(seconds, 4), "peak_gib": peak_gib(device),
    }))
}

/// Reading every tensor of a checkpoint onto `device`, one after the other, matrices in the form that `frozen` says.
///
/// # Errors
/// A checkpoint that cannot be read.
pub fn load(path: &Path, frozen: Frozen, repeats: Repeats, device: &Device) -> Result<Value> {
    let file = Checkpoint::open(path).map_err(models::Error::from)?;
    let bytes = file.total_bytes();
    let specs: Vec<TensorSpec> = file
        .entries()
        .filter(|(_, entry)| entry.dtype.is_float())
        .map(|(name, entry)| TensorSpec::new(name, entry.shape.as_slice()))
        .collect();
    let weights = Weights::from_checkpoint(file, &specs, |_| None, |_| true).map_err(models::Error::from)?;
    reset_peak();
    let seconds = timed(repeats, device, || {
        for TensorSpec { name, shape } in &specs {
            match shape.len() {
                2 => drop(weights.matrix(name, frozen, device)?),
                _ => drop(weights.tensor(name, frozen.compute, device)?),
            }
        }
        Ok(())
    })?;
    Ok(json!({
        "what": "load", "model": path, "device": device_name(device), "weights": in_words(frozen), "tensors": specs.len(), "bytes": bytes,
        "s": rounded(seconds, 4), "gb_s": rounded(bytes as f64 / seconds / 1e9, 3), "peak_gib": peak_gib(device),
    }))
}
