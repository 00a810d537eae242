//! Tensors that are made, not read: for measuring speed and memory without a checkpoint.

use candle_core::{DType, Device, Tensor};
use kernels::random::Key;

use crate::Result;

/// Numbers before they repeat: enough that no cache holds them, and quickly made.
const PERIOD: usize = 1 << 20;
/// Deviation of the numbers.
const DEVIATION: f32 = 0.02;

/// The tensor `name` of `seed`: ones for gains of norms, zeros for other vectors, else normal numbers of deviation 0.02.
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
    let count: usize = shape.iter().product();
    let mut values = Key::new(seed, name, &[]).normals(count.min(PERIOD));
    values.iter_mut().for_each(|value| *value *= DEVIATION);
    let period = Tensor::new(values.as_slice(), device)?.to_dtype(dtype)?;
    let repeated = period.repeat(count.div_ceil(PERIOD).max(1))?.narrow(0, 0, count)?;
    Ok(repeated.contiguous()?.reshape(shape)?)
}
