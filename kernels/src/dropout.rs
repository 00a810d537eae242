//! Dropout whose mask is a function of a key, so that a replay and a resumed run drop the same elements.

use crate::Result;
use crate::gpu::{File, Gpu, Launch, fits, suffix};
use crate::profile::{self, Class};
use crate::random::Key;
use crate::{DType, Device, Tensor};

/// Multiplies `x` [b, l, d] by a mask of 0 and 1/(1-p), where `p` is the fraction that is dropped.
///
/// `keys` holds one key for each sample, so that a sample's mask does not depend on its batch;
/// `first_token` is the index of the first token of `x` in the sample, for callers that work in chunks.
/// The backward is the same call on `dy`.
pub fn apply(x: &Tensor, p: f64, keys: &[Key], first_token: usize) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x.device());
    let (batch, tokens, width) = x.dims3()?;
    if keys.len() != batch {
        candle_core::bail!("dropout has {} keys for a batch of {batch}", keys.len());
    }
    on_gpu!(x, |gpu| gpu.dropout(x, p, keys, first_token)?);
    if x.is_shadow() {
        let mask = Tensor::shadow((batch, tokens, width), DType::F32, x.device());
        return x * mask.to_dtype(x.dtype())?;
    }
    let keep = (1.0 / (1.0 - p)) as f32;
    let mut mask = Vec::with_capacity(batch * tokens * width);
    for key in keys {
        let first = (first_token * width) as u64;
        mask.extend(
            (0..(tokens * width) as u64).map(|i| if key.uniform(first + i) < p { 0.0 } else { keep }),
        );
    }
    let mask = Tensor::from_vec(mask, (batch, tokens, width), &Device::Cpu)?;
    x * mask.to_device(x.device())?.to_dtype(x.dtype())?
}

impl Gpu {
    fn dropout(&self, x: &Tensor, p: f64, keys: &[Key], first_token: usize) -> Result<Option<Tensor>> {
        let (_, tokens, width) = x.dims3()?;
        let Some(suffix) = suffix(x.dtype()).filter(|_| width % 4 == 0) else { return Ok(None) };
        if !fits(&[x])? {
            return Ok(None);
        }
        let y = self.empty(x.shape(), x.dtype())?;
        let quads = tokens * width / 4;
        // A word w is dropped where (w + 0.5) / 2^32 < p, which is w < p 2^32 - 0.5.
        let threshold = (p * 4_294_967_296.0 - 0.5).ceil().max(0.0) as usize;
        for (sample, key) in keys.iter().enumerate() {
            let (from, to) = (x.narrow(0, sample, 1)?, y.narrow(0, sample, 1)?);
            let (seed, stream) = key.words();
            let launch =
                Launch::new(self, File::Random, &format!("dropout_{suffix}"))?.tensor(&from)?.tensor(&to)?;
            let launch = launch.size(quads).size(first_token * width / 4).address(stream).address(seed);
            launch.size(threshold).float(1.0 / (1.0 - p)).each(quads)?;
        }
        Ok(Some(y))
    }
}
