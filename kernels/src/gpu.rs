//! The host side of operations on a GPU: which kernel runs for which tensors, and what is allocated for it.
//!
//! A [`Gpu`] is a real one or the shadow of one, and the code of an operation that tests its tensors, allocates its result
//! and launches its kernel is the same for both: on a shadow [`Gpu::empty`] returns shadows and a [`Launch`] does nothing. So
//! a plan for a GPU takes the decisions that the GPU will take, in a build without CUDA too, and no operation has a
//! second description of what it allocates. Only what the libraries take for themselves is described beside their calls:
//! cuBLASLt's workspace ([`crate::product`]) and cuDNN's ([`crate::attention`]).

use candle_core::{DType, Result, Shape};

use crate::tensor::{Device, ShadowGpu, Tensor};
#[cfg(feature = "cuda")]
use {crate::cuda, std::sync::Arc};

/// A GPU, or the shadow of one.
pub(crate) enum Gpu {
    #[cfg(feature = "cuda")]
    Card(Arc<cuda::Card>),
    Shadow(ShadowGpu, Device),
}

/// A file of `cuda/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum File {
    Norm,
    Elementwise,
    Weight,
    Optimiser,
    Random,
    Volume,
    Conv3d,
    Softmax,
    Int8,
}

impl Gpu {
    /// The GPU that `device` is, or is the shadow of.
    pub(crate) fn of(device: &Device) -> Option<Self> {
        #[cfg(feature = "cuda")]
        if let Some(card) = device.card() {
            return Some(Self::Card(card.clone()));
        }
        device.as_shadow_gpu().map(|gpu| Self::Shadow(gpu, device.clone()))
    }

    /// An uninitialised tensor: the caller writes all of it in the launch that follows.
    pub(crate) fn empty(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Card(card) => card.empty(shape.into(), dtype),
            Self::Shadow(_, device) => Ok(Tensor::shadow(shape, dtype, device)),
        }
    }
}

/// A launch being built: arguments in the order of the kernel's parameters.
pub(crate) struct Launch<'a>(Target<'a>);

enum Target<'a> {
    #[cfg(feature = "cuda")]
    Card(cuda::Launch<'a>),
    Shadow(std::marker::PhantomData<&'a ()>),
}

impl<'a> Launch<'a> {
    /// Of the kernel `name` in `file`.
    pub(crate) fn new(gpu: &'a Gpu, file: File, name: &str) -> Result<Self> {
        match gpu {
            #[cfg(feature = "cuda")]
            Gpu::Card(card) => Ok(Self(Target::Card(cuda::Launch::new(card, file, name)?))),
            Gpu::Shadow(..) => {
                let _ = (file, name);
                Ok(Self(Target::Shadow(std::marker::PhantomData)))
            }
        }
    }

    /// A contiguous tensor.
    pub(crate) fn tensor(self, x: &Tensor) -> Result<Self> {
        if !x.is_contiguous() {
            candle_core::bail!("a kernel got a tensor {:?} that is not contiguous", x.shape());
        }
        let address = address(x)?;
        Ok(self.address(address))
    }

    /// A contiguous tensor, or a null pointer.
    pub(crate) fn maybe(self, x: Option<&Tensor>) -> Result<Self> {
        match x {
            Some(x) => self.tensor(x),
            None => Ok(self.address(0)),
        }
    }

    /// A device address.
    pub(crate) fn address(self, address: u64) -> Self {
        match self.0 {
            #[cfg(feature = "cuda")]
            Target::Card(launch) => Self(Target::Card(launch.address(address))),
            Target::Shadow(_) => {
                let _ = address;
                self
            }
        }
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
    pub(crate) fn shared(self, bytes: usize) -> Self {
        match self.0 {
            #[cfg(feature = "cuda")]
            Target::Card(launch) => Self(Target::Card(launch.shared(bytes))),
            Target::Shadow(_) => {
                let _ = bytes;
                self
            }
        }
    }

    /// One block of `threads` for each of `rows`.
    pub(crate) fn rows(self, rows: usize, threads: usize) -> Result<()> {
        self.go(rows as u32, threads as u32)
    }

    /// As many blocks of `threads` as the GPU runs at the same time with one on each multiprocessor, and at most `items`: the kernel's blocks
    /// take one item after another.
    pub(crate) fn resident(self, items: usize, threads: usize) -> Result<()> {
        let together = match &self.0 {
            #[cfg(feature = "cuda")]
            Target::Card(launch) => launch.multiprocessors()?,
            Target::Shadow(_) => items,
        };
        self.go(items.min(together) as u32, threads as u32)
    }

    /// Enough blocks for `items` in a grid-stride loop.
    pub(crate) fn each(self, items: usize) -> Result<()> {
        const THREADS: usize = 256;
        const MOST_BLOCKS: usize = 132 * 16;
        self.go(items.div_ceil(THREADS).clamp(1, MOST_BLOCKS) as u32, THREADS as u32)
    }

    fn go(self, blocks: u32, threads: u32) -> Result<()> {
        match self.0 {
            #[cfg(feature = "cuda")]
            Target::Card(launch) => launch.go(blocks, threads),
            Target::Shadow(_) => {
                let _ = (blocks, threads);
                Ok(())
            }
        }
    }
}

/// The address of a tensor's first number, whatever its strides. A shadow's memory begins at an address as even as the
/// allocator's are.
pub(crate) fn address(x: &Tensor) -> Result<u64> {
    #[cfg(feature = "cuda")]
    if !x.is_shadow() {
        return cuda::address(x);
    }
    Ok((x.layout().start_offset() * x.dtype().size_in_bytes()) as u64)
}

/// The suffix of kernel names for a dtype, where there are kernels for it.
pub(crate) fn suffix(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::F32 => Some("f32"),
        DType::BF16 => Some("bf16"),
        DType::F16 => Some("f16"),
        _ => None,
    }
}

/// Whether the kernels can read these, four numbers at a time.
pub(crate) fn fits(tensors: &[&Tensor]) -> Result<bool> {
    for x in tensors {
        let is_aligned =
            x.is_contiguous() && address(x)?.is_multiple_of(4 * x.dtype().size_in_bytes() as u64);
        if !is_aligned || x.elem_count() == 0 {
            return Ok(false);
        }
    }
    Ok(true)
}
