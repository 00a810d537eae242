//! Reading a number without waiting for what was queued behind it: a copy on a stream of its own, ordered by an event.

use std::sync::Arc;

use candle_core::{DType, Result};
use cudarc::driver::CudaEvent;
use cudarc::driver::result as driver;

use super::tensor::pointer;
use super::{Card, told};
use crate::Tensor;

/// A single f32 and the moment from which it is there.
pub(crate) struct Marked {
    gpu: Arc<Card>,
    x: Tensor,
    made: CudaEvent,
}

impl std::fmt::Debug for Marked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Marked(cuda:{})", self.gpu.context.ordinal())
    }
}

impl Marked {
    pub(crate) fn new(gpu: Arc<Card>, x: Tensor) -> Result<Self> {
        if x.elem_count() != 1 || x.dtype() != DType::F32 {
            candle_core::bail!("a reading is of one f32, not of {:?} of {:?}", x.shape(), x.dtype());
        }
        told(gpu.context.bind_to_thread())?;
        let made = told(gpu.stream.record_event(None))?;
        Ok(Self { gpu, x, made })
    }

    /// See [`crate::transfer::Reading::value`].
    pub(crate) fn value(self) -> Result<f32> {
        told(self.gpu.context.bind_to_thread())?;
        let aside = told(self.gpu.context.new_stream())?;
        told(aside.wait(&self.made))?;
        let mut value = [0f32];
        // SAFETY: `x` is one f32 that is there once `made` has passed, and lives until the copy is done: the call below waits
        // for it.
        told(unsafe { driver::memcpy_dtoh_async(&mut value, pointer(&self.x)?, aside.cu_stream()) })?;
        told(aside.synchronize())?;
        Ok(value[0])
    }
}
