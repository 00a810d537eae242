//! Chunks of physical GPU memory, which the region maps to addresses.

use candle_core::Result;
use cudarc::driver::{DriverError, sys};

use super::told;

/// Bytes of a chunk: a multiple of the 2 MiB that the hardware maps. Up to two are lost to a free fragment.
pub(super) const CHUNK: u64 = 4 << 20;

/// The driver's handle of a chunk.
pub(super) type Chunk = sys::CUmemGenericAllocationHandle;

/// A new chunk of `device`.
pub(super) fn create(device: sys::CUdevice) -> std::result::Result<Chunk, DriverError> {
    let (mut chunk, properties) = (0, properties(device));
    // SAFETY: the handle is written before it returns success; the properties are of a plain allocation.
    unsafe { sys::cuMemCreate(&mut chunk, CHUNK as usize, &properties, 0) }.result()?;
    Ok(chunk)
}

/// Frees a chunk that is not mapped.
pub(super) fn release(chunk: Chunk) -> std::result::Result<(), DriverError> {
    // SAFETY: the caller's word; a chunk that is still mapped would stay until it is not.
    unsafe { sys::cuMemRelease(chunk) }.result()
}

fn location(device: sys::CUdevice) -> sys::CUmemLocation {
    // SAFETY: all zero is a location; the second field is the ordinal under the names of every version of the header.
    let mut location: sys::CUmemLocation = unsafe { std::mem::zeroed() };
    location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
    // SAFETY: it is an i32 (or a union that starts with one) after the i32 that was set above.
    unsafe { std::ptr::from_mut(&mut location).cast::<i32>().add(1).write(device) };
    location
}

/// Plain memory of a card.
fn properties(device: sys::CUdevice) -> sys::CUmemAllocationProp {
    // SAFETY: all zero is what the driver wants in every field that is not set here.
    let mut properties: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
    properties.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location = location(device);
    properties
}

/// Who may read and write: the device itself, first, and its peers.
pub(super) fn readers(device: sys::CUdevice) -> Result<Vec<sys::CUmemAccessDesc>> {
    let mut count = 0;
    // SAFETY: the number is written before it returns.
    told(unsafe { sys::cuDeviceGetCount(&mut count) }.result())?;
    let mut found = vec![device];
    for other in 0..count {
        let mut can = 0;
        // SAFETY: the answer is written before it returns success.
        let asked = unsafe { sys::cuDeviceCanAccessPeer(&mut can, other, device) }.result();
        if other != device && asked.is_ok() && can != 0 {
            found.push(other);
        }
    }
    let access = |device: sys::CUdevice| sys::CUmemAccessDesc {
        location: location(device),
        flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
    };
    Ok(found.into_iter().map(access).collect())
}
