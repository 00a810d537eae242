//! Resizing of pictures for a model, as PyTorch does by default.

use kernels::{DType, Device, Tensor};

use crate::Result;

/// The slope of the cubic kernel: PyTorch's.
const A: f32 = -0.75;

/// `x` [b, c, h, w] at another `(height, width)`: bicubic, no antialiasing, centres aligned, edges repeated; values may
/// leave their range. f32, on the device of `x`.
///
/// Source: PyTorch's `interpolate(mode="bicubic", align_corners=False)`, by which the official code resizes pictures.
pub fn resize_bicubic(x_bchw: &Tensor, (height, width): (usize, usize)) -> Result<Tensor> {
    let (batch, channels, from_height, from_width) = x_bchw.dims4()?;
    let x = x_bchw.to_dtype(DType::F32)?.contiguous()?;
    if (from_height, from_width) == (height, width) {
        return Ok(x);
    }
    // Both axes are sums of four neighbours: products with thin bands.
    let along_width = band(from_width, width, x.device())?.t()?.contiguous()?;
    let wide = x.reshape((batch * channels * from_height, from_width))?.matmul(&along_width)?;
    let wide = wide.reshape((batch * channels, from_height, width))?;
    let along_height = band(from_height, height, x.device())?;
    let along_height = along_height.broadcast_as((batch * channels, height, from_height))?.contiguous()?;
    Ok(along_height.matmul(&wide)?.reshape((batch, channels, height, width))?)
}

/// The weights [to, from] of each new line on the old ones.
fn band(from: usize, to: usize, device: &Device) -> Result<Tensor> {
    let mut rows = vec![0f32; to * from];
    // In f32, as the reference has it: a place at column 100 is rounded to 8e-6 there, which pixels show.
    let scale = from as f32 / to as f32;
    for (line, row) in rows.chunks_exact_mut(from).enumerate() {
        let at = scale * (line as f32 + 0.5) - 0.5;
        let (first, t) = (at.floor() as i64 - 1, at - at.floor());
        for (tap, weight) in [t + 1.0, t, 1.0 - t, 2.0 - t].map(cubic).into_iter().enumerate() {
            let column = (first + tap as i64).clamp(0, from as i64 - 1);
            row[column as usize] += weight;
        }
    }
    Ok(Tensor::from_vec(rows, (to, from), device)?)
}

/// The cubic convolution kernel at distance `x` >= 0: Keys 1981, with [`A`].
fn cubic(x: f32) -> f32 {
    match x {
        x if x <= 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
        x => ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A,
    }
}
