//! What links and the copies of a GPU both go by.

/// Pinned host memory comes in multiples of this, in bytes.
pub const HOST_GRAIN: u64 = 2 << 20;

/// How tensors go between two GPUs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Route {
    /// Straight where the hardware can, else through host memory.
    #[default]
    Auto,
    /// Through pinned host memory, whatever the hardware can (GeForce pairs have no peer access).
    Host,
}
