//! Markers in a device's queue of work, to measure the time between two of them.
//!
//! Work is queued on a GPU long before it runs, so a clock on the host cannot time a single operation. A mark is queued on
//! the device instead (a CUDA event) and costs next to nothing.

use std::time::Instant;

use crate::Device;
use crate::Result;

/// A point in a device's queue, reached when everything queued before it has run.
#[derive(Debug, Clone)]
pub struct Mark {
    at: Instant,
    #[cfg(feature = "cuda")]
    gpu: Option<crate::cuda::clock::Mark>,
}

impl Mark {
    /// Queues a mark on `device`; does not wait.
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
