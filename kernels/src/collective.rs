//! Exchange between the GPUs of several processes, over NCCL.
//!
//! Only copies are NCCL's work here: sums are made by the caller, in an order of its own, so that they do not depend on the
//! algorithm that NCCL picks for a topology.

use crate::{DType, Device, Result, Tensor};

/// Bytes of what processes need to find each other.
pub const ID_BYTES: usize = 128;

/// A new identity for a group, to be made by one process and given to all.
///
/// # Errors
/// Why NCCL cannot be loaded or used.
pub fn new_id() -> std::result::Result<[u8; ID_BYTES], String> {
    #[cfg(feature = "cuda")]
    return crate::cuda::nccl::new_id();
    #[cfg(not(feature = "cuda"))]
    Err("this build is without CUDA".to_owned())
}

/// A GPU's place in a group of as many processes as there are ranks.
pub struct Collective {
    world: usize,
    #[cfg(feature = "cuda")]
    inner: crate::cuda::nccl::Group,
}

impl std::fmt::Debug for Collective {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Collective(of {})", self.world)
    }
}

impl Collective {
    /// Joins the group `id` as `rank` of `world` with the GPU `device`. Waits until all ranks have.
    ///
    /// # Errors
    /// Why NCCL cannot be loaded, or does not take the GPU.
    pub fn join(
        device: &Device,
        id: [u8; ID_BYTES],
        (rank, world): (usize, usize),
    ) -> std::result::Result<Self, String> {
        #[cfg(feature = "cuda")]
        {
            let card = device.card().ok_or("the device is no GPU")?;
            let inner = crate::cuda::nccl::Group::join(card.clone(), id, (rank, world))?;
            Ok(Self { world, inner })
        }
        #[cfg(not(feature = "cuda"))]
        {
            let _ = (device, id, rank, world);
            Err("this build is without CUDA".to_owned())
        }
    }

    /// Gives row j of `x` [world, n] (f32, contiguous) to rank j; what each rank gave to this one, [world, n]. Queued on the
    /// device's stream.
    ///
    /// # Errors
    /// A tensor of another shape, and what NCCL says.
    pub fn all_to_all(&self, x: &Tensor) -> Result<Tensor> {
        self.check(x, 2)?;
        #[cfg(feature = "cuda")]
        return self.inner.all_to_all(x);
        #[cfg(not(feature = "cuda"))]
        Err(candle_core::Error::NotCompiledWithCudaSupport)
    }

    /// The `x` `[n]` (f32, contiguous) of all ranks, [world, n]. Queued on the device's stream.
    ///
    /// # Errors
    /// A tensor of another shape, and what NCCL says.
    pub fn all_gather(&self, x: &Tensor) -> Result<Tensor> {
        self.check(x, 1)?;
        #[cfg(feature = "cuda")]
        return self.inner.all_gather(x);
        #[cfg(not(feature = "cuda"))]
        Err(candle_core::Error::NotCompiledWithCudaSupport)
    }

    fn check(&self, x: &Tensor, rank: usize) -> Result<()> {
        let is_right = x.rank() == rank && x.dtype() == DType::F32 && x.is_contiguous();
        match is_right && (rank == 1 || x.dim(0)? == self.world) {
            true => Ok(()),
            false => {
                crate::bail!("{:?} {:?} is not what {} ranks exchange", x.shape(), x.dtype(), self.world)
            }
        }
    }
}
