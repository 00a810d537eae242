//! The pinned ring through which new tensors reach one GPU: see [`crate::fill`].

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use candle_core::{DType, Result};
use cudarc::driver::CudaContext;
use cudarc::driver::result as driver;
use rayon::prelude::*;

use super::pinned::Pinned;
use super::ring::{Ring, Started};
use super::tensor::pointer;
use super::{Card, told};
use crate::Tensor;
use crate::fill::{PIECE, foremost};

/// Bytes of a copy that measures the link.
const MEASURED: usize = 64 << 20;

/// The ring of one GPU: pinned when it is first used, and kept.
#[derive(Default)]
pub(crate) struct Upload {
    ring: OnceLock<Ring>,
    /// Held while the ring is being pinned.
    pinning: Mutex<()>,
}

/// Whether tensors of `dtype` can be filled in pieces.
pub(crate) fn takes(dtype: DType) -> bool {
    use DType::{BF16, F16, F32, F64, I64, U8, U32};
    matches!(dtype, BF16 | F16 | F32 | F64 | U8 | U32 | I64)
}

impl Upload {
    fn ring(&self, context: &Arc<CudaContext>) -> Result<&Ring> {
        let _one_at_a_time = self.pinning.lock().unwrap_or_else(PoisonError::into_inner);
        match self.ring.get() {
            Some(ring) => Ok(ring),
            None => {
                let ring = Ring::new(context)?;
                Ok(self.ring.get_or_init(|| ring))
            }
        }
    }
}

impl Card {
    /// See [`crate::fill::filled`].
    pub(crate) fn filled<E>(
        self: &Arc<Self>,
        shape: &[usize],
        dtype: DType,
        make: impl Fn(usize, &mut [u8]) -> std::result::Result<(), E> + Sync,
    ) -> std::result::Result<Tensor, E>
    where
        E: From<candle_core::Error> + Send,
    {
        let ring = self.upload.ring(&self.context)?;
        let bytes = shape.iter().product::<usize>() * dtype.size_in_bytes();
        let (x, to) = self.target(ring, shape, dtype)?;
        let (queued, started) = (AtomicUsize::new(0), Arc::new(Started::default()));
        let piece = |n: usize| -> std::result::Result<(), E> {
            let first = n * PIECE;
            let count = PIECE.min(bytes - first);
            let mut taken = ring.take();
            make(first, taken.bytes(count))?;
            taken.copy(to + first as u64, count, &started)?;
            queued.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        let made = match bytes.div_ceil(PIECE) {
            pieces @ (0 | 1) => (0..pieces).try_for_each(piece),
            pieces => foremost((0..pieces).into_par_iter().map(piece)),
        };
        // After a failure too: the tensor is freed in the order of the stream, and copies to it may be under way.
        let all_started = started.wait_for(queued.into_inner());
        let copied = told(ring.stream.record_event(None))?;
        told(self.stream.wait(&copied))?;
        made?;
        all_started?;
        Ok(x)
    }

    /// A new tensor for the copies of `ring`, and its address.
    fn target(self: &Arc<Self>, ring: &Ring, shape: &[usize], dtype: DType) -> Result<(Tensor, u64)> {
        told(self.context.bind_to_thread())?;
        let x = self.empty(shape, dtype)?;
        // The memory may be what earlier work of the GPU still uses.
        let allocated = told(self.stream.record_event(None))?;
        told(ring.stream.wait(&allocated))?;
        let address = pointer(&x)?;
        Ok((x, address))
    }

    /// See [`crate::fill::link_speed`].
    pub(crate) fn link_speed(self: &Arc<Self>, seconds: f64) -> Result<f64> {
        let stream = told(self.context.new_stream())?;
        let pinned = Pinned::new(self.context.clone());
        let run = pinned.take(MEASURED as u64, &stream)?;
        let x = self.empty(MEASURED, DType::U8)?;
        told(self.stream.synchronize())?;
        let to = pointer(&x)?;
        let copy = || {
            // SAFETY: the run and the tensor have so many bytes each, and both live until the stream is idle.
            told(unsafe {
                let host = std::slice::from_raw_parts(run.address as *const u8, MEASURED);
                driver::memcpy_htod_async(to, host, stream.cu_stream())
            })
        };
        copy()?;
        told(stream.synchronize())?;
        let (start, limit, mut copies) = (Instant::now(), Duration::from_secs_f64(seconds), 0_usize);
        while start.elapsed() < limit {
            (0..8).try_for_each(|_| copy())?;
            told(stream.synchronize())?;
            copies += 8;
        }
        let speed = (copies * MEASURED) as f64 / start.elapsed().as_secs_f64();
        pinned.give(&run, None);
        Ok(speed)
    }
}
