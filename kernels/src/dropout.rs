//! Dropout whose mask is a function of a key, so that a replay and a resumed run drop the same elements.

use crate::Result;
use crate::profile::{self, Class};
use crate::random::Key;
use candle_core::{Device, Tensor};

/// Multiplies `x` [b, l, d] by a mask of 0 and 1/(1-p), where `p` is the share that is dropped.
///
/// `keys` holds one key for each sample, so that a sample's mask does not depend on its batch;
/// `first_token` is the place of the first token of `x` in the sample, for callers that go in chunks.
/// The backward is the same call on `dy`.
pub fn apply(x: &Tensor, p: f64, keys: &[Key], first_token: usize) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x.device());
    let (batch, tokens, width) = x.dims3()?;
    if keys.len() != batch {
        candle_core::bail!("dropout has {} keys for a batch of {batch}", keys.len());
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
