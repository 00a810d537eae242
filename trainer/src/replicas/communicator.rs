//! What replicas exchange: sums of gradients, small messages, and nothing else.

use kernels::{DType, Device, Tensor};

use super::error::Result;

/// The connections of a rank to all others. Every rank calls the same methods in the same order.
///
/// Sums are in f32 and in the order of the ranks, `((r0 + r1) + r2) + ...`, whatever carries them, so they have the same bits
/// on all ranks, in every run of one size, and with every implementation.
pub trait Communicator: Send {
    /// What carries tensors, for messages.
    fn name(&self) -> &'static str;

    /// The sums over all ranks of tensors of f32 that have the same shapes in the same order everywhere, each on the device of
    /// this rank's own tensor.
    ///
    /// # Errors
    /// A rank that fails, is silent or is out of step; a device that fails.
    fn sum(&mut self, tensors: Vec<Tensor>) -> crate::Result<Vec<Tensor>>;

    /// The message of each rank, in the order of the ranks; at most some megabytes together.
    ///
    /// # Errors
    /// A rank that fails, is silent or is out of step.
    fn gather(&mut self, message: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// What rank 0 gives, on all ranks; what the others give is ignored. As long as memory allows.
    ///
    /// # Errors
    /// A rank that fails, is silent or is out of step.
    fn broadcast(&mut self, bytes: Vec<u8>) -> Result<Vec<u8>>;

    /// Waits until all ranks are here.
    ///
    /// # Errors
    /// A rank that fails, is silent or is out of step.
    fn barrier(&mut self) -> Result<()> {
        self.gather(&[]).map(drop)
    }
}

/// The one rank of a run without replicas: nothing is exchanged.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

impl Communicator for Alone {
    fn name(&self) -> &'static str {
        "nothing"
    }

    fn sum(&mut self, tensors: Vec<Tensor>) -> crate::Result<Vec<Tensor>> {
        Ok(tensors)
    }

    fn gather(&mut self, message: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![message.to_vec()])
    }

    fn broadcast(&mut self, bytes: Vec<u8>) -> Result<Vec<u8>> {
        Ok(bytes)
    }
}

/// Seconds in which `world` replicas sum `bytes` over links of `rate` bytes a second each way: each sends its parts to the
/// others, and then its part of the sum to all.
pub fn exchange_seconds(bytes: f64, world: usize, rate: f64) -> f64 {
    let others = (world - 1) as f64 / world as f64;
    2.0 * others * bytes / rate
}

/// Numbers of consecutive tensors that are exchanged together.
pub(super) const BUCKET: usize = 4 << 20;

/// Calls `sum` with consecutive `tensors`, [`BUCKET`] numbers at a time or one tensor that has more; the sums of all. A bucket
/// is dropped when its sums are there.
pub(super) fn in_buckets(
    tensors: Vec<Tensor>,
    mut sum: impl FnMut(&[Tensor]) -> crate::Result<Vec<Tensor>>,
) -> crate::Result<Vec<Tensor>> {
    let mut sums = Vec::with_capacity(tensors.len());
    let (mut bucket, mut count) = (Vec::new(), 0);
    for tensor in tensors {
        if !bucket.is_empty() && count + tensor.elem_count() > BUCKET {
            sums.extend(sum(&std::mem::take(&mut bucket))?);
            count = 0;
        }
        count += tensor.elem_count();
        bucket.push(tensor);
    }
    if !bucket.is_empty() {
        sums.extend(sum(&bucket)?);
    }
    Ok(sums)
}

/// The numbers of `tensors`, one behind the other, in host memory.
pub(super) fn flat(tensors: &[Tensor]) -> kernels::Result<Vec<f32>> {
    let mut numbers = Vec::with_capacity(tensors.iter().map(Tensor::elem_count).sum());
    for tensor in tensors {
        let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        numbers.extend(tensor.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(numbers)
}

/// `numbers` as tensors of the shapes and on the devices of `like`.
pub(super) fn shaped(numbers: &[f32], like: &[Tensor]) -> kernels::Result<Vec<Tensor>> {
    let mut at = 0;
    let next = |tensor: &Tensor| {
        let own = &numbers[at..at + tensor.elem_count()]; // as many as `flat` made of tensors of these shapes
        at += own.len();
        Tensor::from_slice(own, tensor.shape(), tensor.device())
    };
    like.iter().map(next).collect()
}
