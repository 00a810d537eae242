//! How a GPU is set up, and what it reports: plain data, shared by devices, their shadows and the allocators.

/// Bytes that cuBLASLt gets on each GPU for split-K sums and the like; what PyTorch gives Hopper. One product at a time uses
/// them.
pub(crate) const PRODUCT_WORKSPACE: usize = 32 << 20;

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
    /// The most that tensors held since [`reset_peak`](crate::device::reset_peak).
    pub peak: u64,
    /// The most that was taken from the driver for tensors since [`reset_peak`](crate::device::reset_peak), with the pool's slack.
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
