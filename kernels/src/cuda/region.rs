//! The memory of large tensors on one GPU.
//!
//! The driver's own pool leaves holes that grow with the tensors: 3 of 24 GiB for a 720p clip, and a step that fits by its
//! bytes fails. Here physical memory comes in chunks that are mapped to addresses one by one. A tensor that fits into no hole
//! gets fresh chunks; where the card, or the limit, has no more, free chunks out of the holes are mapped a second time, in
//! one piece. So memory ends where bytes end, up to two chunks a hole, and nothing waits: a chunk may have two addresses,
//! as what still runs under the old one ends before what is launched next begins ("virtual aliasing" in NVIDIA's CUDA
//! programming guide, 4.16), and the old ones are given back once that has run.
//!
//! Every allocation of candle and of this crate ends in `cuMemAllocAsync`, which `build/late.c` leads here. There is one
//! stream a device, and memory is freed in its order, so what is free by the host's count is free for the next launch.

use std::collections::{HashMap, VecDeque};
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError, RwLock};

use candle_core::Result;
use cudarc::driver::result::event;
use cudarc::driver::sys::CUmemPool_attribute as Pool;
use cudarc::driver::{DriverError, sys};

use super::chunk::{self, CHUNK, Chunk};
use super::told;
use crate::arena::{Arena, GRAIN, Runs};
use crate::settings::Allocator;

/// Smaller tensors are left to the driver's pool: there are thousands, and among large ones each would hold a chunk.
const LEAST: usize = 2 << 20;
/// What the driver's pool grows by.
const POOL_STEP: u64 = 32 << 20;
/// Addresses that are reserved, in multiples of the card's memory: they cost nothing, and chunks are remapped among them.
const SPAN: u64 = 16;

/// The regions of the process. Global, as the driver's own pools are, whose place they take.
static REGIONS: RwLock<Vec<(Place, Mutex<Region>)>> = RwLock::new(Vec::new());

// SAFETY: a type; callers of such a function state their own promise.
type Alloc = unsafe extern "C" fn(*mut u64, usize, sys::CUstream) -> sys::CUresult;
// SAFETY: as above.
type Free = unsafe extern "C" fn(u64, sys::CUstream) -> sys::CUresult;

/// The driver's functions that ours replace.
#[derive(Clone, Copy)]
struct Driver {
    alloc: Alloc,
    free: Free,
}

static DRIVER: RwLock<Option<Driver>> = RwLock::new(None);

/// What identifies the region of a call.
struct Place {
    stream: usize,
    addresses: std::ops::Range<u64>,
}

/// What a region holds, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Held {
    pub used: u64,
    /// The most, with what the driver's pool held at that time.
    pub peak: u64,
    pub mapped: u64,
    /// How often holes were joined, and how often the host waited for it.
    pub joined: u64,
    pub waited: u64,
}

/// How a region is set up.
pub(super) struct Setup {
    pub device: sys::CUdevice,
    pub stream: sys::CUstream,
    /// Bytes of the card.
    pub total: u64,
    /// The pool of small tensors.
    pub pool: sys::CUmemoryPool,
    /// The most that may be mapped, the pool's included.
    pub limit: u64,
}

/// Addresses whose chunks are mapped elsewhere by now.
struct Left {
    at: Vec<u64>,
    /// Behind the last work that may use them.
    used: sys::CUevent,
}

struct Region {
    base: u64,
    /// By offset from the base; so are all runs.
    chunks: HashMap<u64, Chunk>,
    arena: Arena,
    /// In the order in which they were left.
    left: VecDeque<Left>,
    /// Addresses without memory.
    bare: Runs,
    /// Behind the last that ever had some.
    end: u64,
    peak: u64,
    joined: u64,
    waited: u64,
    setup: Setup,
    access: Vec<sys::CUmemAccessDesc>,
}

// SAFETY: handles and the stream are names that any thread may use; the region is protected by its lock.
unsafe impl Send for Region {}

#[cfg(late)]
// SAFETY: the signatures of `build/late.c`.
unsafe extern "C" {
    fn tandem_late_divert(name: *const std::ffi::c_char, function: *const c_void) -> *const c_void;
}

/// Makes the region of a device. Where this driver, or this build, has no way to, its pool serves all tensors, and the answer
/// says why.
pub(super) fn open(setup: Setup) -> Result<Allocator> {
    if !divert() {
        return Ok(Allocator::Driver { why: "this program was linked without its own allocator" });
    }
    let mut can_map = 0;
    let mapping = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED;
    // SAFETY: the attribute is an i32.
    told(unsafe { sys::cuDeviceGetAttribute(&mut can_map, mapping, setup.device) }.result())?;
    if can_map == 0 {
        return Ok(Allocator::Driver { why: "the driver cannot map memory piece by piece on this GPU" });
    }
    let span = (SPAN * setup.total).next_multiple_of(CHUNK);
    let mut base = 0;
    // SAFETY: the address is written before it returns; the span is never freed.
    told(unsafe { sys::cuMemAddressReserve(&mut base, span as usize, 0, 0, 0) }.result())?;
    let mut bare = Runs::default();
    bare.add(0, span);
    let access = chunk::readers(setup.device)?;
    let place = Place { stream: setup.stream as usize, addresses: base..base + span };
    let region = Region {
        base,
        chunks: HashMap::new(),
        arena: Arena::default(),
        left: VecDeque::new(),
        bare,
        end: 0,
        peak: 0,
        joined: 0,
        waited: 0,
        setup,
        access,
    };
    REGIONS.write().unwrap_or_else(PoisonError::into_inner).push((place, Mutex::new(region)));
    Ok(Allocator::Own)
}

/// What the region of `stream` holds.
pub(super) fn held(stream: sys::CUstream) -> Held {
    with(
        |place| place.stream == stream as usize,
        |region| Held {
            used: region.arena.used(),
            peak: region.peak,
            mapped: region.mapped(),
            joined: region.joined,
            waited: region.waited,
        },
    )
    .unwrap_or_default()
}

/// Resets the peak of the region of `stream`.
pub(super) fn reset_peak(stream: sys::CUstream) {
    with(|place| place.stream == stream as usize, |region| region.peak = region.arena.used());
}

fn with<T>(is_it: impl Fn(&Place) -> bool, work: impl FnOnce(&mut Region) -> T) -> Option<T> {
    let regions = REGIONS.read().unwrap_or_else(PoisonError::into_inner);
    let (_, region) = regions.iter().find(|(place, _)| is_it(place))?;
    Some(work(&mut region.lock().unwrap_or_else(PoisonError::into_inner)))
}

/// Leads the driver's functions here, once. False where the program was linked to the driver straight.
fn divert() -> bool {
    let mut driver = DRIVER.write().unwrap_or_else(PoisonError::into_inner);
    #[cfg(late)]
    if driver.is_none() {
        // SAFETY: the names end with nul, and the functions have the signatures of those that they stand in for; what comes
        // back is the driver's own, or null where there is none by that name.
        unsafe {
            let free = tandem_late_divert(c"cuMemFreeAsync".as_ptr(), free_async as *const c_void);
            if free.is_null() {
                return false;
            }
            let alloc = tandem_late_divert(c"cuMemAllocAsync".as_ptr(), alloc_async as *const c_void);
            if alloc.is_null() {
                tandem_late_divert(c"cuMemFreeAsync".as_ptr(), free);
                return false;
            }
            *driver = Some(Driver {
                alloc: std::mem::transmute::<*const c_void, Alloc>(alloc),
                free: std::mem::transmute::<*const c_void, Free>(free),
            });
        }
    }
    driver.is_some()
}

fn driver() -> Option<Driver> {
    *DRIVER.read().unwrap_or_else(PoisonError::into_inner)
}

/// Stands in for `cuMemAllocAsync`.
// SAFETY: the caller's promise to the driver: `address` can be written to, and `stream` lives.
unsafe extern "C" fn alloc_async(address: *mut u64, bytes: usize, stream: sys::CUstream) -> sys::CUresult {
    let placed = (bytes >= LEAST)
        .then(|| with(|place| place.stream == stream as usize, |region| region.take(bytes as u64)))
        .flatten();
    match (placed, driver()) {
        (Some(Ok(found)), _) => {
            // SAFETY: the caller's promise.
            unsafe { address.write(found) };
            sys::CUresult::CUDA_SUCCESS
        }
        (Some(Err(why)), _) => why.0,
        (None, Some(driver)) => {
            let pool = with(|place| place.stream == stream as usize, |region| region.setup.pool);
            let small = || match pool {
                // SAFETY: the caller's promise, handed on; the pool is never destroyed.
                Some(pool) => unsafe { sys::cuMemAllocFromPoolAsync(address, bytes, pool, stream) },
                // SAFETY: the caller's promise, handed on.
                None => unsafe { (driver.alloc)(address, bytes, stream) },
            };
            let room = |need| {
                with(|place| place.stream == stream as usize, |region| region.make_room(need))
                    .unwrap_or(Ok(()))
            };
            if let Err(why) = room(Need::Limit(bytes as u64)) {
                return why.0;
            }
            match small() {
                OUT_OF_MEMORY_CODE => room(Need::Card).map_or_else(|why| why.0, |()| small()),
                other => other,
            }
        }
        (None, None) => sys::CUresult::CUDA_ERROR_NOT_INITIALIZED,
    }
}

/// Stands in for `cuMemFreeAsync`.
// SAFETY: the caller's promise to the driver: nothing uses `address` behind what the stream holds now.
unsafe extern "C" fn free_async(address: u64, stream: sys::CUstream) -> sys::CUresult {
    match with(|place| place.addresses.contains(&address), |region| region.give(address)) {
        Some(true) => sys::CUresult::CUDA_SUCCESS,
        Some(false) => sys::CUresult::CUDA_ERROR_INVALID_VALUE,
        // SAFETY: the caller's own promise.
        None => driver().map_or(sys::CUresult::CUDA_ERROR_NOT_INITIALIZED, |driver| unsafe {
            (driver.free)(address, stream)
        }),
    }
}

const OUT_OF_MEMORY_CODE: sys::CUresult = sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
const OUT_OF_MEMORY: DriverError = DriverError(OUT_OF_MEMORY_CODE);
const NOT_READY: DriverError = DriverError(sys::CUresult::CUDA_ERROR_NOT_READY);

/// How many of the addresses that were left are made bare.
enum Until {
    /// Up to the first that is still in use.
    Running,
    /// All of them: the host waits.
    Empty,
}

/// Why the driver's pool needs chunks of the region.
enum Need {
    /// So many more bytes must stay below the limit.
    Limit(u64),
    /// The card has no more.
    Card,
}

impl Region {
    fn mapped(&self) -> u64 {
        self.chunks.len() as u64 * CHUNK
    }

    fn take(&mut self, bytes: u64) -> std::result::Result<u64, DriverError> {
        let bytes = bytes.next_multiple_of(GRAIN);
        let start = match self.arena.take(bytes) {
            Some(start) => start,
            None => {
                self.extend(bytes)?;
                self.arena.take(bytes).ok_or(OUT_OF_MEMORY)?
            }
        };
        let small = self.pool(Pool::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        self.peak = self.peak.max(self.arena.used() + small);
        Ok(self.base + start)
    }

    fn give(&mut self, address: u64) -> bool {
        self.arena.give(address - self.base)
    }

    /// Makes a free run of at least `bytes`: of fresh chunks, and of those that lie in holes where there are no more.
    fn extend(&mut self, bytes: u64) -> std::result::Result<(), DriverError> {
        let last = self.arena.free.before(self.end);
        let behind = (bytes - last).next_multiple_of(CHUNK);
        let count = |length: u64| (length / CHUNK) as usize;
        let mut chunks = self.fresh(count(behind))?;
        if chunks.len() == count(behind) && self.bare.cut(self.end, behind) {
            return self.map(self.end, chunks);
        }
        // The run before the end may be moved like any other.
        let length = bytes.next_multiple_of(CHUNK);
        let lacking = count(length).saturating_sub(chunks.len());
        let moved: Vec<u64> = self.arena.free.pieces(CHUNK).take(lacking).collect();
        if chunks.len() + moved.len() < count(length) {
            return chunks.into_iter().try_for_each(chunk::release).and(Err(OUT_OF_MEMORY));
        }
        let start = self.bare_run(length)?;
        chunks.extend(self.leave(moved)?);
        self.map(start, chunks)
    }

    /// Takes `length` addresses without memory, to join holes in. Waits only where all that there are lie among those that were left.
    fn bare_run(&mut self, length: u64) -> std::result::Result<u64, DriverError> {
        self.joined += 1;
        self.clear(Until::Running)?;
        if self.bare.fit(length).is_none() {
            self.waited += 1;
            self.clear(Until::Empty)?;
        }
        let start = self.bare.fit(length).ok_or(OUT_OF_MEMORY)?;
        self.bare.cut(start, length);
        Ok(start)
    }

    /// Gives free chunks back to the driver, for its pool of small tensors to grow.
    fn make_room(&mut self, need: Need) -> std::result::Result<(), DriverError> {
        let lacking = match need {
            Need::Limit(_) if self.setup.limit == u64::MAX => 0,
            Need::Limit(bytes) => {
                let reserved = self.pool(Pool::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
                let used = self.pool(Pool::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
                let more = if used + bytes > reserved { POOL_STEP } else { 0 };
                (self.mapped() + reserved + more).saturating_sub(self.setup.limit)
            }
            Need::Card => POOL_STEP,
        };
        let count = lacking.div_ceil(CHUNK) as usize;
        let given: Vec<u64> = self.arena.free.pieces(CHUNK).take(count).collect();
        if given.len() < count {
            return Err(OUT_OF_MEMORY);
        }
        if count > 0 {
            // The driver knows nothing of what runs: this is to have ended.
            let chunks = self.leave(given)?;
            self.clear(Until::Empty)?;
            chunks.into_iter().try_for_each(chunk::release)?;
        }
        Ok(())
    }

    /// An attribute of the driver's pool, in bytes.
    fn pool(&self, attribute: Pool) -> std::result::Result<u64, DriverError> {
        let mut bytes = 0_u64;
        let into = std::ptr::from_mut(&mut bytes).cast();
        // SAFETY: the pool lives as long as the process; the attributes asked for are a u64.
        unsafe { cudarc::driver::result::mem_pool::get_attribute(self.setup.pool, attribute, into) }?;
        Ok(bytes)
    }

    /// As many as `count` new chunks, as far as the limit and the card have them.
    fn fresh(&self, count: usize) -> std::result::Result<Vec<Chunk>, DriverError> {
        let held = self.mapped() + self.pool(Pool::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        let allowed = (self.setup.limit.saturating_sub(held) / CHUNK) as usize;
        let mut chunks = Vec::new();
        for _ in 0..count.min(allowed) {
            match chunk::create(self.setup.device) {
                Ok(chunk) => chunks.push(chunk),
                Err(OUT_OF_MEMORY) => break,
                Err(why) => return Err(why),
            }
        }
        Ok(chunks)
    }

    /// Maps `chunks` one behind the other from `start`, which has no memory yet. A driver that refuses has lost its context,
    /// and all memory with it: nothing is undone.
    fn map(&mut self, start: u64, chunks: Vec<Chunk>) -> std::result::Result<(), DriverError> {
        let length = chunks.len() as u64 * CHUNK;
        for (i, chunk) in chunks.into_iter().enumerate() {
            let at = start + i as u64 * CHUNK;
            // SAFETY: the addresses are reserved and bare; where the chunk is mapped elsewhere too, that address was left.
            unsafe { sys::cuMemMap(self.base + at, CHUNK as usize, 0, chunk, 0) }.result()?;
            self.chunks.insert(at, chunk);
        }
        // SAFETY: all of it was mapped just now.
        let of = |access: &[sys::CUmemAccessDesc]| unsafe {
            sys::cuMemSetAccess(self.base + start, length as usize, access.as_ptr(), access.len()).result()
        };
        // Peers that may not read it are served through the host.
        of(&self.access).or_else(|_| of(&self.access[..1]))?;
        self.end = self.end.max(start + length);
        self.arena.free.add(start, length);
        Ok(())
    }

    /// Takes the chunks at `moved`, which are free, for new addresses. The old ones stay until nothing runs that uses them.
    fn leave(&mut self, moved: Vec<u64>) -> std::result::Result<Vec<Chunk>, DriverError> {
        if moved.is_empty() {
            return Ok(Vec::new());
        }
        let used = event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        // SAFETY: the event was made just now, the stream lives as long as the process.
        unsafe { event::record(used, self.setup.stream) }?;
        let taken = moved.iter().filter_map(|at| {
            self.arena.free.cut(*at, CHUNK);
            self.chunks.remove(at)
        });
        let chunks = taken.collect();
        self.left.push_back(Left { at: moved, used });
        Ok(chunks)
    }

    /// Makes bare what was left, in order.
    fn clear(&mut self, until: Until) -> std::result::Result<(), DriverError> {
        while let Some(Left { at, used }) = self.left.pop_front() {
            // SAFETY: the event is destroyed below, once.
            match (unsafe { event::query(used) }, &until) {
                (Ok(()), _) => {}
                (Err(NOT_READY), Until::Running) => {
                    self.left.push_front(Left { at, used });
                    break;
                }
                // SAFETY: as above.
                (Err(NOT_READY), Until::Empty) => unsafe { event::synchronize(used) }?,
                (Err(why), _) => return Err(why),
            }
            // SAFETY: made in `leave`, and taken off the list.
            unsafe { event::destroy(used) }?;
            for at in at {
                // SAFETY: a chunk was mapped there, alone; the event tells that nothing uses the address any more.
                unsafe { sys::cuMemUnmap(self.base + at, CHUNK as usize) }.result()?;
                self.bare.add(at, CHUNK);
            }
        }
        Ok(())
    }
}
