//! Opening a GPU, and the allocation of its tensors: large ones from its region, small ones from a pool of the driver.
//!
//! Both belong to the stream of the opened GPU: a GPU that is opened twice in a process has two of each, with a limit each.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Result;
use candle_core::cuda_backend::CudaDevice;
use cudarc::driver::result::{device, mem_pool};
use cudarc::driver::sys;

use super::region::{self, Setup};
use super::{Card, device_of, told};
use crate::Device;
use crate::settings::{Allocator, Memory, Settings};

/// The GPUs that were opened, which are never closed: a region (`region`) knows its GPU by the address of its stream, which
/// must not become another's. Global, as the driver's own state that they stand for (contexts, pools) is.
static OPEN: Mutex<Vec<Arc<Card>>> = Mutex::new(Vec::new());

/// See [`crate::device::open_gpu`].
pub(crate) fn open(index: usize, settings: &Settings) -> Result<Device> {
    let cuda = CudaDevice::new_with_stream(index)?;
    let context = cuda.cuda_stream().context().clone();
    let handle = context.cu_device();
    // SAFETY: one stream a device orders every use of its tensors; what crosses streams (`copies`) orders itself by
    // events.
    unsafe { cuda.disable_event_tracking() };
    // SAFETY: the properties are of a plain pool, which lives as long as the process; the attribute is a u64.
    let pool = unsafe {
        let pool = told(mem_pool::create(&properties(index, settings.memory_limit)))?;
        let mut keep_all = u64::MAX;
        let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        told(mem_pool::set_attribute(pool, threshold, std::ptr::from_mut(&mut keep_all).cast()))?;
        pool
    };
    let total = told(context.total_mem())? as u64;
    let allocator = region::open(Setup {
        device: handle,
        stream: cuda.cuda_stream().cu_stream(),
        total,
        pool,
        limit: settings.memory_limit.unwrap_or(u64::MAX),
    })?;
    if let Allocator::Driver { .. } = allocator {
        // Without the region the driver takes a stream's tensors from the device's current pool:
        // here the GPU that was opened last sets the limit for all.
        // SAFETY: the handle is of an open device.
        told(unsafe { device::set_mem_pool(handle, pool) })?;
    }
    let card = Arc::new(Card::new(cuda, *settings, allocator, Pool(pool))?);
    OPEN.lock().unwrap_or_else(PoisonError::into_inner).push(card.clone());
    Ok(device_of(&card))
}

/// A pool of the driver, which lives as long as the process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pool(pub sys::CUmemoryPool);

// SAFETY: a handle; the driver's functions take it on any thread.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

/// A pool on GPU `index` that never grows beyond `limit` bytes.
fn properties(index: usize, limit: Option<u64>) -> sys::CUmemPoolProps {
    // SAFETY: all zero is what the driver wants in every field that is not set here.
    let mut properties: sys::CUmemPoolProps = unsafe { std::mem::zeroed() };
    properties.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
    // The second field of the location is the ordinal in every version of the driver's header, under changing names.
    // SAFETY: it is an i32 (or a union that starts with one) after the i32 that was set above.
    unsafe { std::ptr::from_mut(&mut properties.location).cast::<i32>().add(1).write(index as i32) };
    // Zero means no limit.
    properties.maxSize = limit.unwrap_or(0) as usize;
    properties
}

impl Card {
    fn pool_bytes(&self, attribute: sys::CUmemPool_attribute) -> Result<u64> {
        told(self.context.bind_to_thread())?;
        let (pool, mut bytes) = (self.pool.0, 0_u64);
        // SAFETY: the pool lives; these attributes are a u64.
        told(unsafe { mem_pool::get_attribute(pool, attribute, std::ptr::from_mut(&mut bytes).cast()) })?;
        Ok(bytes)
    }

    /// See [`crate::device::memory`].
    pub(crate) fn memory(&self) -> Result<Memory> {
        use sys::CUmemPool_attribute as Attribute;
        let large = region::held(self.stream.cu_stream());
        Ok(Memory {
            total: told(self.context.total_mem())? as u64,
            used: large.used + self.pool_bytes(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
            peak: large.peak.max(self.pool_bytes(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?),
            reserved_peak: large.mapped + self.pool_bytes(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH)?,
            joined: large.joined,
            waited: large.waited,
        })
    }

    /// See [`crate::device::reset_peak`].
    pub(crate) fn reset_peak(&self) -> Result<()> {
        use sys::CUmemPool_attribute as Attribute;
        region::reset_peak(self.stream.cu_stream());
        told(self.context.bind_to_thread())?;
        for high in [Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH] {
            let mut zero = 0_u64;
            // SAFETY: the pool lives; these attributes are a u64, and zero sets them to what is there now.
            told(unsafe {
                mem_pool::set_attribute(self.pool.0, high, std::ptr::from_mut(&mut zero).cast())
            })?;
        }
        Ok(())
    }
}
