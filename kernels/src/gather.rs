//! Putting a tensor together from runs of its tokens.

use crate::Result;
use crate::profile::{self, Class};
use candle_core::{DType, Device, Tensor};

/// A tensor [b, l, d] that is made run by run along its tokens; each token is put once.
#[derive(Debug)]
pub struct Tokens {
    whole: Tensor,
}

impl Tokens {
    /// Room for `shape` [b, l, d].
    pub fn room(shape: (usize, usize, usize), dtype: DType, device: &Device) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = crate::cuda::copies::gpu_of(device)? {
            return Ok(Self { whole: gpu.empty(shape, dtype)? });
        }
        Ok(Self { whole: Tensor::zeros(shape, dtype, device)? })
    }

    /// Puts `part` [b, n, d] in place of the tokens from `start` on.
    pub fn put(&self, part: &Tensor, start: usize) -> Result<()> {
        let _noted = profile::scope(Class::Elementwise, part.device());
        self.whole.slice_set(part, 1, start)
    }

    /// The tensor, once all of its tokens were put.
    pub fn done(self) -> Tensor {
        self.whole
    }
}
