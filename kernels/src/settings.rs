//! How a GPU is set up, and what it reports: plain data, shared by devices, their shadows and the allocators.

/// Bytes of cuBLASLt's workspace on each GPU, for split-K sums and the like: PyTorch's size for Hopper. One product at a time
/// uses it.
pub(crate) const PRODUCT_WORKSPACE: usize = 32 << 20;

/// How a GPU is set up when it is opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Settings {
    /// Most bytes that tensors may take; larger allocations fail. Default: no limit.
    pub memory_limit: Option<u64>,
    /// Whether two runs must give the same bits. Default: no, the fastest engines.
    pub repeatability: Repeatability,
}

/// Whether two runs on the same hardware must give the same bits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Repeatability {
    /// The fastest engines; cuDNN's attention backward sums in no fixed order.
    #[default]
    Fast,
    /// Only deterministic engines.
    BitForBit,
}

/// Bytes of a GPU's memory, and statistics of its allocator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Total memory of the card.
    pub total: u64,
    /// Allocated to tensors now.
    pub used: u64,
    /// The most that was allocated to tensors since [`reset_peak`](crate::device::reset_peak).
    pub peak: u64,
    /// The most that was reserved from the driver for tensors since [`reset_peak`](crate::device::reset_peak), the pool's unused
    /// part included.
    pub reserved_peak: u64,
    /// How often free fragments were joined for a tensor, since the device was opened.
    pub joined: u64,
    /// How often the host had to wait for that.
    pub waited: u64,
}

/// Where a GPU's tensors get their memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Allocator {
    /// This crate's allocator, which joins free fragments: a tensor fits if the free bytes suffice.
    Own,
    /// The driver's pool alone, which fragments between large tensors.
    Driver {
        /// Why not this crate's.
        why: &'static str,
    },
}

impl std::fmt::Display for Allocator {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Own => f.write_str("own allocator, which joins free fragments"),
            Self::Driver { why } => {
                write!(
                    f,
                    "the driver's pool ({why}); its fragmentation may take 2 to 3 GiB that no plan counts"
                )
            }
        }
    }
}
