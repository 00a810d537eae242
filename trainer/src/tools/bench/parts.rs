//! Attention alone, the VAE, and the text encoder.

use std::ops::ControlFlow;
use std::sync::Arc;

use kernels::attention as kernel;
use kernels::{DType, Device, Tensor};
use models::umt5::Umt5;
use models::vae::{Bands, Generation, Tiles, Tiling, Vae, latent_frames};
use serde_json::{Value, json};

use super::meter::Meter;
use super::profile::watched;
use super::{ClipSize, Repeats, device_name, gib, random, rounded};
use crate::error::Result;
use crate::machine::forecast::{Engine, ShadowDevice, decoding};
use crate::machine::precision::in_words;

/// A measurement of self-attention.
#[derive(Debug, Clone, Copy)]
pub struct AttentionBench {
    /// Tokens.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Size of a head.
    pub head_size: usize,
    /// What it is computed in.
    pub dtype: DType,
    /// How often.
    pub repeats: Repeats,
}

/// Forward and backward of self-attention, [1, tokens, heads, head_size].
///
/// # Errors
/// Shapes too large for the machine.
pub fn attention(bench: AttentionBench, device: &Device) -> Result<Value> {
    let AttentionBench { tokens, heads, head_size, dtype, repeats } = bench;
    let made = |name: &str| random(name, &[1, tokens, heads, head_size], dtype, device);
    let (q, k, v, d_out) = (made("q")?, made("k")?, made("v")?, made("d_out")?);
    let meter = Meter::of([device]);
    let forward = meter.measure(repeats, || Ok(kernel::forward(&q, &k, &v).map(drop)?))?;
    let out = kernel::forward(&q, &k, &v)?;
    let backward = meter.measure(repeats, || Ok(kernel::backward(&q, &k, &v, &out, &d_out).map(drop)?))?;
    let tera = 4.0 * (tokens as f64).powi(2) * (heads * head_size) as f64 / 1e12;
    Ok(json!({
        "what": "attention", "L": tokens, "heads": heads, "head_size": head_size,
        "backend": kernel::engine(device, dtype, head_size).name, "dtype": dtype.as_str(), "device": device_name(device),
        "fwd_ms": rounded(forward.seconds * 1e3, 2), "fwd_tflops": rounded(tera / forward.seconds, 4),
        "bwd_ms": rounded(backward.seconds * 1e3, 2), "bwd_tflops": rounded(2.5 * tera / backward.seconds, 4),
        "peak_gib": backward.peak_gib,
    }))
}

/// A measurement of a VAE.
#[derive(Debug)]
pub struct VaeBench {
    /// The VAE, on each of its devices.
    pub bands: Bands,
    /// The clip.
    pub size: ClipSize,
    /// Whole, or in the usual tiles.
    pub tiling: Tiling,
    /// How often.
    pub repeats: Repeats,
}

/// Decoding one clip, on several devices in bands of rows; and encoding one clip on each device. Profiles are of the first alone.
///
/// # Errors
/// A size that the VAE does not take.
pub fn vae(bench: &VaeBench) -> Result<Value> {
    let VaeBench { bands, size, tiling, repeats } = bench;
    let (vae, tiling, vaes) = (bands.first(), *tiling, bands.vaes());
    let (device, ratio) = (vae.device(), vae.sizes().spatial_ratio());
    let latents = (latent_frames(size.frames), size.height / ratio, size.width / ratio);
    let latent = [1, vae.sizes().latent, latents.0, latents.1, latents.2];
    let latents_bcthw = random("latents", &latent, DType::F32, device)?;
    let videos = vaes.iter().map(|vae| {
        let shape = [1, 3, size.frames, size.height, size.width];
        // The numbers beyond are not kept beside it: they would be measured and not forecast.
        Ok((vae, random("video", &shape, DType::F32, vae.device())?.clamp(-1f32, 1f32)?))
    });
    let videos = videos.collect::<Result<Vec<_>>>()?;
    let video_bytes = (videos[0].1.elem_count() * DType::F32.size_in_bytes()) as u64; // there is a VAE
    let decoded = || bands.decode_frames(&latents_bcthw, tiling, &mut |_| ControlFlow::Continue(()));
    let encoded = || encode_all(&videos, tiling);
    let meter = Meter::of(vaes.iter().map(|vae| vae.device()));
    let decode = meter.measure(*repeats, || Ok(decoded()?))?;
    let encode = meter.measure(*repeats, encoded)?;
    // None of these heads is for cuDNN.
    let engine = if device.is_cpu() { Engine::Cpu } else { Engine::Chunked };
    let held = vec![(engine, video_bytes); vaes.len()];
    let of_decoding = decoding(&held, (*vae.sizes(), vae.dtype()), latents, tiling)?;
    let of_decoding: Vec<f64> = of_decoding.iter().map(|memory| gib(memory.peak)).collect();
    let of_encoding = forecast(device, &latents_bcthw, |shadow| {
        let video = Tensor::zeros(videos[0].1.shape(), DType::F32, shadow)?;
        Vae::seeded(*vae.sizes(), 0, vae.dtype(), shadow)?.encode(&video, tiling).map(drop)
    })?;
    let what = match vae.sizes().generation {
        Generation::Wan21 => "vae2.1",
        Generation::Wan22 => "vae2.2",
    };
    let mut report = json!({
        "what": what, "width": vae.sizes().decoder, "dtype": vae.dtype().as_str(), "device": device_name(device),
        "devices": vaes.len(), "tiled": tiling != Tiling::Off, "frames": size.frames, "size": size.label(),
        "decode_s": rounded(decode.seconds, 4), "decode_peak_gib": one_or_all(&decode.peak_gib),
        "encode_s": rounded(encode.seconds / vaes.len() as f64, 4), "encode_peak_gib": one_or_all(&encode.peak_gib),
        "decode_forecast_gib": one_or_all(&of_decoding),
        "encode_forecast_gib": one_or_all(&vec![of_encoding; vaes.len()]),
    });
    if repeats.profile {
        let alone = || vae.decode_frames(&latents_bcthw, tiling, &mut |_| ControlFlow::Continue(()));
        report["decode_profile"] = watched(device, || Ok(alone()?))?;
        report["encode_profile"] = watched(device, || Ok(vae.encode(&videos[0].1, tiling).map(drop)?))?;
    }
    Ok(report)
}

/// The figure of a device that is alone, or those of all.
fn one_or_all(figures: &[f64]) -> Value {
    if let [one] = figures { json!(one) } else { json!(figures) }
}

/// Encodes a clip on each device at once.
fn encode_all(videos: &[(&Arc<Vae>, Tensor)], tiling: Tiling) -> Result<()> {
    std::thread::scope(|scope| {
        let start = |(vae, video): &'_ (&Arc<Vae>, Tensor)| {
            let (vae, video) = (Arc::clone(vae), video.clone());
            scope.spawn(move || vae.encode(&video, tiling).map(drop))
        };
        let threads: Vec<_> = videos.iter().map(start).collect();
        threads.into_iter().try_for_each(|thread| {
            Ok(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?)
        })
    })
}

/// GiB that `work` is forecast to hold on `device`, where `held` is there besides.
fn forecast(device: &Device, held: &Tensor, work: impl FnOnce(&Device) -> models::Result<()>) -> Result<f64> {
    // None of these heads is for cuDNN.
    let engine = if device.is_cpu() { Engine::Cpu } else { Engine::Chunked };
    let bytes = held.elem_count() * held.dtype().size_in_bytes();
    let shadow = ShadowDevice::new(engine).holding(bytes as u64);
    work(shadow.device())?;
    Ok(gib(shadow.memory().peak))
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
    let measured = Meter::of([device]).measure(repeats, || Ok(umt5.encode(&ids).map(drop)?))?;
    Ok(json!({
        "what": name, "weights": in_words(umt5.frozen()), "device": device_name(device), "tokens": tokens,
        "s": rounded(measured.seconds, 4), "peak_gib": measured.peak_gib.first(),
        "forecast_gib": forecast(device, &Tensor::zeros(0, DType::F32, device)?, |shadow| {
            Umt5::seeded(*umt5.sizes(), 0, umt5.frozen(), shadow)?.encode(&ids).map(drop)
        })?,
    }))
}
