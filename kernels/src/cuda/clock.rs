//! Marks in a GPU's stream.

use std::sync::Arc;

use candle_core::Result;
use cudarc::driver::CudaEvent;
use cudarc::driver::sys::CUevent_flags;

use super::{Card, told};

/// An event that notes its time.
pub(crate) type Mark = Arc<CudaEvent>;

impl Card {
    /// A timing event, after everything queued so far.
    pub(crate) fn timed_mark(&self) -> Result<Mark> {
        told(self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))).map(Arc::new)
    }
}

/// Seconds between two marks of one GPU; waits for the later one.
pub(crate) fn seconds(earlier: &Mark, later: &Mark) -> Result<f64> {
    told(later.synchronize())?;
    Ok(f64::from(told(earlier.elapsed_ms(later))?) / 1e3)
}
