//! Launching our own kernels by name.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Result, Tensor};
use cudarc::driver::sys::CUfunction_attribute_enum;
use cudarc::driver::{CudaFunction, CudaModule};
use cudarc::nvrtc::Ptx;

use super::tensor::pointer;
use super::{Gpu, told};

/// The fat binaries, one for each file of `cuda/`.
macro_rules! files {
    ($($variant:ident = $name:literal),* $(,)?) => {
        /// A file of `cuda/`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub(crate) enum File { $(#[doc = $name] $variant),* }

        impl File {
            fn image(self) -> &'static [u8] {
                match self {
                    $(Self::$variant => include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin"))),*
                }
            }
        }
    };
}
files!(
    Norm = "norm",
    Elementwise = "elementwise",
    Weight = "weight",
    Optimiser = "optimiser",
    Random = "random",
    Volume = "volume",
    Conv3d = "conv3d",
    Softmax = "softmax"
);

/// The loaded kernels of one GPU.
#[derive(Default)]
pub(crate) struct Modules {
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    files: HashMap<File, Arc<CudaModule>>,
    functions: HashMap<String, CudaFunction>,
}

impl Gpu {
    fn function(&self, file: File, name: &str) -> Result<CudaFunction> {
        let mut loaded = self.modules.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = loaded.functions.get(name) {
            return Ok(function.clone());
        }
        let module = match loaded.files.get(&file) {
            Some(module) => module.clone(),
            None => {
                let module = told(self.context.load_module(Ptx::from_binary(file.image().to_vec())))?;
                loaded.files.insert(file, module.clone());
                module
            }
        };
        let function = told(module.load_function(name))?;
        loaded.functions.insert(name.to_owned(), function.clone());
        Ok(function)
    }
}

/// Dynamic shared memory that every kernel may have; more is to be asked for, up to 99 KiB on every card from 8.6 on.
const SHARED_UNASKED: u32 = 48 << 10;
const MOST_SHARED: CUfunction_attribute_enum =
    CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;

/// A launch in the making: arguments in the order of the kernel's parameters.
pub(crate) struct Launch<'a> {
    gpu: &'a Gpu,
    function: CudaFunction,
    /// Each argument in eight bytes; smaller ones in the low end, where a little-endian machine looks for them.
    arguments: Vec<u64>,
    shared_bytes: u32,
}

impl<'a> Launch<'a> {
    pub(crate) fn new(gpu: &'a Gpu, file: File, name: &str) -> Result<Self> {
        Ok(Self { gpu, function: gpu.function(file, name)?, arguments: Vec::new(), shared_bytes: 0 })
    }

    /// A contiguous tensor.
    pub(crate) fn tensor(self, x: &Tensor) -> Result<Self> {
        let pointer = pointer(x)?;
        Ok(self.address(pointer))
    }

    /// A contiguous tensor, or a null pointer.
    pub(crate) fn maybe(self, x: Option<&Tensor>) -> Result<Self> {
        match x {
            Some(x) => self.tensor(x),
            None => Ok(self.address(0)),
        }
    }

    /// A device address.
    pub(crate) fn address(mut self, address: u64) -> Self {
        self.arguments.push(address);
        self
    }

    /// A `size_t`.
    pub(crate) fn size(self, value: usize) -> Self {
        self.address(value as u64)
    }

    /// An `int` or `uint32_t`.
    pub(crate) fn int(self, value: usize) -> Self {
        self.address(value as u64)
    }

    /// A `float`.
    pub(crate) fn float(self, value: f64) -> Self {
        self.address(u64::from((value as f32).to_bits()))
    }

    /// Dynamic shared memory.
    pub(crate) fn shared(mut self, bytes: usize) -> Self {
        self.shared_bytes = bytes as u32;
        self
    }

    /// One block of `threads` for each of `rows`.
    pub(crate) fn rows(self, rows: usize, threads: usize) -> Result<()> {
        self.go(rows as u32, threads as u32)
    }

    /// Enough blocks for `items` in a grid-stride loop.
    pub(crate) fn each(self, items: usize) -> Result<()> {
        const THREADS: usize = 256;
        const MOST_BLOCKS: usize = 132 * 16;
        self.go(items.div_ceil(THREADS).clamp(1, MOST_BLOCKS) as u32, THREADS as u32)
    }

    fn go(mut self, blocks: u32, threads: u32) -> Result<()> {
        told(self.gpu.context.bind_to_thread())?;
        if self.shared_bytes > SHARED_UNASKED {
            told(self.function.set_attribute(MOST_SHARED, self.shared_bytes as i32))?;
        }
        let mut pointers: Vec<*mut c_void> =
            self.arguments.iter_mut().map(|argument| std::ptr::from_mut(argument).cast()).collect();
        // SAFETY: the op that launches passes what the kernel of that name takes, in its order; tensors are
        // contiguous, of the dtype in the name, and outlive their use in stream order.
        told(unsafe {
            cudarc::driver::result::launch_kernel(
                self.function.cu_function(),
                (blocks, 1, 1),
                (threads, 1, 1),
                self.shared_bytes,
                self.gpu.stream.cu_stream(),
                &mut pointers,
            )
        })
    }
}
