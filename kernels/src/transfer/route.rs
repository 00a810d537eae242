//! Constants and choices shared by links and their CUDA implementation.

/// Pinned host memory is allocated in multiples of this, in bytes.
pub const HOST_GRAIN: u64 = 2 << 20;

/// How tensors are copied between two GPUs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Route {
    /// Directly if the hardware can (peer access), else through host memory.
    #[default]
    Auto,
    /// Always through pinned host memory (GeForce pairs have no peer access).
    Host,
}
