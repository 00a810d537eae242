//! What a GPU's own error means for its user.
//!
//! The driver's errors carry CUDA's codes, wrapped by the tensor library. Errors of CUDA's other libraries, and errors that
//! were turned into text, are recognised by CUDA's names in them, which are stable.

use candle_core::Error;

/// A failure of a GPU that the user can do something about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Out of memory: the card's, or the limit that was set.
    OutOfMemory,
    /// There is no GPU, or none with that index.
    NoGpu,
    /// The driver is older than what this program was built with.
    OldDriver,
    /// The GPU was lost, or earlier work corrupted its context; this process can no longer use it.
    Lost,
}

/// Codes of the driver (`CUresult`, cuda.h), their names without `CUDA_ERROR_`, and what they mean.
const CODES: [(u32, &str, Fault); 22] = [
    (2, "OUT_OF_MEMORY", Fault::OutOfMemory),
    (34, "STUB_LIBRARY", Fault::NoGpu),
    (46, "DEVICE_UNAVAILABLE", Fault::NoGpu),
    (100, "NO_DEVICE", Fault::NoGpu),
    (101, "INVALID_DEVICE", Fault::NoGpu),
    (214, "ECC_UNCORRECTABLE", Fault::Lost),
    (220, "NVLINK_UNCORRECTABLE", Fault::Lost),
    (222, "UNSUPPORTED_PTX_VERSION", Fault::OldDriver),
    (700, "ILLEGAL_ADDRESS", Fault::Lost),
    (702, "LAUNCH_TIMEOUT", Fault::Lost),
    (710, "ASSERT", Fault::Lost),
    (714, "HARDWARE_STACK_ERROR", Fault::Lost),
    (715, "ILLEGAL_INSTRUCTION", Fault::Lost),
    (716, "MISALIGNED_ADDRESS", Fault::Lost),
    (717, "INVALID_ADDRESS_SPACE", Fault::Lost),
    (718, "INVALID_PC", Fault::Lost),
    (719, "LAUNCH_FAILED", Fault::Lost),
    (802, "SYSTEM_NOT_READY", Fault::NoGpu),
    (803, "SYSTEM_DRIVER_MISMATCH", Fault::OldDriver),
    (804, "COMPAT_NOT_SUPPORTED_ON_DEVICE", Fault::OldDriver),
    (911, "EXTERNAL_DEVICE", Fault::Lost),
    (999, "UNKNOWN", Fault::Lost),
];

/// Names in errors of CUDA's other libraries, and what they mean.
const NAMES: [(&str, Fault); 4] = [
    ("CUBLAS_STATUS_ALLOC_FAILED", Fault::OutOfMemory),
    ("OUT_OF_MEMORY", Fault::OutOfMemory),
    ("out of memory", Fault::OutOfMemory),
    ("INSUFFICIENT_DRIVER", Fault::OldDriver),
];

impl Fault {
    /// The fault that caused an error of the tensor library.
    pub fn of(error: &Error) -> Option<Self> {
        match error {
            Error::WithBacktrace { inner, .. }
            | Error::Context { inner, .. }
            | Error::WithPath { inner, .. } => Self::of(inner),
            #[cfg(feature = "cuda")]
            Error::Cuda(inner) => match driver_code(inner.as_ref()) {
                Some(code) => Self::of_code(code),
                None => Self::named_in(&inner.to_string()),
            },
            other => Self::named_in(&other.to_string()),
        }
    }

    /// The fault of a driver's error code.
    pub fn of_code(code: u32) -> Option<Self> {
        CODES.iter().find(|(known, ..)| *known == code).map(|&(.., fault)| fault)
    }

    /// The fault named in the text of an error.
    pub fn named_in(text: &str) -> Option<Self> {
        let is_named = |name: &str| text.split("CUDA_ERROR_").skip(1).any(|rest| is_word(rest, name));
        let by_code = CODES.iter().find(|(_, name, _)| is_named(name)).map(|&(.., fault)| fault);
        by_code.or_else(|| NAMES.iter().find(|(name, _)| text.contains(name)).map(|&(_, fault)| fault))
    }
}

/// Whether `text` begins with `name`, and with no longer one.
fn is_word(text: &str, name: &str) -> bool {
    let rest = text.strip_prefix(name);
    rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_'))
}

/// The driver's code in an error of candle's CUDA back end.
#[cfg(feature = "cuda")]
fn driver_code(error: &(dyn std::error::Error + Send + Sync + 'static)) -> Option<u32> {
    use candle_core::cuda_backend::CudaError;
    use cudarc::driver::DriverError;
    if let Some(DriverError(code)) = error.downcast_ref::<DriverError>() {
        return Some(*code as u32);
    }
    match error.downcast_ref::<CudaError>()? {
        CudaError::Cuda(DriverError(code)) => Some(*code as u32),
        CudaError::Load { cuda: DriverError(code), .. } => Some(*code as u32),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_known_by_code_and_by_cudas_own_names_alone() {
        assert_eq!(Fault::of_code(2), Some(Fault::OutOfMemory));
        assert_eq!(Fault::of_code(716), Some(Fault::Lost));
        assert_eq!(Fault::of_code(1), None);
        let fault = |text: &str| Fault::of(&Error::msg(text).context("while loading"));
        assert_eq!(fault("DriverError(CUDA_ERROR_MISALIGNED_ADDRESS, \"misaligned\")"), Some(Fault::Lost));
        assert_eq!(fault("cuBLASLt: CublasError(CUBLAS_STATUS_ALLOC_FAILED)"), Some(Fault::OutOfMemory));
        assert_eq!(fault("CUDA_ERROR_INVALID_DEVICE_POINTER"), None);
        assert_eq!(fault("shapes differ"), None);
    }
}
