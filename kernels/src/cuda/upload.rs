//! The pinned ring through which new tensors reach one GPU: see [`crate::fill`].

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use candle_core::{DType, Error, Result};
use cudarc::driver::result as driver;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, sys};
use rayon::prelude::*;

use super::pinned::{Pinned, Run};
use super::tensor::pointer;
use super::{Card, told};
use crate::Tensor;
use crate::fill::{PIECE, foremost};

/// Buffers of the ring, [`PIECE`] bytes each: one for each of 16 readers, and as many again on their way to the card. What is queued
/// keeps the link busy for a millisecond while the next tensor is allocated.
const BUFFERS: usize = 32;
/// Bytes of a copy that measures the link.
const MEASURED: usize = 64 << 20;

/// The ring of one GPU: pinned when it is first used, and kept.
#[derive(Default)]
pub(crate) struct Upload {
    ring: OnceLock<Ring>,
    /// Held while the ring is being pinned.
    pinning: Mutex<()>,
}

struct Ring {
    context: Arc<CudaContext>,
    /// The stream of the copies.
    stream: Arc<CudaStream>,
    /// The buffers that nobody fills, the one whose copy began first at the front.
    idle: Mutex<VecDeque<Buffer>>,
    /// Notified when a buffer was given back.
    given: Condvar,
    _pinned: Pinned,
}

/// A pinned buffer of [`PIECE`] bytes.
struct Buffer {
    run: Run,
    /// The end of the last copy out of it.
    copied: CudaEvent,
}

/// A buffer that is being filled; given back when dropped.
struct Taken<'a> {
    ring: &'a Ring,
    buffer: Option<Buffer>,
}

/// Where the pieces of a tensor are copied to: known once it is allocated, while the first of them are made.
#[derive(Default)]
struct Target {
    /// The address; `None` inside where there is no memory.
    address: Mutex<Option<Option<u64>>>,
    known: Condvar,
}

impl Target {
    fn set(&self, address: Option<u64>) {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner) = Some(address);
        self.known.notify_all();
    }

    /// Waits for the address.
    fn address(&self) -> Result<u64> {
        let mut address = self.address.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match *address {
                Some(Some(known)) => return Ok(known),
                Some(None) => candle_core::bail!("there is no memory for a tensor that is being read"),
                None => address = self.known.wait(address).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
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
        E: From<Error> + Send,
    {
        let ring = self.upload.ring(&self.context)?;
        let (target, bytes) = (Target::default(), shape.iter().product::<usize>() * dtype.size_in_bytes());
        let piece = |n: usize| -> std::result::Result<(), E> {
            let first = n * PIECE;
            let count = PIECE.min(bytes - first);
            let mut buffer = ring.take()?;
            make(first, buffer.bytes(count)?)?;
            Ok(buffer.copy(target.address()? + first as u64, count)?)
        };
        let pieces = bytes.div_ceil(PIECE);
        let mut made = Ok(());
        let x = match pieces {
            0 | 1 => {
                let x = self.target(ring, shape, dtype, &target);
                made = (0..pieces).try_for_each(piece);
                x
            }
            // The first pieces are made while the memory is mapped, which takes as long.
            _ => rayon::in_place_scope(|scope| {
                scope.spawn(|_| made = foremost((0..pieces).into_par_iter().map(piece)));
                self.target(ring, shape, dtype, &target)
            }),
        };
        // After a failure too: the tensor is freed in the order of the stream, and copies to it may be under way.
        let copied = told(ring.stream.record_event(None))?;
        told(self.stream.wait(&copied))?;
        // Without memory no piece was copied: that is the error to tell.
        let x = x?;
        made.map(|()| x)
    }

    /// A new tensor for the copies of `ring`, and its address for those that fill it.
    fn target(
        self: &Arc<Self>,
        ring: &Ring,
        shape: &[usize],
        dtype: DType,
        target: &Target,
    ) -> Result<Tensor> {
        let made = || {
            told(self.context.bind_to_thread())?;
            let x = self.empty(shape, dtype)?;
            // The memory may be what earlier work of the GPU still uses.
            let allocated = told(self.stream.record_event(None))?;
            told(ring.stream.wait(&allocated))?;
            let address = pointer(&x)?;
            Ok((x, address))
        };
        let made = made();
        target.set(made.as_ref().ok().map(|(_, address)| *address));
        made.map(|(x, _)| x)
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

impl Ring {
    fn new(context: &Arc<CudaContext>) -> Result<Self> {
        let stream = told(context.new_stream())?;
        let pinned = Pinned::new(context.clone());
        pinned.reserve(&[(BUFFERS * PIECE) as u64], &|_| true)?;
        let buffer = |_| {
            let run = pinned.take(PIECE as u64, &stream)?;
            // Readers that wait for a copy sleep, and leave their core to those that read.
            let copied = told(context.new_event(Some(sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC)))?;
            Ok(Buffer { run, copied })
        };
        let idle = (0..BUFFERS).map(buffer).collect::<Result<_>>()?;
        let (idle, given) = (Mutex::new(idle), Condvar::new());
        Ok(Self { context: context.clone(), stream, idle, given, _pinned: pinned })
    }

    /// The next buffer, once what was in it is on the card.
    fn take(&self) -> Result<Taken<'_>> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let buffer = loop {
            match idle.pop_front() {
                Some(buffer) => break buffer,
                None => idle = self.given.wait(idle).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(idle);
        let taken = Taken { ring: self, buffer: Some(buffer) };
        told(taken.buffer()?.copied.synchronize())?;
        Ok(taken)
    }
}

impl Taken<'_> {
    fn buffer(&self) -> Result<&Buffer> {
        match &self.buffer {
            Some(buffer) => Ok(buffer),
            None => candle_core::bail!("a buffer of the ring was given back twice"),
        }
    }

    /// Its first `count` bytes, of [`PIECE`] at most.
    fn bytes(&mut self, count: usize) -> Result<&mut [u8]> {
        let address = self.buffer()?.run.address;
        // SAFETY: the run has PIECE bytes of the ring's pinned memory, written once at least when it was pinned. Nobody else has this
        // buffer, and the last copy out of it has ended.
        Ok(unsafe { std::slice::from_raw_parts_mut(address as *mut u8, count.min(PIECE)) })
    }

    /// Starts to copy its first `count` bytes to the address `to` of the card.
    fn copy(&self, to: u64, count: usize) -> Result<()> {
        let (ring, buffer) = (self.ring, self.buffer()?);
        told(ring.context.bind_to_thread())?;
        // SAFETY: `to` has room for `count` bytes in a tensor that lives until the card's stream has waited for this one; the buffer
        // is not written before `copied`.
        told(unsafe {
            let host = std::slice::from_raw_parts(buffer.run.address as *const u8, count.min(PIECE));
            driver::memcpy_htod_async(to, host, ring.stream.cu_stream())
        })?;
        told(buffer.copied.record(&ring.stream))
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.ring.idle.lock().unwrap_or_else(PoisonError::into_inner).push_back(buffer);
            self.ring.given.notify_one();
        }
    }
}
