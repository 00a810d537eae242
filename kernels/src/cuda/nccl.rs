//! NCCL, loaded by name at run time: one GPU needs none of it, and cudarc's binding would be linked with the way of linking that
//! candle has chosen, so that programs without NCCL would not start.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::Arc;

use candle_core::{DType, Result};
use cudarc::driver::sys::CUstream;
use libloading::{Library, Symbol};

use super::Card;
use super::tensor::pointer;
use crate::Tensor;
use crate::collective::ID_BYTES;
use crate::library;

/// The library's file.
const FILE: &str = "libnccl.so.2";
/// `ncclFloat32` of nccl.h.
const FLOAT32: c_int = 7;

/// `ncclUniqueId` of nccl.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct Id([u8; ID_BYTES]);

/// A result with NCCL's words.
type Told<T> = std::result::Result<T, String>;

/// `ncclComm_t` of nccl.h.
type Comm = *mut c_void;

/// The functions that are used, with the types of nccl.h.
struct Nccl {
    // SAFETY: a type alone does nothing.
    get_unique_id: unsafe extern "C" fn(*mut Id) -> c_int,
    // SAFETY: a type alone does nothing.
    init_rank: unsafe extern "C" fn(*mut Comm, c_int, Id, c_int) -> c_int,
    // SAFETY: a type alone does nothing.
    abort: unsafe extern "C" fn(Comm) -> c_int,
    // SAFETY: a type alone does nothing.
    send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Comm, CUstream) -> c_int,
    // SAFETY: a type alone does nothing.
    receive: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Comm, CUstream) -> c_int,
    // SAFETY: a type alone does nothing.
    all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, CUstream) -> c_int,
    // SAFETY: a type alone does nothing.
    group_start: unsafe extern "C" fn() -> c_int,
    // SAFETY: a type alone does nothing.
    group_end: unsafe extern "C" fn() -> c_int,
    // SAFETY: a type alone does nothing.
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
}

impl Nccl {
    /// The functions of the library, which is never unloaded: it keeps threads of its own.
    fn load() -> Told<Self> {
        let library = library::open(FILE).map_err(|why| format!("{FILE} cannot be loaded ({why})"))?;
        fn named<T: Copy>(library: &'static Library, name: &str) -> Told<T> {
            // SAFETY: every use below has the type that nccl.h declares for the name.
            let symbol: std::result::Result<Symbol<T>, _> = unsafe { library.get(name.as_bytes()) };
            symbol.map(|symbol| *symbol).map_err(|why| format!("{FILE} has no {name} ({why})"))
        }
        Ok(Self {
            get_unique_id: named(library, "ncclGetUniqueId")?,
            init_rank: named(library, "ncclCommInitRank")?,
            abort: named(library, "ncclCommAbort")?,
            send: named(library, "ncclSend")?,
            receive: named(library, "ncclRecv")?,
            all_gather: named(library, "ncclAllGather")?,
            group_start: named(library, "ncclGroupStart")?,
            group_end: named(library, "ncclGroupEnd")?,
            error_string: named(library, "ncclGetErrorString")?,
        })
    }

    fn told(&self, what: &str, status: c_int) -> Told<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: it returns a constant text for every number.
        let text = unsafe { CStr::from_ptr((self.error_string)(status)) };
        let text = text.to_string_lossy();
        Err(format!("{what} failed: {text}; NCCL_DEBUG=INFO in the environment says more"))
    }
}

/// See [`crate::collective::new_id`].
pub(crate) fn new_id() -> Told<[u8; ID_BYTES]> {
    let nccl = Nccl::load()?;
    let mut id = Id([0; ID_BYTES]);
    // SAFETY: `id` has the size that nccl.h declares.
    nccl.told("ncclGetUniqueId", unsafe { (nccl.get_unique_id)(&mut id) })?;
    Ok(id.0)
}

/// A GPU's communicator.
pub(crate) struct Group {
    nccl: Nccl,
    card: Arc<Card>,
    comm: Comm,
    world: usize,
}

// SAFETY: NCCL lets one thread at a time use a communicator, whichever it is, and `Group` is not shared: it has no `Sync`.
unsafe impl Send for Group {}

impl Group {
    pub fn join(card: Arc<Card>, id: [u8; ID_BYTES], (rank, world): (usize, usize)) -> Told<Self> {
        let nccl = Nccl::load()?;
        card.context.bind_to_thread().map_err(|why| why.to_string())?;
        let mut comm: Comm = std::ptr::null_mut();
        // SAFETY: `comm` is written before it is read, the GPU is the current one of this thread.
        let status = unsafe { (nccl.init_rank)(&mut comm, world as c_int, Id(id), rank as c_int) };
        nccl.told("ncclCommInitRank", status)?;
        Ok(Self { nccl, card, comm, world })
    }

    /// See [`crate::collective::Collective::all_to_all`].
    pub fn all_to_all(&self, x: &Tensor) -> Result<Tensor> {
        let row = x.elem_count() / self.world;
        let got = self.begin(x, x.dims())?;
        let (from, to, bytes) = (pointer(x)?, pointer(&got)?, 4 * row as u64);
        let stream = self.card.stream.cu_stream();
        // SAFETY: it only marks the beginning of a group of calls.
        self.check("ncclGroupStart", unsafe { (self.nccl.group_start)() })?;
        for peer in 0..self.world {
            let (from, to) = (from + peer as u64 * bytes, to + peer as u64 * bytes);
            let (other, comm) = (peer as c_int, self.comm);
            let (from, to) = (from as *const c_void, to as *mut c_void);
            // SAFETY: both tensors have `world` rows of `row` numbers, and are freed in the order of the stream.
            let sent = unsafe { (self.nccl.send)(from, row, FLOAT32, other, comm, stream) };
            // SAFETY: as above.
            let received = unsafe { (self.nccl.receive)(to, row, FLOAT32, other, comm, stream) };
            self.check("ncclSend", sent)?;
            self.check("ncclRecv", received)?;
        }
        // SAFETY: it queues the calls since the beginning of the group.
        self.check("ncclGroupEnd", unsafe { (self.nccl.group_end)() })?;
        Ok(got)
    }

    /// See [`crate::collective::Collective::all_gather`].
    pub fn all_gather(&self, x: &Tensor) -> Result<Tensor> {
        let count = x.elem_count();
        let all = self.begin(x, &[self.world, count])?;
        let (from, to) = (pointer(x)? as *const c_void, pointer(&all)? as *mut c_void);
        let stream = self.card.stream.cu_stream();
        // SAFETY: `x` has `count` numbers, `all` as many for each rank, and both are freed in the order of the stream.
        let status = unsafe { (self.nccl.all_gather)(from, to, count, FLOAT32, self.comm, stream) };
        self.check("ncclAllGather", status)?;
        Ok(all)
    }

    /// Room of `shape` for what is received, with the GPU as this thread's current one.
    fn begin(&self, x: &Tensor, shape: &[usize]) -> Result<Tensor> {
        super::told(self.card.context.bind_to_thread())?;
        if !x.device().card().is_some_and(|card| Arc::ptr_eq(card, &self.card)) {
            candle_core::bail!("a tensor of another device is exchanged");
        }
        self.card.empty(shape, DType::F32)
    }

    fn check(&self, what: &str, status: c_int) -> Result<()> {
        self.nccl.told(what, status).map_err(|why| candle_core::Error::Msg(format!("NCCL: {why}")))
    }
}

impl Drop for Group {
    /// Gives the communicator up at once: when all went well nothing is queued on it, else its peers may never answer.
    fn drop(&mut self) {
        // SAFETY: the communicator is this one's own and is not used again.
        let _ = unsafe { (self.nccl.abort)(self.comm) };
    }
}
