//! Rearranging frames and pixels of a video, forward only: what the VAEs do between their convolutions.

use crate::Tensor;
use candle_core::{DType, Result, bail};
use rayon::prelude::*;

use crate::cpu::{computed, is_cpu_f32};
use crate::gpu::{File, Gpu, Launch, suffix};
use crate::profile::{self, Class};
use crate::video::{pixels, planes};

/// Doubles height and width by repeating each pixel: `[B,C,T,H,W]` to `[B,C,T,2H,2W]`.
pub fn upsample_nearest_2x(x_bcthw: &Tensor) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x_bcthw.device());
    let (b, c, t, h, w) = x_bcthw.dims5()?;
    on_gpu!(x_bcthw, |gpu| gpu.upsample_nearest_2x(x_bcthw)?);
    if !is_cpu_f32(x_bcthw) {
        let grid = x_bcthw.reshape((b * c * t, h, 1, w, 1))?.broadcast_as((b * c * t, h, 2, w, 2))?;
        return grid.contiguous()?.reshape((b, c, t, 2 * h, 2 * w));
    }
    computed([x_bcthw], (b, c, t, 2 * h, 2 * w), |[x]| {
        let mut y = vec![0f32; 4 * x.len()];
        y.par_chunks_mut(4 * w.max(1)).zip(x.par_chunks(w.max(1))).for_each(|(two_rows, row)| {
            let (upper, lower) = two_rows.split_at_mut(2 * w);
            upper.chunks_exact_mut(2).zip(row).for_each(|(pair, x)| pair.fill(*x));
            lower.copy_from_slice(upper);
        });
        y
    })
}

/// Turns pairs of channels into pairs of frames: `[B,2C,T,H,W]` to `[B,C,2T,H,W]`, frame 2i from the first C channels of
/// time i and frame 2i+1 from the others. Source: Wan-Video/Wan2.1 `wan/modules/vae.py`, `Resample`, upsample3d.
pub fn frames_from_channels(x_bcthw: &Tensor) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x_bcthw.device());
    let (b, c2, t, h, w) = x_bcthw.dims5()?;
    if c2 % 2 != 0 {
        bail!("frames_from_channels: {c2} channels are not pairs");
    }
    let rows = pixels(x_bcthw)?;
    if rows.is_contiguous() {
        let x = rows.reshape((b, t, h * w, 2, c2 / 2))?.transpose(2, 3)?;
        return planes(&x.contiguous()?.reshape((b, 2 * t, h, w, c2 / 2))?);
    }
    let x = x_bcthw.reshape((b, 2, c2 / 2, t, h * w))?.permute((0, 2, 3, 1, 4))?;
    x.contiguous()?.reshape((b, c2 / 2, 2 * t, h, w))
}

/// Means over cells of `time` x `space` x `space`, spread over `to` channels: `[B,C,T,H,W]` to
/// [B,to,ceil(T/time),H/space,W/space]. Frames missing at the start count as zeros.
///
/// Each cell is moved into channels (time slowest, then height, then width) and groups of neighbouring channels are
/// averaged. Source: Wan-Video/Wan2.2 `wan/modules/vae2_2.py`, `AvgDown3D`.
pub fn average_down(x_bcthw: &Tensor, to: usize, time: usize, space: usize) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x_bcthw.device());
    let (b, c, t, h, w) = x_bcthw.dims5()?;
    let cell = time * space * space;
    if !(c * cell).is_multiple_of(to) {
        bail!("average_down: {c} channels in cells of {time}x{space}x{space} do not average to {to}");
    }
    if h % space != 0 || w % space != 0 {
        bail!("average_down: {h}x{w} pixels are not squares of {space}x{space}");
    }
    on_gpu!(x_bcthw, |gpu| gpu.average_down(x_bcthw, to, time, space)?);
    let x = x_bcthw.pad_with_zeros(2, t.next_multiple_of(time) - t, 0)?;
    let (_, _, t, h, w) = x.dims5()?;
    let (t, h, w) = (t / time, h / space, w / space);
    let cells = x.reshape(vec![b, c, t, time, h, space, w, space])?.permute(vec![0, 1, 3, 5, 7, 2, 4, 6])?;
    let group = c * cell / to;
    cells.contiguous()?.reshape((b, to, group, t * h * w))?.mean(2)?.reshape((b, to, t, h, w))
}

/// Copies into cells of `time` x `space` x `space`: `[B,C,T,H,W]` to [B,to,T time,H space,W space], the inverse
/// arrangement of [`average_down`]. Source: Wan-Video/Wan2.2 `wan/modules/vae2_2.py`, `DupUp3D`.
pub fn duplicate_up(x_bcthw: &Tensor, to: usize, time: usize, space: usize) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x_bcthw.device());
    let (b, c, t, h, w) = x_bcthw.dims5()?;
    let cell = time * space * space;
    if !(to * cell).is_multiple_of(c) {
        bail!("duplicate_up: {c} channels do not copy to {to} in cells of {time}x{space}x{space}");
    }
    on_gpu!(x_bcthw, |gpu| gpu.duplicate_up(x_bcthw, to, time, space)?);
    let copies = to * cell / c;
    let x = x_bcthw.reshape((b, c, 1, t * h * w))?.broadcast_as((b, c, copies, t * h * w))?.contiguous()?;
    let x = x.reshape(vec![b, to, time, space, space, t, h, w])?.permute(vec![0, 1, 5, 2, 6, 3, 7, 4])?;
    x.contiguous()?.reshape((b, to, t * time, h * space, w * space))
}

/// Folds squares of `patch` x `patch` pixels into channels: `[B,C,T,H,W]` to [B,C p p,T,H/p,W/p]. Channel
/// `(c p + dx) p + dy` holds pixel (p y + dy, p x + dx): the column is the slower of the two.
/// Source: Wan-Video/Wan2.2 `wan/modules/vae2_2.py`, `patchify`.
pub fn fold_pixels(x_bcthw: &Tensor, patch: usize) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x_bcthw.device());
    if patch == 1 {
        return Ok(x_bcthw.clone());
    }
    let (b, c, t, h, w) = x_bcthw.dims5()?;
    let x = x_bcthw
        .reshape(vec![b, c, t, h / patch, patch, w / patch, patch])?
        .permute(vec![0, 1, 6, 4, 2, 3, 5])?;
    x.contiguous()?.reshape((b, c * patch * patch, t, h / patch, w / patch))
}

/// The inverse of [`fold_pixels`].
pub fn unfold_pixels(x_bcthw: &Tensor, patch: usize) -> Result<Tensor> {
    let _noted = profile::scope(Class::Elementwise, x_bcthw.device());
    if patch == 1 {
        return Ok(x_bcthw.clone());
    }
    let (b, c, t, h, w) = x_bcthw.dims5()?;
    let c = c / (patch * patch);
    let x = x_bcthw.reshape(vec![b, c, patch, patch, t, h, w])?.permute(vec![0, 1, 4, 5, 3, 6, 2])?;
    x.contiguous()?.reshape((b, c, t, h * patch, w * patch))
}

/// Numbers of a video from this magnitude on are the rest of an overflow: the sum of a clip's would not be finite.
const OVERFLOW: f32 = 1e29;

/// Frames of a video in 8 bits, and whether all of its numbers are sound.
#[derive(Debug, Clone)]
pub struct Rgb {
    /// Red, green and blue side by side, `[B,T,pH,pW,3]` u8.
    pub bytes: Tensor,
    /// `[1]` u8: 1 where a number of the video is not finite, or is 1e29 or more in magnitude, else 0.
    pub bad: Tensor,
}

/// A VAE's pixels in 8 bits: `x` `[B,3pp,T,H,W]`, folded as by [`fold_pixels`] with `patch`, -1 for black to 1 for full; values
/// outside are clipped.
///
/// # Errors
/// If there are not 3 p p channels.
pub fn rgb_bytes(x_bcthw: &Tensor, patch: usize) -> Result<Rgb> {
    let _noted = profile::scope(Class::Elementwise, x_bcthw.device());
    let (b, c, t, h, w) = x_bcthw.dims5()?;
    if c != 3 * patch * patch {
        bail!("rgb_bytes: {c} channels are not three colours of {patch}x{patch} pixels");
    }
    on_gpu!(x_bcthw, |gpu| gpu.rgb_bytes(x_bcthw, patch)?);
    let pixels = unfold_pixels(&x_bcthw.to_dtype(DType::F32)?, patch)?;
    let pixels = pixels.permute((0, 2, 3, 4, 1))?.contiguous()?;
    let values: Vec<f32> = if pixels.is_shadow() { Vec::new() } else { pixels.flatten_all()?.to_vec1()? };
    // Not a number is below nothing.
    let is_bad = u8::from(!values.iter().all(|value| value.abs() < OVERFLOW));
    // `as` saturates, and takes NaN to 0.
    let byte = |value: &f32| ((value.clamp(-1.0, 1.0) + 1.0) * 127.5 + 0.5) as u8;
    let bytes = || values.iter().map(byte).collect();
    let bytes = Tensor::from_fn((b, t, patch * h, patch * w, 3), x_bcthw.device(), bytes)?;
    Ok(Rgb { bytes, bad: Tensor::new(&[is_bad], x_bcthw.device())? })
}

impl Gpu {
    fn rgb_bytes(&self, x: &Tensor, patch: usize) -> Result<Option<Rgb>> {
        let (b, _, t, h, w) = x.dims5()?;
        let (Some(suffix), Some(rows)) = (suffix(x.dtype()), self.pixels(x, 1)?) else { return Ok(None) };
        let bytes = self.empty((b, t, patch * h, patch * w, 3), DType::U8)?;
        let (bad, count) = (Tensor::zeros(1, DType::U8, x.device())?, bytes.elem_count() / 3);
        let launch = Launch::new(self, File::Volume, &format!("rgb_bytes_{suffix}"))?;
        let launch = launch.tensor(&rows)?.tensor(&bytes)?.tensor(&bad)?.size(count).int(patch);
        launch.int(h).int(w).float(f64::from(OVERFLOW)).each(count)?;
        Ok(Some(Rgb { bytes, bad }))
    }

    fn upsample_nearest_2x(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let (b, c, t, h, w) = x.dims5()?;
        let Some(suffix) = suffix(x.dtype()).filter(|_| c % 4 == 0) else { return Ok(None) };
        let Some(rows) = self.pixels(x, 4)? else { return Ok(None) };
        let (y, quads) = (self.empty((b, t, 2 * h, 2 * w, c), x.dtype())?, x.elem_count());
        let launch =
            Launch::new(self, File::Volume, &format!("twice_{suffix}"))?.tensor(&rows)?.tensor(&y)?;
        launch.size(quads).int(c).int(h).int(w).each(quads)?;
        planes(&y).map(Some)
    }

    fn average_down(&self, x: &Tensor, to: usize, time: usize, space: usize) -> Result<Option<Tensor>> {
        let (b, c, t, h, w) = x.dims5()?;
        let (Some(suffix), Some(rows)) = (suffix(x.dtype()), self.pixels(x, 1)?) else { return Ok(None) };
        let (frames, group) = (t.div_ceil(time), c * time * space * space / to);
        let (height, width) = (h / space, w / space);
        let y = self.empty((b, frames, height, width, to), x.dtype())?;
        let launch = Launch::new(self, File::Volume, &format!("average_down_{suffix}"))?;
        let launch = launch.tensor(&rows)?.tensor(&y)?.size(y.elem_count()).int(c).int(group).int(time);
        let launch = launch.int(space).int(frames * time - t).int(to).int(frames).int(height).int(width);
        launch.each(y.elem_count())?;
        planes(&y).map(Some)
    }

    fn duplicate_up(&self, x: &Tensor, to: usize, time: usize, space: usize) -> Result<Option<Tensor>> {
        let (b, c, t, h, w) = x.dims5()?;
        let (Some(suffix), Some(rows)) = (suffix(x.dtype()), self.pixels(x, 1)?) else { return Ok(None) };
        let copies = to * time * space * space / c;
        let y = self.empty((b, t * time, h * space, w * space, to), x.dtype())?;
        let launch = Launch::new(self, File::Volume, &format!("duplicate_up_{suffix}"))?;
        let launch = launch.tensor(&rows)?.tensor(&y)?.size(y.elem_count()).int(c).int(copies).int(time);
        launch.int(space).int(to).int(t).int(h).int(w).each(y.elem_count())?;
        planes(&y).map(Some)
    }
}
