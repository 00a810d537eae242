//! Points in the work of a device, to measure what lies between two of them.
//!
//! A GPU is asked for work long before it does it, so a clock on the host says nothing about a single operation. A mark
//! goes into the device's own queue instead, and costs next to nothing.

use std::time::Instant;

use crate::Device;
use crate::Result;

/// A point in the work of a device: passed when everything that was asked of the device before it is done.
#[derive(Debug, Clone)]
pub struct Mark {
    at: Instant,
    #[cfg(feature = "cuda")]
    gpu: Option<crate::cuda::clock::Mark>,
}

impl Mark {
    /// Puts a mark behind everything that was asked of `device` so far; does not wait.
    ///
    /// # Errors
    /// When the device does not take it.
    pub fn now(device: &Device) -> Result<Self> {
        #[cfg(feature = "cuda")]
        let gpu = device.card().map(|card| card.timed_mark()).transpose()?;
        #[cfg(not(feature = "cuda"))]
        let _ = device;
        Ok(Self {
            at: Instant::now(),
            #[cfg(feature = "cuda")]
            gpu,
        })
    }

    /// Seconds of the device from `earlier`, a mark of the same device, to this one. Waits until both are passed.
    ///
    /// # Errors
    /// Marks of two devices, and work in between that failed.
    pub fn seconds_since(&self, earlier: &Self) -> Result<f64> {
        #[cfg(feature = "cuda")]
        if let (Some(earlier), Some(later)) = (&earlier.gpu, &self.gpu) {
            return crate::cuda::clock::seconds(earlier, later);
        }
        Ok(self.at.saturating_duration_since(earlier.at).as_secs_f64())
    }
}
