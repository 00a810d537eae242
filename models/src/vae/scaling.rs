//! The scale of latents: the network's raw means are centred and scaled per channel before a DiT sees them.

use std::path::Path;

use kernels::{DType, Device, Tensor};
use serde::Deserialize;

use crate::{Error, Result};

use super::sizes::{Generation, Sizes};

/// Means of the 16 raw latent channels of Wan 2.1. Source: Wan-Video/Wan2.1 `wan/modules/vae.py`.
const MEAN_21: [f32; 16] = [
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632,
    -0.1922, -0.9497, 0.2503, -0.2921,
];
/// Their standard deviations.
const STD_21: [f32; 16] = [
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382,
    1.1253, 2.8251, 1.9160,
];
/// Means of the 48 raw latent channels of Wan 2.2. Source: Wan-Video/Wan2.2 `wan/modules/vae2_2.py`.
const MEAN_22: [f32; 48] = [
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
];
/// Their standard deviations.
const STD_22: [f32; 48] = [
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885,
    0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338,
    0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458,
    1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
];

/// The keys of a diffusers `vae/config.json` that are not already in the shapes of the tensors. Other keys are ignored:
/// published files carry stray ones.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct VaeConfig {
    /// Mean of each raw latent channel; the published values if absent.
    #[serde(default)]
    pub latents_mean: Option<Vec<f32>>,
    /// Standard deviation of each raw latent channel; the published values if absent.
    #[serde(default)]
    pub latents_std: Option<Vec<f32>>,
}

impl VaeConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// If it cannot be read or is no JSON object.
    pub fn read(path: &Path) -> Result<Self> {
        let fail = |e: &dyn std::fmt::Display| Error::Mismatch(format!("{}: {e}", path.display()));
        let text = std::fs::read(path).map_err(|e| fail(&e))?;
        serde_json::from_slice(&text).map_err(|e| fail(&e))
    }
}

/// Mean and standard deviation of each latent channel.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Scaling {
    mean: Vec<f32>,
    std: Vec<f32>,
}

impl Scaling {
    /// A text of all numbers for the keys of caches, which must never change for the same numbers.
    pub(super) fn identity(&self) -> String {
        let list = |values: &[f32]| values.iter().map(|v| number(*v)).collect::<Vec<_>>().join(", ");
        format!("Scaling {{ mean: [{}], std: [{}] }}", list(&self.mean), list(&self.std))
    }

    pub(super) fn new(sizes: &Sizes, config: &VaeConfig) -> Result<Self> {
        let (mean, std): (&[f32], &[f32]) = match sizes.generation {
            Generation::Wan21 => (&MEAN_21, &STD_21),
            Generation::Wan22 => (&MEAN_22, &STD_22),
        };
        let mean = config.latents_mean.clone().unwrap_or_else(|| mean.to_vec());
        let std = config.latents_std.clone().unwrap_or_else(|| std.to_vec());
        let n = sizes.latent;
        if mean.len() != n || std.len() != n || std.iter().any(|s| !s.is_finite() || *s <= 0.0) {
            return Err(Error::Mismatch(format!(
                "the VAE has {n} latent channels, but there are {} means and {} positive deviations for them; \
                 give its config.json with latents_mean and latents_std",
                mean.len(),
                std.len()
            )));
        }
        Ok(Self { mean, std })
    }

    /// `(mu - mean) / std`, in f32. `mu` is [B,C,T,H,W].
    pub(super) fn scale(&self, mu: &Tensor) -> Result<Tensor> {
        let inverse: Vec<f32> = self.std.iter().map(|s| 1.0 / s).collect();
        let centred = mu.to_dtype(DType::F32)?.broadcast_sub(&column(&self.mean, mu.device())?)?;
        Ok(centred.broadcast_mul(&column(&inverse, mu.device())?)?)
    }

    /// `z std + mean`, in f32. `z` is [B,C,T,H,W].
    pub(super) fn unscale(&self, z: &Tensor) -> Result<Tensor> {
        let scaled = z.to_dtype(DType::F32)?.broadcast_mul(&column(&self.std, z.device())?)?;
        Ok(scaled.broadcast_add(&column(&self.mean, z.device())?)?)
    }
}

fn column(values: &[f32], device: &Device) -> Result<Tensor> {
    Ok(Tensor::new(values, device)?.reshape((1, values.len(), 1, 1, 1))?)
}

/// The shortest digits that give `value` back, with a point or an exponent.
fn number(value: f32) -> String {
    let plain = value.to_string();
    match value.abs() {
        size if size != 0.0 && !(1e-5..1e16).contains(&size) => format!("{value:e}"),
        _ if plain.contains('.') => plain,
        _ => format!("{plain}.0"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The keys of every cached clip hang on it.
    #[test]
    fn the_identity_of_a_scaling_never_changes() {
        let scaling = Scaling { mean: vec![-0.7571, 2.0, 0.0], std: vec![1e-7, 2.8184, 1e16] };
        assert_eq!(scaling.identity(), "Scaling { mean: [-0.7571, 2.0, 0.0], std: [1e-7, 2.8184, 1e16] }");
    }
}
