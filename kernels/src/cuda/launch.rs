//! Launching our own kernels by name.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Result;
use cudarc::driver::sys::{CUdevice_attribute_enum, CUfunction_attribute_enum};
use cudarc::driver::{CudaFunction, CudaModule};
use cudarc::nvrtc::Ptx;

use super::{Card, told};
use crate::gpu::File;

/// The fat binary of each file of `cuda/`.
macro_rules! images {
    ($($file:ident = $name:literal),* $(,)?) => {
        impl File {
            fn image(self) -> &'static [u8] {
                match self {
                    $(Self::$file => include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin"))),*
                }
            }
        }
    };
}
images!(
    Norm = "norm",
    Elementwise = "elementwise",
    Weight = "weight",
    Optimiser = "optimiser",
    Random = "random",
    Volume = "volume",
    Conv3d = "conv3d",
    Softmax = "softmax",
    Int8 = "int8"
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

impl Card {
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
    card: &'a Card,
    function: CudaFunction,
    /// Each argument in eight bytes; smaller ones in the low end, where a little-endian machine looks for them.
    arguments: Vec<u64>,
    shared_bytes: u32,
}

impl<'a> Launch<'a> {
    pub(crate) fn new(card: &'a Card, file: File, name: &str) -> Result<Self> {
        Ok(Self { card, function: card.function(file, name)?, arguments: Vec::new(), shared_bytes: 0 })
    }

    /// A device address.
    pub(crate) fn address(mut self, address: u64) -> Self {
        self.arguments.push(address);
        self
    }

    /// Dynamic shared memory.
    pub(crate) fn shared(mut self, bytes: usize) -> Self {
        self.shared_bytes = bytes as u32;
        self
    }

    /// How many multiprocessors the GPU has.
    pub(crate) fn multiprocessors(&self) -> Result<usize> {
        let count = CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        Ok(told(self.card.context.attribute(count))? as usize)
    }

    /// Launches it on `blocks` blocks of `threads` threads.
    pub(crate) fn go(mut self, blocks: u32, threads: u32) -> Result<()> {
        told(self.card.context.bind_to_thread())?;
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
                self.card.stream.cu_stream(),
                &mut pointers,
            )
        })
    }
}
