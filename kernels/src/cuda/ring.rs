//! A ring of pinned buffers, and the thread that copies filled ones to one GPU.
//!
//! Readers fill buffers on all cores and never call the driver: its locks, and the events that a reader would sleep on, cost more
//! than the copies. One thread starts every copy and sees them end, in order.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use candle_core::Result;
use cudarc::driver::result as driver;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError};

use super::pinned::{Pinned, Run};
use super::told;
use crate::fill::PIECE;

/// Buffers of the ring, [`PIECE`] bytes each: one for each of 16 readers, and as many again on their way to the card. What is queued
/// keeps the link busy for a millisecond while readers wake up.
const BUFFERS: usize = 32;
/// How long the copying thread waits for a filled buffer before it looks whether a copy has ended: less than a copy takes.
const POLL: Duration = Duration::from_micros(20);

/// The ring, and the thread that copies out of it.
pub(super) struct Ring {
    /// The stream of the copies.
    pub stream: Arc<CudaStream>,
    idle: Arc<Idle>,
    /// To the thread; `None` only while the ring is dropped.
    filled: Option<Sender<Filled>>,
    copying: Option<JoinHandle<()>>,
    _pinned: Pinned,
}

/// The buffers that nobody fills or copies.
#[derive(Default)]
struct Idle {
    buffers: Mutex<VecDeque<Buffer>>,
    /// Notified when a buffer was given back.
    given: Condvar,
}

/// A pinned buffer of [`PIECE`] bytes.
struct Buffer {
    run: Run,
    /// The end of the last copy out of it.
    copied: CudaEvent,
}

/// A buffer whose bytes go to the card.
struct Filled {
    buffer: Buffer,
    to: u64,
    count: usize,
    started: Arc<Started>,
}

/// A buffer that is being filled; given back when dropped.
pub(super) struct Taken<'a> {
    ring: &'a Ring,
    buffer: Option<Buffer>,
}

/// Counts the copies of one tensor that have been started.
#[derive(Default)]
pub(super) struct Started {
    state: Mutex<(usize, Option<DriverError>)>,
    more: Condvar,
}

impl Started {
    fn add(&self, copy: std::result::Result<(), DriverError>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 += 1;
        state.1 = state.1.or(copy.err());
        self.more.notify_all();
    }

    /// Waits until `count` copies have been started.
    pub fn wait_for(&self, count: usize) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.0 < count {
            state = self.more.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        told(state.1.map_or(Ok(()), Err))
    }
}

impl Idle {
    fn give(&self, buffer: Buffer) {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner).push_back(buffer);
        self.given.notify_one();
    }
}

impl Ring {
    pub fn new(context: &Arc<CudaContext>) -> Result<Self> {
        let stream = told(context.new_stream())?;
        let pinned = Pinned::new(context.clone());
        pinned.reserve(&[(BUFFERS * PIECE) as u64], &|_| true)?;
        let idle = Arc::new(Idle::default());
        for _ in 0..BUFFERS {
            let run = pinned.take(PIECE as u64, &stream)?;
            idle.give(Buffer { run, copied: told(context.new_event(None))? });
        }
        let (filled, receiver) = channel();
        let copier = Copier {
            context: context.clone(),
            stream: stream.clone(),
            idle: idle.clone(),
            filled: receiver,
            under_way: VecDeque::new(),
        };
        let copying = std::thread::Builder::new().name("weights to GPU".to_owned());
        let copying = copying.spawn(move || copier.run()).map_err(candle_core::Error::wrap)?;
        Ok(Self { stream, idle, filled: Some(filled), copying: Some(copying), _pinned: pinned })
    }

    /// The next buffer; waits for one that was copied.
    pub fn take(&self) -> Taken<'_> {
        let mut idle = self.idle.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match idle.pop_front() {
                Some(buffer) => return Taken { ring: self, buffer: Some(buffer) },
                None => idle = self.idle.given.wait(idle).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.filled = None;
        // It ends once every copy has, so that the memory may go. A panic of it has been reported where it happened.
        let _ = self.copying.take().map(JoinHandle::join);
    }
}

impl Taken<'_> {
    /// Its first `count` bytes, of [`PIECE`] at most.
    pub fn bytes(&mut self, count: usize) -> &mut [u8] {
        let Some(buffer) = &self.buffer else { return &mut [] };
        // SAFETY: the run has PIECE bytes of the ring's pinned memory, written once at least when it was pinned. Nobody else has this
        // buffer, and the last copy out of it has ended: the copying thread gave it back after that.
        unsafe { std::slice::from_raw_parts_mut(buffer.run.address as *mut u8, count.min(PIECE)) }
    }

    /// Has its first `count` bytes copied to the address `to` of the card, which `started` will tell. There must be room, in a tensor
    /// that lives until the card's stream has waited for the ring's.
    pub fn copy(mut self, to: u64, count: usize, started: &Arc<Started>) -> Result<()> {
        let (Some(buffer), Some(filled)) = (self.buffer.take(), &self.ring.filled) else {
            candle_core::bail!("a buffer of the ring was copied twice");
        };
        let sent = filled.send(Filled { buffer, to, count, started: started.clone() });
        sent.map_err(|_| candle_core::Error::msg("the thread that copies weights to the GPU has ended"))
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.ring.idle.give(buffer);
        }
    }
}

/// What the copying thread works with.
struct Copier {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    idle: Arc<Idle>,
    filled: Receiver<Filled>,
    /// Buffers whose copies have been started, in that order.
    under_way: VecDeque<Buffer>,
}

impl Copier {
    fn run(mut self) {
        loop {
            let next = match self.under_way.is_empty() {
                true => self.filled.recv().map_err(|_| RecvTimeoutError::Disconnected),
                false => self.filled.recv_timeout(POLL),
            };
            match next {
                Ok(filled) => self.start(filled),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.give_back();
        }
        // The pinned memory goes next. A GPU that failed copies nothing any more.
        let _ = self.stream.synchronize();
    }

    fn start(&mut self, Filled { buffer, to, count, started }: Filled) {
        let copy = || {
            self.context.bind_to_thread()?;
            // SAFETY: the buffer has `count` bytes and is not written before `copied`; the caller of `Taken::copy` promised room at `to`.
            unsafe {
                let host = std::slice::from_raw_parts(buffer.run.address as *const u8, count.min(PIECE));
                driver::memcpy_htod_async(to, host, self.stream.cu_stream())
            }?;
            buffer.copied.record(&self.stream)
        };
        started.add(copy());
        self.under_way.push_back(buffer);
    }

    /// Gives back the buffers whose copies have ended. Those of a GPU that failed too: whoever uses the tensor is told.
    fn give_back(&mut self) {
        while let Some(buffer) = self.under_way.pop_front() {
            match buffer.copied.try_is_complete() {
                Ok(false) => return self.under_way.push_front(buffer),
                Ok(true) | Err(_) => self.idle.give(buffer),
            }
        }
    }
}
