//! A number that the host reads later than the device makes it.

use crate::{Result, Tensor};

/// A number of a device, to be read when it is needed: work that was queued behind it is not waited for.
#[derive(Debug)]
pub struct Reading(From);

#[derive(Debug)]
enum From {
    Host(f32),
    #[cfg(feature = "cuda")]
    Gpu(crate::cuda::reading::Marked),
}

impl Reading {
    /// Of `x`, a single f32.
    ///
    /// # Errors
    /// A tensor of more than one number, or of another dtype.
    pub fn of(x: Tensor) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if let Some(card) = x.device().card() {
            return Ok(Self(From::Gpu(crate::cuda::reading::Marked::new(card.clone(), x)?)));
        }
        Ok(Self(From::Host(x.to_scalar()?)))
    }

    /// The number; waits until the device has made it.
    ///
    /// # Errors
    /// When the device failed.
    pub fn value(self) -> Result<f32> {
        match self.0 {
            From::Host(value) => Ok(value),
            #[cfg(feature = "cuda")]
            From::Gpu(marked) => marked.value(),
        }
    }
}
