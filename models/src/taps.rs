//! Convolutions over frames of features as linear layers over windows of them.

use kernels::Tensor;

use crate::Result;

/// The windows of `taps` frames of `x` [b, f, c], each `stride` frames after the one before, the earliest frame of each first:
/// [b, 1 + (f - taps) / stride, taps c].
///
/// # Errors
/// Fewer frames than taps.
pub(crate) fn windows(x: &Tensor, taps: usize, stride: usize) -> Result<Tensor> {
    let (batch, frames, width) = x.dims3()?;
    let Some(free) = frames.checked_sub(taps) else {
        return Err(crate::Error::Mismatch(format!("{frames} frames are fewer than the {taps} of a window")));
    };
    let count = 1 + free / stride;
    let tap = |tap: usize| -> Result<Tensor> {
        let run = x.narrow(1, tap, (count - 1) * stride + 1)?;
        if stride == 1 {
            return Ok(run.contiguous()?);
        }
        let run = run.pad_with_zeros(1, 0, stride - 1)?.reshape((batch, count, stride, width))?;
        Ok(run.narrow(2, 0, 1)?.squeeze(2)?.contiguous()?)
    };
    Ok(Tensor::cat(&(0..taps).map(tap).collect::<Result<Vec<_>>>()?, 2)?)
}

/// The matrix [out, taps in] that [`windows`] are multiplied with, of a kernel [out, in, taps].
///
/// # Errors
/// When the tensor library fails.
pub(crate) fn matrix(kernel: &Tensor) -> Result<Tensor> {
    let (out, input, taps) = kernel.dims3()?;
    Ok(kernel.transpose(1, 2)?.contiguous()?.reshape((out, taps * input))?)
}
