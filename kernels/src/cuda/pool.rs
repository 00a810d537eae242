//! Opening a GPU, and the memory that its tensors come from: large ones from its region, small ones from the driver's
//! pool.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Result;
use candle_core::cuda_backend::CudaDevice;
use cudarc::driver::result::{device, mem_pool};
use cudarc::driver::sys;

use super::region::{self, Setup};
use super::{Card, device_of, told};
use crate::Device;
use crate::device::{Memory, Settings};

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
    if let Some(limit) = settings.memory_limit {
        // SAFETY: the handle is of an open device; the pool lives as long as the process.
        unsafe {
            let pool = told(mem_pool::create(&properties(index, limit)))?;
            told(device::set_mem_pool(handle, pool))?;
        }
    }
    // SAFETY: the handle is of an open device; the attribute is a u64.
    let pool = unsafe {
        let pool = told(device::get_mem_pool(handle))?;
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
    let card = Arc::new(Card::new(cuda, *settings, allocator)?);
    OPEN.lock().unwrap_or_else(PoisonError::into_inner).push(card.clone());
    Ok(device_of(&card))
}

/// A pool on GPU `index` that never grows beyond `limit` bytes.
fn properties(index: usize, limit: u64) -> sys::CUmemPoolProps {
    // SAFETY: all zero is what the driver wants in every field that is not set here.
    let mut properties: sys::CUmemPoolProps = unsafe { std::mem::zeroed() };
    properties.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
    // The second field of the location is the ordinal in every version of the driver's header, under changing names.
    // SAFETY: it is an i32 (or a union that starts with one) behind the i32 that was set above.
    unsafe { std::ptr::from_mut(&mut properties.location).cast::<i32>().add(1).write(index as i32) };
    properties.maxSize = limit as usize;
    properties
}

impl Card {
    fn pool(&self) -> Result<sys::CUmemoryPool> {
        told(self.context.bind_to_thread())?;
        // SAFETY: the device is open.
        told(unsafe { device::get_mem_pool(self.context.cu_device()) })
    }

    fn pool_bytes(&self, attribute: sys::CUmemPool_attribute) -> Result<u64> {
        let (pool, mut bytes) = (self.pool()?, 0_u64);
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
        let pool = self.pool()?;
        for high in [Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH] {
            let mut zero = 0_u64;
            // SAFETY: the pool lives; these attributes are a u64, and zero sets them to what is there now.
            told(unsafe { mem_pool::set_attribute(pool, high, std::ptr::from_mut(&mut zero).cast()) })?;
        }
        Ok(())
    }
}
