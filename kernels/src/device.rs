//! Devices: how a GPU is opened, and what its memory holds.

use std::collections::BTreeMap;

use crate::Device;
use crate::Result;

/// How a GPU is set up when it is opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Settings {
    /// The most bytes that tensors may take; the allocator refuses beyond. Default: all there is.
    pub memory_limit: Option<u64>,
    /// Whether two runs must agree to the bit. Default: as fast as can be.
    pub repeatability: Repeatability,
}

/// Whether two runs on the same hardware must agree to the bit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Repeatability {
    /// The fastest engines; cuDNN's attention backward sums in an order of its own.
    #[default]
    Fast,
    /// Only engines that give the same bits every time.
    BitForBit,
}

/// Bytes of a GPU's memory, and how its allocator fared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// All of the card.
    pub total: u64,
    /// Held by tensors now.
    pub used: u64,
    /// The most that tensors held since [`reset_peak`].
    pub peak: u64,
    /// The most that was taken from the driver for tensors since [`reset_peak`], with the pool's slack.
    pub reserved_peak: u64,
    /// How often holes were joined for a tensor, since the device was opened.
    pub joined: u64,
    /// How often the host waited for that.
    pub waited: u64,
}

/// Where a GPU's tensors get their memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Allocator {
    /// The region of this crate, which joins holes: what fits by its bytes fits.
    Own,
    /// The driver's pool alone, which leaves holes between large tensors.
    Driver {
        /// Why not the region.
        why: &'static str,
    },
}

impl std::fmt::Display for Allocator {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Own => f.write_str("own allocator, which joins the holes between tensors"),
            Self::Driver { why } => {
                write!(f, "the driver's pool ({why}); its holes may take 2 to 3 GiB that no plan counts")
            }
        }
    }
}

/// Where tensors on `device` get their memory.
pub fn allocator(device: &Device) -> Allocator {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = device.card() {
        return gpu.allocator.clone();
    }
    let _ = device;
    Allocator::Driver { why: "it is not a GPU that Tandem opened" }
}

/// Opens GPU `index`: one real stream of its own, the memory pool told to keep what it has, event tracking off.
///
/// # Errors
/// When this build has no CUDA, or the driver or the GPU does not answer.
pub fn open_gpu(index: usize, settings: &Settings) -> Result<Device> {
    #[cfg(feature = "cuda")]
    return crate::cuda::pool::open(index, settings);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (index, settings);
        Err(candle_core::Error::NotCompiledWithCudaSupport)
    }
}

/// Which of cuBLASLt's algorithms each large product on `device` took, by the product's sizes and layout: the fastest by the
/// clock, which does not give the same answer twice. A run that continues keeps them with [`keep_product_choices`].
pub fn product_choices(device: &Device) -> BTreeMap<String, usize> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = device.card() {
        return gpu.product_choices();
    }
    let _ = device;
    BTreeMap::new()
}

/// Lets products on `device` take the algorithms that they took when [`product_choices`] was asked, on a GPU of the same kind
/// and with the same cuBLASLt.
pub fn keep_product_choices(device: &Device, choices: BTreeMap<String, usize>) {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = device.card() {
        gpu.keep_product_choices(choices);
    }
    #[cfg(not(feature = "cuda"))]
    let _ = (device, choices);
}

/// Waits until everything that was asked of `device` is done.
pub fn synchronize(device: &Device) -> Result<()> {
    device.synchronize()
}

/// What the memory of `device` holds; nothing for the CPU.
pub fn memory(device: &Device) -> Result<Option<Memory>> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = device.card() {
        return gpu.memory().map(Some);
    }
    let _ = device;
    Ok(None)
}

/// Starts the peaks of [`memory`] anew.
pub fn reset_peak(device: &Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = device.card() {
        return gpu.reset_peak();
    }
    let _ = device;
    Ok(())
}
