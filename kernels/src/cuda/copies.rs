//! Copies between GPUs and to pinned host memory, on streams of their own, ordered by events.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Result, Shape};
use cudarc::driver::result as driver;
use cudarc::driver::{CudaEvent, CudaStream, sys};

use super::pinned::{Pinned, Run};
use super::tensor::pointer;
use super::{Card, told};
use crate::Tensor;
use crate::transfer::route::Route;

fn bytes_of(x: &Tensor) -> usize {
    x.elem_count() * x.dtype().size_in_bytes()
}

/// Pinned host memory of one GPU: see [`crate::transfer::HostStore`].
pub(crate) struct Store {
    gpu: Arc<Card>,
    out: Arc<CudaStream>,
    back: Arc<CudaStream>,
    pinned: Pinned,
    /// Sources of copies to host memory that are under way.
    leaving: Mutex<Vec<(CudaEvent, Tensor)>>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store(cuda:{})", self.gpu.context.ordinal())
    }
}

/// A tensor in pinned host memory, or being copied there or back.
pub(crate) struct Parked {
    store: Arc<Store>,
    run: Option<Run>,
    arrived: Arc<CudaEvent>,
    shape: Shape,
    dtype: DType,
    returning: Option<(Tensor, CudaEvent)>,
}

impl Store {
    pub(crate) fn new(gpu: Arc<Card>) -> Result<Arc<Self>> {
        let (out, back) = (told(gpu.context.new_stream())?, told(gpu.context.new_stream())?);
        let pinned = Pinned::new(gpu.context.clone());
        Ok(Arc::new(Self { gpu, out, back, pinned, leaving: Mutex::default() }))
    }

    /// The pinned memory, to be filled ahead, limited and measured.
    pub(crate) fn pinned(&self) -> &Pinned {
        &self.pinned
    }

    /// See [`crate::transfer::HostStore::park`].
    pub(crate) fn park(self: &Arc<Self>, x: Tensor) -> Result<Parked> {
        let (x, bytes) = (x.contiguous()?, bytes_of(&x));
        let run = self.pinned.take(bytes as u64, &self.out)?;
        told(self.gpu.context.bind_to_thread())?;
        let made = told(self.gpu.stream.record_event(None))?;
        told(self.out.wait(&made))?;
        // SAFETY: the run has `bytes` and is ours until it is freed; the source lives in `leaving` until
        // the stream that frees it has waited for the copy.
        told(unsafe {
            let host = std::slice::from_raw_parts_mut(run.address as *mut u8, bytes);
            driver::memcpy_dtoh_async(host, pointer(&x)?, self.out.cu_stream())
        })?;
        let arrived = Arc::new(told(self.out.record_event(None))?);
        let (shape, dtype) = (x.shape().clone(), x.dtype());
        let gone = told(self.out.record_event(None))?;
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner).push((gone, x));
        Ok(Parked { store: self.clone(), run: Some(run), arrived, shape, dtype, returning: None })
    }

    /// Frees the sources that are being copied out; the stream waits for their copies. See
    /// [`crate::transfer::HostStore::next_group`].
    pub(crate) fn next_group(&self) -> Result<()> {
        let mut leaving = self.leaving.lock().unwrap_or_else(PoisonError::into_inner);
        leaving.drain(..).try_for_each(|(gone, _tensor)| told(self.gpu.stream.wait(&gone)))
    }
}

impl Store {
    /// How many tensors that were parked still take device memory.
    fn leaving(&self) -> usize {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

impl Parked {
    /// See [`crate::transfer::Parked::prefetch`].
    pub(crate) fn prefetch(&mut self) -> Result<()> {
        if self.returning.is_none() {
            self.store.next_group()?;
            let store = self.store.clone();
            self.returning = Some(self.copy_to(&store.gpu, &store.back)?);
        }
        Ok(())
    }

    /// See [`crate::transfer::Parked::take`].
    pub(crate) fn take(mut self) -> Result<Tensor> {
        self.prefetch()?;
        let Some((x, done)) = self.returning.take() else {
            candle_core::bail!("a parked tensor was not copied back");
        };
        told(self.store.gpu.stream.wait(&done))?;
        self.free_after(done);
        Ok(x)
    }

    /// See [`crate::transfer::Parked::into_bytes`].
    pub(crate) fn into_bytes(mut self) -> Result<Vec<u8>> {
        if self.dtype != DType::U8 {
            candle_core::bail!("bytes were asked of a parked tensor of {:?}", self.dtype);
        }
        let Some(run) = self.run.take() else { candle_core::bail!("a parked tensor was taken twice") };
        told(self.arrived.synchronize())?;
        // SAFETY: the run has the tensor's bytes, which have arrived, and nothing else has it before it is given back.
        let bytes = unsafe { std::slice::from_raw_parts(run.address as *const u8, self.shape.elem_count()) };
        let bytes = bytes.to_vec();
        self.store.pinned.give(&run, None);
        Ok(bytes)
    }

    /// The tensor on another GPU, in the order of that GPU's own stream.
    pub(crate) fn take_to(mut self, gpu: &Arc<Card>) -> Result<Tensor> {
        let (x, done) = self.copy_to(gpu, &gpu.stream.clone())?;
        self.free_after(done);
        Ok(x)
    }

    fn copy_to(&self, gpu: &Arc<Card>, stream: &Arc<CudaStream>) -> Result<(Tensor, CudaEvent)> {
        let Some(run) = &self.run else { candle_core::bail!("a parked tensor was taken twice") };
        told(gpu.context.bind_to_thread())?;
        let x = gpu.empty(self.shape.clone(), self.dtype)?;
        let bytes = bytes_of(&x);
        let allocated = told(gpu.stream.record_event(None))?;
        told(stream.wait(&allocated))?;
        told(stream.wait(&self.arrived))?;
        // SAFETY: the run holds the tensor once `arrived` has passed; both ends live until `done`.
        told(unsafe {
            let host = std::slice::from_raw_parts(run.address as *const u8, bytes);
            driver::memcpy_htod_async(pointer(&x)?, host, stream.cu_stream())
        })?;
        Ok((x, told(stream.record_event(None))?))
    }

    fn free_after(&mut self, done: CudaEvent) {
        if let Some(run) = self.run.take() {
            self.store.pinned.give(&run, Some(done));
        }
    }
}

impl Drop for Parked {
    /// Only where a pass ended early: the copies end first, then the memory may go.
    fn drop(&mut self) {
        if let Some((_, done)) = &self.returning {
            self.store.gpu.context.record_err(done.synchronize());
        }
        if let Some(run) = self.run.take() {
            self.store.gpu.context.record_err(self.arrived.synchronize());
            self.store.pinned.give(&run, None);
        }
    }
}

/// Copies of parked tensors to one GPU, on a stream of their own: see [`crate::transfer::Fetcher`].
pub(crate) struct Fetcher {
    gpu: Arc<Card>,
    stream: Arc<CudaStream>,
}

/// A copy of a parked tensor that is under way.
pub(crate) struct Fetched {
    gpu: Arc<Card>,
    /// There until it is taken.
    x: Option<Tensor>,
    done: CudaEvent,
}

impl Fetcher {
    pub(crate) fn new(gpu: Arc<Card>) -> Result<Self> {
        let stream = told(gpu.context.new_stream())?;
        Ok(Self { gpu, stream })
    }

    /// See [`crate::transfer::Fetcher::start`].
    pub(crate) fn start(&self, parked: &Parked) -> Result<Fetched> {
        let (x, done) = parked.copy_to(&self.gpu, &self.stream)?;
        Ok(Fetched { gpu: self.gpu.clone(), x: Some(x), done })
    }
}

impl Fetched {
    /// See [`crate::transfer::Arriving::take`].
    pub(crate) fn take(mut self) -> Result<Tensor> {
        told(self.gpu.stream.wait(&self.done))?;
        match self.x.take() {
            Some(x) => Ok(x),
            None => candle_core::bail!("a copy was taken twice"),
        }
    }
}

impl Drop for Fetched {
    /// The memory of a copy that nobody took is freed in the order of the GPU's stream, after the copy.
    fn drop(&mut self) {
        if self.x.is_some() {
            self.gpu.context.record_err(self.gpu.stream.wait(&self.done));
        }
    }
}

impl std::fmt::Debug for Fetcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Fetcher(cuda:{})", self.gpu.context.ordinal())
    }
}

impl std::fmt::Debug for Fetched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Fetched")
    }
}

/// A link from one GPU to another: see [`crate::transfer::Link`].
pub(crate) enum Link {
    /// Directly from memory to memory.
    Peer { from: Arc<Card>, to: Arc<Card>, in_flight: Arc<Mutex<Vec<InFlight>>> },
    /// Through pinned host memory.
    Host { store: Arc<Store>, to: Arc<Card> },
}

/// A source whose copy is under way: the event is set once the receiver has queued the copy.
pub(crate) struct InFlight {
    copied: Option<CudaEvent>,
    _x: Tensor,
    ticket: u64,
}

/// A tensor between two GPUs.
pub(crate) enum Sent {
    Peer {
        x: Tensor,
        made: CudaEvent,
        ticket: u64,
        from: Arc<Card>,
        to: Arc<Card>,
        in_flight: Arc<Mutex<Vec<InFlight>>>,
    },
    Host {
        parked: Parked,
        to: Arc<Card>,
    },
}

impl Link {
    pub(crate) fn new(from: Arc<Card>, to: Arc<Card>, route: Route) -> Result<Self> {
        match route == Route::Auto && reach(&from, &to)? {
            true => Ok(Self::Peer { from, to, in_flight: Arc::default() }),
            false => Ok(Self::Host { store: Store::new(from)?, to }),
        }
    }

    pub(crate) fn is_peer(&self) -> bool {
        matches!(self, Self::Peer { .. })
    }

    /// See [`crate::transfer::Link::live`].
    pub(crate) fn live(&self) -> usize {
        match self {
            Self::Host { store, .. } => store.leaving(),
            Self::Peer { in_flight, .. } => in_flight.lock().unwrap_or_else(PoisonError::into_inner).len(),
        }
    }

    /// See [`crate::transfer::Link::settle`].
    pub(crate) fn settle(&self) -> Result<()> {
        match self {
            Self::Host { store, .. } => store.next_group(),
            Self::Peer { from, in_flight, .. } => {
                told(from.context.bind_to_thread())?;
                let mut waiting = in_flight.lock().unwrap_or_else(PoisonError::into_inner);
                // What was copied meanwhile may go, once this stream, which frees it, has waited for the copy.
                for before in waiting.extract_if(.., |source| source.copied.is_some()) {
                    if let Some(copied) = &before.copied {
                        told(from.stream.wait(copied))?;
                    }
                }
                Ok(())
            }
        }
    }

    pub(crate) fn send(&self, x: Tensor) -> Result<Sent> {
        let x = x.contiguous()?;
        match self {
            Self::Host { store, to } => Ok(Sent::Host { parked: store.park(x)?, to: to.clone() }),
            Self::Peer { from, to, in_flight } => {
                told(from.context.bind_to_thread())?;
                let made = told(from.stream.record_event(None))?;
                let mut waiting = in_flight.lock().unwrap_or_else(PoisonError::into_inner);
                let ticket = waiting.last().map_or(0, |last| last.ticket + 1);
                waiting.push(InFlight { copied: None, _x: x.clone(), ticket });
                drop(waiting);
                let (from, to, in_flight) = (from.clone(), to.clone(), in_flight.clone());
                Ok(Sent::Peer { x, made, ticket, from, to, in_flight })
            }
        }
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Link({})", if self.is_peer() { "peer" } else { "host" })
    }
}

impl std::fmt::Debug for Sent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sent")
    }
}

impl std::fmt::Debug for Parked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Parked({:?})", self.shape)
    }
}

impl Sent {
    pub(crate) fn receive(self) -> Result<Tensor> {
        match self {
            Self::Host { parked, to } => parked.take_to(&to),
            Self::Peer { x, made, ticket, from, to, in_flight } => {
                told(to.context.bind_to_thread())?;
                let y = to.empty(x.shape().clone(), x.dtype())?;
                told(to.stream.wait(&made))?;
                // SAFETY: the source is kept until its stream has waited for `copied`; the copy is after the
                // allocation on the stream of the target.
                told(unsafe {
                    driver::memcpy_peer_async(
                        to.context.cu_ctx(),
                        pointer(&y)?,
                        from.context.cu_ctx(),
                        pointer(&x)?,
                        bytes_of(&x),
                        to.stream.cu_stream(),
                    )
                })?;
                let copied = told(to.stream.record_event(None))?;
                let mut waiting = in_flight.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(source) = waiting.iter_mut().find(|source| source.ticket == ticket) {
                    source.copied = Some(copied);
                }
                Ok(y)
            }
        }
    }
}

/// Whether `to` can read the memory of `from`; where it can, lets it.
fn reach(from: &Card, to: &Card) -> Result<bool> {
    let (here, there) = (from.context.cu_device(), to.context.cu_device());
    let mut can = 0;
    // SAFETY: both devices are open; the answer is an int.
    told(unsafe { sys::cuDeviceCanAccessPeer(&mut can, there, here) }.result())?;
    if can == 0 {
        return Ok(false);
    }
    told(to.context.bind_to_thread())?;
    // SAFETY: the contexts live as long as the GPUs. It fails only where access was given before.
    let _ = unsafe { sys::cuCtxEnablePeerAccess(from.context.cu_ctx(), 0) };
    // The pool's memory is opened on its own.
    // SAFETY: all zero is valid for the description, whose fields are set below; ordinal as in `pool::properties`.
    let granted = unsafe {
        let mut access: sys::CUmemAccessDesc = std::mem::zeroed();
        access.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
        std::ptr::from_mut(&mut access.location).cast::<i32>().add(1).write(to.context.ordinal() as i32);
        access.flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        sys::cuMemPoolSetAccess(from.pool.0, &access, 1).result()
    };
    Ok(granted.is_ok())
}
