//! What a GPU's own error means for its user.
//!
//! The tensor library hands errors of the driver on as text, under layers of its own; the names in it are CUDA's and
//! stable.

/// A failure of a GPU that its user can do something about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Tensors did not fit: into the card, or under the limit that was set.
    OutOfMemory,
    /// There is no GPU, or none of that number.
    NoGpu,
    /// The driver is older than what this program was built with.
    OldDriver,
    /// The GPU fell out, or work before this call broke it; nothing more can be done in this process.
    Lost,
}

/// Names in errors, with what they mean.
const NAMES: [(&str, Fault); 15] = [
    ("OUT_OF_MEMORY", Fault::OutOfMemory),
    ("CUBLAS_STATUS_ALLOC_FAILED", Fault::OutOfMemory),
    ("out of memory", Fault::OutOfMemory),
    ("CUDA_ERROR_NO_DEVICE", Fault::NoGpu),
    ("CUDA_ERROR_INVALID_DEVICE", Fault::NoGpu),
    ("CUDA_ERROR_STUB_LIBRARY", Fault::NoGpu),
    ("CUDA_ERROR_DEVICE_UNAVAILABLE", Fault::NoGpu),
    ("CUDA_ERROR_UNSUPPORTED_PTX_VERSION", Fault::OldDriver),
    ("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", Fault::OldDriver),
    ("CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE", Fault::OldDriver),
    ("INSUFFICIENT_DRIVER", Fault::OldDriver),
    ("CUDA_ERROR_ILLEGAL_ADDRESS", Fault::Lost),
    ("CUDA_ERROR_LAUNCH_FAILED", Fault::Lost),
    ("CUDA_ERROR_ECC_UNCORRECTABLE", Fault::Lost),
    ("CUDA_ERROR_HARDWARE_STACK_ERROR", Fault::Lost),
];

impl Fault {
    /// The fault that the text of an error names.
    pub fn named_in(text: &str) -> Option<Self> {
        NAMES.iter().find(|(name, _)| text.contains(name)).map(|&(_, fault)| fault)
    }
}
