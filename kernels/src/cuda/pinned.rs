//! Pinned host memory in slabs, of which tensors take runs.
//!
//! Pinning is slow, so it is done ahead ([`Pinned::reserve`]) and never undone while there is room:
//! clips of another length use other runs of the same slabs.

use std::collections::BTreeMap;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use candle_core::Result;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, sys};

use super::told;
use crate::arena::{Arena, GRAIN};

/// Sizes of slabs are multiples of this.
const SLAB_GRAIN: u64 = crate::transfer::route::HOST_GRAIN;
/// With more freed runs than this whose copies may be under way, finished ones are looked for.
const MANY: usize = 64;
/// Threads that fill a new slab's pages.
const TOUCHING: u64 = 4;

/// Pinned memory that any GPU may copy from and to.
pub(crate) struct Pinned {
    context: Arc<CudaContext>,
    state: Mutex<State>,
    /// Notified when a slab was added, or no more will be.
    grown: Condvar,
}

#[derive(Default)]
struct State {
    slabs: BTreeMap<u64, Slab>,
    next: u64,
    limit: Option<u64>,
    /// How many threads are pinning slabs ahead.
    reserving: usize,
}

struct Slab {
    memory: Memory,
    bytes: u64,
    arena: Arena,
    /// Freed runs, with the event of the last copy that used each.
    used: Vec<(Range<u64>, CudaEvent)>,
}

/// A run of a slab.
pub(crate) struct Run {
    /// Where it begins.
    pub address: u64,
    slab: u64,
    start: u64,
    bytes: u64,
}

impl Pinned {
    pub(crate) fn new(context: Arc<CudaContext>) -> Self {
        Self { context, state: Mutex::default(), grown: Condvar::new() }
    }

    /// Bytes that are pinned.
    pub(crate) fn bytes(&self) -> u64 {
        self.lock().held()
    }

    /// The most that may be pinned where some of it is idle.
    pub(crate) fn set_limit(&self, bytes: u64) {
        self.lock().limit = Some(bytes);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pins `slabs` in turn, ahead of their use; `go_on` is called before each with the bytes pinned so far.
    /// Whoever takes a run meanwhile and finds no room waits for the next slab.
    pub(crate) fn reserve(&self, slabs: &[u64], go_on: &dyn Fn(u64) -> bool) -> Result<()> {
        self.lock().reserving += 1;
        let mut done = 0;
        let mut pin_all = || {
            for &bytes in slabs {
                if !go_on(done) {
                    break;
                }
                let slab = self.pinned(bytes)?;
                done += slab.bytes;
                self.lock().add(slab);
                self.grown.notify_all();
            }
            Ok(())
        };
        let pinned = pin_all();
        self.lock().reserving -= 1;
        self.grown.notify_all();
        pinned
    }

    /// A run of at least `bytes`, which `stream` may write once what it holds now is done.
    pub(crate) fn take(&self, bytes: u64, stream: &CudaStream) -> Result<Run> {
        let bytes = bytes.max(1).next_multiple_of(GRAIN);
        let mut state = self.lock();
        loop {
            if let Some(run) = state.run(bytes, stream)? {
                return Ok(run);
            }
            if state.reserving == 0 {
                break;
            }
            state = self.grown.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let idle = state.idle_beyond(bytes.next_multiple_of(SLAB_GRAIN));
        drop(state);
        idle.into_iter().try_for_each(|slab| self.unpin(slab))?;
        let slab = self.pinned(bytes)?;
        let mut state = self.lock();
        state.add(slab);
        match state.run(bytes, stream)? {
            Some(run) => Ok(run),
            // Another thread took what was pinned for this one.
            None => {
                drop(state);
                self.take(bytes, stream)
            }
        }
    }

    /// Gives a run back; `idle` is the end of the last copy that uses it.
    pub(crate) fn give(&self, run: &Run, idle: Option<CudaEvent>) {
        let mut state = self.lock();
        let Some(slab) = state.slabs.get_mut(&run.slab) else { return };
        slab.arena.give(run.start);
        if let Some(idle) = idle {
            let range = run.start..run.start + run.bytes;
            slab.used.retain(|(other, _)| !(range.start <= other.start && other.end <= range.end));
            if slab.used.len() > MANY {
                slab.used.retain(|(_, event)| !event.is_complete());
            }
            slab.used.push((range, idle));
        }
    }

    fn pinned(&self, bytes: u64) -> Result<Slab> {
        let bytes = bytes.next_multiple_of(SLAB_GRAIN);
        let refused = |why: String| {
            let gib = bytes as f64 / f64::from(1 << 30);
            candle_core::Error::msg(format!(
                "{gib:.2} GiB of host memory cannot be pinned ({why}): set a lower memory.host_memory, or \
                 memory.offload = \"never\""
            ))
        };
        let memory = Memory::new(bytes).map_err(|why| refused(why.to_string()))?;
        memory.touch();
        told(self.context.bind_to_thread())?;
        // SAFETY: the memory is ours, and lives until it was unregistered. Portable: another GPU's context may copy from it.
        let registered = unsafe {
            sys::cuMemHostRegister_v2(
                memory.address as *mut _,
                bytes as usize,
                sys::CU_MEMHOSTREGISTER_PORTABLE,
            )
        };
        registered.result().map_err(|why| refused(why.to_string()))?;
        let mut arena = Arena::default();
        arena.free.add(0, bytes);
        Ok(Slab { memory, bytes, arena, used: Vec::new() })
    }

    fn unpin(&self, slab: Slab) -> Result<()> {
        // Where the driver fails a copy may still use the pages, so they stay mapped.
        let slab = ManuallyDrop::new(slab);
        for (_, event) in &slab.used {
            told(event.synchronize())?;
        }
        told(self.context.bind_to_thread())?;
        // SAFETY: `pinned` registered it, nothing is in the slab, and no copy uses it any more.
        told(unsafe { sys::cuMemHostUnregister(slab.memory.address as *mut _) }.result())?;
        drop(ManuallyDrop::into_inner(slab));
        Ok(())
    }
}

/// Anonymous pages of the process, unmapped when dropped.
///
/// The driver's own allocation of pinned memory zeroes pages under a lock that other driver calls and all file mappings wait
/// for: a model that loads at the same time slows to a fraction of its speed. So the pages are allocated here, by
/// several threads and without that lock, and the driver only pins them.
struct Memory {
    address: u64,
    bytes: u64,
}

impl Memory {
    fn new(bytes: u64) -> std::io::Result<Self> {
        let (read_write, private) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: new pages, of no file, at an address that the system chooses.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes as usize, read_write, private, -1, 0) };
        if address == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the pages were mapped just now. Large ones are a matter of speed, so a system without them is as good.
        let _ = unsafe { libc::madvise(address, bytes as usize, libc::MADV_HUGEPAGE) };
        Ok(Self { address: address as u64, bytes })
    }

    /// Writes to every page once, so that it is backed by memory.
    fn touch(&self) {
        const PAGE: usize = 4096;
        let each = self.bytes.div_ceil(TOUCHING).next_multiple_of(SLAB_GRAIN);
        std::thread::scope(|scope| {
            for start in (0..self.bytes).step_by(each as usize) {
                let (address, length) = (self.address + start, each.min(self.bytes - start) as usize);
                scope.spawn(move || {
                    for at in (0..length).step_by(PAGE) {
                        // SAFETY: within the pages, which this thread alone writes to yet.
                        unsafe { std::ptr::write_volatile((address as *mut u8).add(at), 0) };
                    }
                });
            }
        });
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and the address is no longer used. It fails only for what was never mapped.
        let _ = unsafe { libc::munmap(self.address as *mut _, self.bytes as usize) };
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        for slab in std::mem::take(&mut self.lock().slabs).into_values() {
            if let Err(why) = self.unpin(slab) {
                // A driver error that cannot be returned here; the next call reports the cause.
                let _ = why;
            }
        }
    }
}

impl State {
    fn held(&self) -> u64 {
        self.slabs.values().map(|slab| slab.bytes).sum()
    }

    fn add(&mut self, slab: Slab) {
        self.slabs.insert(self.next, slab);
        self.next += 1;
    }

    /// A run of a slab that has room: of the smallest such slab, so that large ones stay whole.
    fn run(&mut self, bytes: u64, stream: &CudaStream) -> Result<Option<Run>> {
        let fits = |(_, slab): &(&u64, &mut Slab)| slab.arena.free.fit(bytes).is_some();
        let found = self.slabs.iter_mut().filter(fits).min_by_key(|(_, slab)| slab.bytes);
        let Some((&id, slab)) = found else { return Ok(None) };
        let Some(start) = slab.arena.take(bytes) else { return Ok(None) };
        let range = start..start + bytes;
        for (_, event) in slab.used.iter().filter(|(r, _)| r.start < range.end && range.start < r.end) {
            told(stream.wait(event))?;
        }
        Ok(Some(Run { address: slab.memory.address + start, slab: id, start, bytes }))
    }

    /// Takes idle slabs out, the largest first, as far as `more` bytes would go beyond the limit.
    fn idle_beyond(&mut self, more: u64) -> Vec<Slab> {
        let Some(limit) = self.limit else { return Vec::new() };
        let mut out = Vec::new();
        while self.held() + more > limit {
            let idle = self.slabs.iter().filter(|(_, slab)| slab.arena.used() == 0);
            let Some(id) = idle.max_by_key(|(_, slab)| slab.bytes).map(|(id, _)| *id) else { break };
            out.extend(self.slabs.remove(&id));
        }
        out
    }
}
