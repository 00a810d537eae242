//! Random numbers without a generator: each is a function of a key and a counter.
//!
//! Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; constants from the Random123
//! library, philox.h). The same key gives the same bits on every device, card count and resume, and there is no
//! state to save.

use crate::gpu::{File, Gpu, Launch, suffix};
use crate::{Device, Tensor};
use candle_core::DType;
use rayon::prelude::*;

use crate::Result;

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// Names one stream of random numbers; streams of different keys are independent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    seed: u64,
    stream: u64,
}

impl Key {
    /// The stream of `seed` for one purpose, distinguished by `parts` (step, item, ...).
    pub fn new(seed: u64, purpose: &str, parts: &[u64]) -> Self {
        let named = purpose.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| fold(hash, u64::from(byte)));
        Self { seed, stream: parts.iter().fold(named, |hash, &part| fold(hash, part)) }
    }

    /// The stream below this one for one more part.
    pub fn child(self, purpose: &str, part: u64) -> Self {
        let named = purpose.bytes().fold(self.stream, |hash, byte| fold(hash, u64::from(byte)));
        Self { seed: self.seed, stream: fold(named, part) }
    }

    /// (seed, stream), for a kernel that generates the same words.
    pub(crate) fn words(self) -> (u64, u64) {
        (self.seed, self.stream)
    }

    /// Four words of the stream, block `counter`.
    pub fn block(self, counter: u64) -> [u32; 4] {
        let mut words =
            [counter as u32, (counter >> 32) as u32, self.stream as u32, (self.stream >> 32) as u32];
        let mut key = [self.seed as u32, (self.seed >> 32) as u32];
        for _ in 0..ROUNDS {
            let (low, high) = (product(MULTIPLIERS[0], words[0]), product(MULTIPLIERS[1], words[2]));
            words = [high.1 ^ words[1] ^ key[0], high.0, low.1 ^ words[3] ^ key[1], low.0];
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        words
    }

    /// The number `index` of the stream, uniform in the open interval (0, 1), with 32 bits.
    pub fn uniform(self, index: u64) -> f64 {
        unit(self.block(index / 4)[(index % 4) as usize])
    }

    /// `count` numbers of the standard normal distribution, by Box and Muller's method.
    pub fn normals(self, count: usize) -> Vec<f32> {
        let mut out = Vec::with_capacity(count + 3);
        for counter in 0..count.div_ceil(4) as u64 {
            let words = self.block(counter);
            for pair in [[words[0], words[1]], [words[2], words[3]]] {
                let radius = (-2.0 * unit(pair[0]).ln()).sqrt();
                let (sin, cos) = (std::f64::consts::TAU * unit(pair[1])).sin_cos();
                out.extend([(radius * cos) as f32, (radius * sin) as f32]);
            }
        }
        out.truncate(count);
        out
    }
}

/// A tensor of uniform numbers around zero with deviation `deviation`, generated on its device.
///
/// Element i is (u - 1/2) sqrt(12) deviation, u the upper 24 bits of word i of the stream as a number in [0, 1): each
/// step is exact or one f32 rounding, so every device makes the same bits. Then rounded to `dtype`.
pub fn fill(shape: &[usize], key: Key, deviation: f32, dtype: DType, device: &Device) -> Result<Tensor> {
    let width = 12f32.sqrt() * deviation;
    if let Some(gpu) = Gpu::of(device)
        && let Some(filled) = gpu.fill(shape, key, width, dtype)?
    {
        return Ok(filled);
    }
    if device.is_shadow() {
        return Ok(Tensor::shadow(shape, dtype, device));
    }
    let mut values = vec![0f32; shape.iter().product()];
    values.par_chunks_mut(4).enumerate().with_min_len(4096).for_each(|(counter, values)| {
        let words = key.block(counter as u64);
        for (value, word) in values.iter_mut().zip(words) {
            *value = ((word >> 8) as f32 / 16_777_216.0 - 0.5) * width;
        }
    });
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
}

impl Gpu {
    fn fill(&self, shape: &[usize], key: Key, width: f32, dtype: DType) -> Result<Option<Tensor>> {
        let count: usize = shape.iter().product();
        let is_fit = count.is_multiple_of(4) && count > 0;
        let Some(suffix) = suffix(dtype).filter(|_| is_fit) else { return Ok(None) };
        let y = self.empty(shape, dtype)?;
        let launch = Launch::new(self, File::Random, &format!("uniform_{suffix}"))?;
        let launch = launch.tensor(&y)?.size(count / 4).address(key.stream).address(key.seed);
        launch.float(f64::from(width)).each(count / 4)?;
        Ok(Some(y))
    }
}

/// A word as a number in (0, 1): never 0, whose logarithm does not exist.
fn unit(word: u32) -> f64 {
    (f64::from(word) + 0.5) / 4_294_967_296.0
}

/// (low word, high word) of the product.
fn product(a: u32, b: u32) -> (u32, u32) {
    let wide = u64::from(a) * u64::from(b);
    (wide as u32, (wide >> 32) as u32)
}

/// Mixes one value into a hash: the finaliser of splitmix64 (Steele et al. 2014) over their sum.
fn fold(hash: u64, value: u64) -> u64 {
    let mut z = hash.wrapping_add(value).wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 library (kat_vectors, philox4x32 10 rounds).
    #[test]
    fn philox_gives_the_known_answers() {
        let zero = Key { seed: 0, stream: 0 };
        assert_eq!(zero.block(0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = Key { seed: u64::MAX, stream: u64::MAX };
        assert_eq!(ones.block(u64::MAX), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    /// The same numbers for every dtype, up to its rounding, and on every thread.
    #[test]
    fn a_filled_tensor_has_the_deviation_asked_for() -> Result<()> {
        let key = Key::new(7, "fill", &[]);
        let filled = fill(&[100, 999], key, 0.02, DType::F32, &Device::Cpu)?.flatten_all()?;
        let values: Vec<f32> = filled.to_vec1()?;
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64;
        let variance =
            values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / values.len() as f64;
        // The standard errors are 0.3 and 0.14 per cent of the deviation; five of them.
        assert!(
            mean.abs() < 0.02 * 0.016 && (variance.sqrt() / 0.02 - 1.0).abs() < 0.007,
            "{mean} {variance}"
        );
        for (i, value) in values.iter().enumerate().step_by(97) {
            let u = key.block(i as u64 / 4)[i % 4] >> 8;
            assert_eq!(*value, (u as f32 / 16_777_216.0 - 0.5) * (12f32.sqrt() * 0.02));
        }
        let short = fill(&[100, 999], key, 0.02, DType::BF16, &Device::Cpu)?.to_dtype(DType::F32)?;
        let rounded = filled.to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
        assert_eq!(short.flatten_all()?.to_vec1::<f32>()?, rounded.to_vec1::<f32>()?);
        Ok(())
    }

    #[test]
    fn normals_have_mean_zero_and_variance_one() {
        let values = Key::new(7, "test", &[1, 2]).normals(200_000);
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64;
        let variance =
            values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / values.len() as f64;
        // The standard errors are 0.0022 and 0.0032; five of them.
        assert!(mean.abs() < 0.012 && (variance - 1.0).abs() < 0.016, "mean {mean}, variance {variance}");
    }
}
