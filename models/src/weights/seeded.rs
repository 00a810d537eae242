//! Generated tensors, for measuring speed and memory without a checkpoint.

use kernels::random::Key;
use kernels::{DType, Device, Tensor};

use crate::Result;

/// Deviation of the numbers.
const DEVIATION: f32 = 0.02;

/// The tensor `name` of `seed`: ones for gains of norms, zeros for other vectors, else numbers of deviation 0.02.
pub(super) fn tensor(
    name: &str,
    shape: &[usize],
    seed: u64,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    if name.ends_with("gamma") || (shape.len() == 1 && name.contains("norm") && name.ends_with("weight")) {
        return Ok(Tensor::ones(shape, dtype, device)?);
    }
    if shape.len() == 1 {
        return Ok(Tensor::zeros(shape, dtype, device)?);
    }
    Ok(kernels::random::fill(shape, Key::new(seed, name, &[]), DEVIATION, dtype, device)?)
}
