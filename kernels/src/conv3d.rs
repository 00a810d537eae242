//! 3D convolution over video, forward only: the VAE is never trained.
//!
//! Nothing is padded in time implicitly: a causal VAE passes its history, or zeros, as earlier frames.
//!
//! On a GPU the patch matrix is never written to memory, which would take five times longer than the products. Each thread
//! block gathers its tile of it into shared memory; what neighbouring taps share is read from caches.

mod host;

use crate::Tensor;
use candle_core::{DType, Result, bail};

use crate::cpu::is_cpu_f32;
use crate::gpu::{File, Gpu, Launch, suffix};
use crate::profile::{self, Class};
use crate::video::{self, join_frames};
use crate::video::{pixels, planes};
use host::on_cpu;

/// Zeros put around each frame, in pixels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Padding {
    /// Rows above.
    pub top: usize,
    /// Rows below.
    pub bottom: usize,
    /// Columns to the left.
    pub left: usize,
    /// Columns to the right.
    pub right: usize,
}

impl Padding {
    /// The same on all four sides.
    pub fn all(n: usize) -> Self {
        Self { top: n, bottom: n, left: n, right: n }
    }
}

/// How a convolution steps, and what surrounds the frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv3dGeometry {
    /// Step in frames.
    pub time_stride: usize,
    /// Step in rows and in columns.
    pub space_stride: usize,
    /// Zeros around each frame.
    pub padding: Padding,
}

impl Conv3dGeometry {
    /// Steps of one.
    pub fn unit(padding: Padding) -> Self {
        Self { time_stride: 1, space_stride: 1, padding }
    }
}

/// The frames before the input of a convolution.
#[derive(Debug, Clone, Copy, Default)]
pub struct Before<'a> {
    /// Frames of zeros, the earliest.
    pub zeros: usize,
    /// The frames after those zeros, `[B,I,P,H,W]`.
    pub past: Option<&'a Tensor>,
    /// The rows around those, as the input has them.
    pub around: Around<'a>,
}

/// The rows just above and just below the frames of a band, which belong to its neighbours: `[B,T,1,W,C]`, as
/// [`crate::video::edge_row`] has them. They count as rows of the frames.
#[derive(Debug, Clone, Copy, Default)]
pub struct Around<'a> {
    /// None at the top of the frames.
    pub above: Option<&'a Tensor>,
    /// None at the bottom.
    pub below: Option<&'a Tensor>,
}

impl Around<'_> {
    /// How many rows there are.
    fn count(self) -> usize {
        usize::from(self.above.is_some()) + usize::from(self.below.is_some())
    }

    /// The frames of `x` with these rows, in one tensor.
    fn join(self, x: &Tensor) -> Result<Tensor> {
        match self.count() {
            0 => Ok(x.clone()),
            _ => video::with_rows(self.above, x, self.below),
        }
    }

    /// That they fit the frames of `x`, and are there where those of `other` are.
    fn check(self, x: &Tensor, other: Self) -> Result<()> {
        let (b, c, t, _, w) = x.dims5()?;
        let fits = |row: &Tensor| row.dims() == [b, t, 1, w, c] && row.dtype() == x.dtype();
        let is_paired = [self.above, self.below].map(|row| row.is_some())
            == [other.above, other.below].map(|row| row.is_some());
        match is_paired && self.above.is_none_or(fits) && self.below.is_none_or(fits) {
            true => Ok(()),
            false => bail!("conv3d: rows of other bands do not fit around the frames {:?}", x.shape()),
        }
    }
}

impl Before<'_> {
    /// All frames with all rows in one tensor.
    fn join(&self, x: &Tensor, around: Around) -> Result<Tensor> {
        let x = around.join(x)?;
        let known = match self.past {
            Some(past) => join_frames(&self.around.join(past)?, &x)?,
            None => x,
        };
        known.pad_with_zeros(2, self.zeros, 0)
    }

    fn frames(&self, x: &Tensor) -> Result<usize> {
        let Some(past) = self.past else { return Ok(self.zeros) };
        let dims = |x: &Tensor| x.dims5().map(|(b, c, _, h, w)| (b, c, h, w));
        if dims(past)? != dims(x)? || past.dtype() != x.dtype() {
            bail!("conv3d: earlier frames {:?} do not fit the frames {:?}", past.shape(), x.shape());
        }
        Ok(self.zeros + past.dim(2)?)
    }
}

/// `y[b,o,t,h,w] = bias[o] + sum over i,dt,dh,dw of weight[o,i,dt,dh,dw] x[b,i,t st + dt,h s + dh,w s + dw]`, frames
/// padded with zeros in space only.
///
/// `x` is `[B,I,T,H,W]`, `weight` `[O,I,kt,kh,kw]`, `bias` `[O]`; the result has (T - kt) / st + 1 frames.
///
/// # Errors
/// Shapes that do not fit, or a kernel larger than the padded input.
pub fn conv3d(
    x_bcthw: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    geometry: Conv3dGeometry,
) -> Result<Tensor> {
    conv3d_after(Before::default(), x_bcthw, weight, bias, geometry, None)
}

/// [`conv3d_band`] of whole frames.
///
/// # Errors
/// As there.
pub fn conv3d_after(
    before: Before,
    x_bcthw: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    geometry: Conv3dGeometry,
    onto: Option<&Tensor>,
) -> Result<Tensor> {
    conv3d_band(before, (x_bcthw, Around::default()), weight, bias, geometry, onto)
}

/// [`conv3d`] of the frames `before` followed by those of `x`, with the rows `around` them, and the video `onto` added to the result.
///
/// # Errors
/// As [`conv3d`], and earlier frames, rows, or an `onto`, of another shape or dtype.
pub fn conv3d_band(
    before: Before,
    (x_bcthw, around): (&Tensor, Around),
    weight: &Tensor,
    bias: Option<&Tensor>,
    geometry: Conv3dGeometry,
    onto: Option<&Tensor>,
) -> Result<Tensor> {
    let _noted = profile::scope(Class::Gemm, x_bcthw.device());
    around.check(x_bcthw, around)?;
    before.past.map_or(Ok(()), |past| before.around.check(past, around))?;
    let sizes = Sizes::new(before, (x_bcthw, around), weight, geometry)?;
    on_gpu!(x_bcthw, |gpu| gpu.conv3d(before, (x_bcthw, around), weight, bias, onto, sizes)?);
    let y = plain(before.join(x_bcthw, around)?, weight, bias, geometry, sizes)?;
    match onto {
        Some(onto) => video::add(&y, onto),
        None => Ok(y),
    }
}

/// On any device.
fn plain(
    x: Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    geometry: Conv3dGeometry,
    sizes: Sizes,
) -> Result<Tensor> {
    if x.device().is_cpu() && matches!(x.dtype(), DType::BF16 | DType::F16) {
        // As a GPU has it: sums in f32, rounded once.
        let bias = bias.map(|bias| bias.to_dtype(DType::F32)).transpose()?;
        let (wide, weight) = (x.to_dtype(DType::F32)?, weight.to_dtype(DType::F32)?);
        return on_cpu(&wide, &weight, bias.as_ref(), sizes)?.to_dtype(x.dtype());
    }
    match is_cpu_f32(&x) && is_cpu_f32(weight) {
        true => on_cpu(&x, weight, bias, sizes),
        false => by_conv2d(&x, weight, bias, geometry, sizes),
    }
}

#[derive(Debug, Clone, Copy)]
struct Sizes {
    batch: usize,
    c_in: usize,
    /// With those before.
    frames: usize,
    /// With the rows around.
    height: usize,
    width: usize,
    c_out: usize,
    kernel: [usize; 3],
    out_frames: usize,
    out_height: usize,
    out_width: usize,
    geometry: Conv3dGeometry,
}

impl Sizes {
    fn new(
        before: Before,
        (x, around): (&Tensor, Around),
        weight: &Tensor,
        geometry: Conv3dGeometry,
    ) -> Result<Self> {
        let (batch, c_in, frames, height, width) = x.dims5()?;
        let height = height + around.count();
        let frames = before.frames(x)? + frames;
        let (c_out, weight_in, kt, kh, kw) = weight.dims5()?;
        let pad = geometry.padding;
        let out = |n: usize, k: usize, stride: usize| n.checked_sub(k).map(|free| free / stride.max(1) + 1);
        let out_frames = out(frames, kt, geometry.time_stride);
        let out_height = out(height + pad.top + pad.bottom, kh, geometry.space_stride);
        let out_width = out(width + pad.left + pad.right, kw, geometry.space_stride);
        let (Some(out_frames), Some(out_height), Some(out_width)) = (out_frames, out_height, out_width)
        else {
            bail!("conv3d: the kernel {kt}x{kh}x{kw} is larger than the {frames} frames of {:?}", x.dims());
        };
        if weight_in != c_in {
            bail!("conv3d: {c_in} channels, but the weight takes {weight_in}");
        }
        let kernel = [kt, kh, kw];
        Ok(Self {
            batch,
            c_in,
            frames,
            height,
            width,
            c_out,
            kernel,
            out_frames,
            out_height,
            out_width,
            geometry,
        })
    }

    /// Whether a kernel three wide keeps the width of a line.
    fn keeps_lines(&self) -> bool {
        let Conv3dGeometry { space_stride, padding, .. } = self.geometry;
        self.kernel[2] == 3 && space_stride == 1 && padding.left == 1 && padding.right == 1
    }

    /// Inputs that one output sums over.
    fn taps(&self) -> usize {
        self.c_in * self.kernel.iter().product::<usize>()
    }
}

/// The readable definition, on any device: for each step in time a 2D convolution of the frames, summed.
fn by_conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    geometry: Conv3dGeometry,
    s: Sizes,
) -> Result<Tensor> {
    let pad = geometry.padding;
    let x = x.pad_with_zeros(3, pad.top, pad.bottom)?.pad_with_zeros(4, pad.left, pad.right)?;
    let frames = |dt: usize| -> Result<Tensor> {
        let index: Vec<u32> = (0..s.out_frames).map(|t| (t * geometry.time_stride + dt) as u32).collect();
        let picked = x.index_select(&Tensor::new(index, x.device())?, 2)?.transpose(1, 2)?;
        picked.flatten(0, 1)?.contiguous()
    };
    let mut sum: Option<Tensor> = None;
    for dt in 0..s.kernel[0] {
        let kernel = weight.narrow(2, dt, 1)?.squeeze(2)?.contiguous()?;
        let part = frames(dt)?.conv2d(&kernel, 0, geometry.space_stride)?;
        sum = Some(match sum {
            Some(sum) => (sum + part)?,
            None => part,
        });
    }
    let Some(sum) = sum else { bail!("conv3d: the kernel has no frames") };
    let y = sum
        .reshape((s.batch, s.out_frames, s.c_out, s.out_height, s.out_width))?
        .transpose(1, 2)?
        .contiguous()?;
    match bias {
        Some(bias) => y.broadcast_add(&bias.reshape((1, s.c_out, 1, 1, 1))?),
        None => Ok(y),
    }
}

/// How the output is cut into blocks: positions and channels, the kernel, and the bytes of shared memory that a block needs.
#[derive(Debug, Clone)]
struct Blocks {
    kernel: String,
    positions: usize,
    channels: usize,
    shared_bytes: usize,
}

impl Blocks {
    /// As in `cuda/conv3d.cu`; of a band where there are rows around it.
    fn of(suffix: &str, dtype: DType, s: Sizes, around: Around) -> Self {
        const POSITIONS: usize = 256;
        const STAGES: usize = 4;
        const ROW_BYTES: usize = 64;
        const SLOTS: usize = 260;
        let of = if around.count() > 0 { "conv3d_band" } else { "conv3d" };
        if dtype == DType::F32 {
            return Self { kernel: format!("{of}_f32"), positions: 128, channels: 96, shared_bytes: 0 };
        }
        let channels = match s.c_out {
            few if few <= 32 => 32,
            // The Wan 2.1 VAE's widths are multiples of 96, most of Wan 2.2's of 128.
            many if many.next_multiple_of(96) <= many.next_multiple_of(128) => 96,
            _ => 128,
        };
        let (kernel, staged) = match s.keeps_lines() {
            true => (format!("{of}_lines_{channels}_{suffix}"), 2 * (SLOTS + 3 * channels) + 1),
            // Not of bands: see `Gpu::conv3d`.
            false => (format!("conv3d_{channels}_{suffix}"), STAGES * (POSITIONS + channels)),
        };
        // The results reuse this shared memory before they are written, with eight numbers between the rows.
        let out = POSITIONS * (channels + 8) * dtype.size_in_bytes();
        Self { kernel, positions: POSITIONS, channels, shared_bytes: out.max(staged * ROW_BYTES) }
    }
}

impl Gpu {
    fn conv3d(
        &self,
        before: Before,
        (x, around): (&Tensor, Around),
        weight: &Tensor,
        bias: Option<&Tensor>,
        onto: Option<&Tensor>,
        s: Sizes,
    ) -> Result<Option<Tensor>> {
        let dtype = x.dtype();
        let Some(suffix) = suffix(dtype).filter(|_| weight.dtype() == dtype) else { return Ok(None) };
        // The kernels read 16 bytes at a time.
        let multiple = 16 / dtype.size_in_bytes();
        let reads_bands = (dtype == DType::F32 || s.keeps_lines()) && s.c_in.is_multiple_of(multiple);
        if around.count() > 0 && !reads_bands {
            let past = before.past.map(|past| before.around.join(past)).transpose()?;
            let before = Before { zeros: before.zeros, past: past.as_ref(), ..Before::default() };
            return self.conv3d(before, (&around.join(x)?, Around::default()), weight, bias, onto, s);
        }
        let (Some(x), Some(weight)) = (self.pixels(x, multiple)?, self.pixels(weight, multiple)?) else {
            return Ok(None);
        };
        let past = match before.past {
            Some(past) => self.pixels(past, multiple)?,
            None => None,
        };
        let bias = bias.map(|bias| bias.to_dtype(dtype)?.contiguous()).transpose()?;
        let shape = (s.batch, s.out_frames, s.out_height, s.out_width, s.c_out);
        let onto = match onto {
            // One number at a time if the output's channels are not a multiple of 16 bytes.
            Some(onto) if pixels(onto)?.shape() == &shape.into() && onto.dtype() == dtype => {
                self.pixels(onto, 1)?
            }
            Some(onto) => {
                bail!("conv3d: {:?} {:?} does not fit onto {shape:?} {dtype:?}", onto.dims(), onto.dtype())
            }
            None => None,
        };
        let y = self.empty(shape, dtype)?;
        let blocks = Blocks::of(suffix, dtype, s, around);
        let launch = Launch::new(self, File::Conv3d, &blocks.kernel)?.tensor(&x)?.maybe(past.as_ref())?;
        let launch = match around.count() {
            0 => launch,
            _ => {
                let launch = launch.maybe(around.above)?.maybe(around.below)?;
                launch.maybe(before.around.above)?.maybe(before.around.below)?
            }
        };
        let launch = launch.tensor(&weight)?.maybe(bias.as_ref())?.maybe(onto.as_ref())?.tensor(&y)?;
        let past_frames = past.as_ref().map_or(Ok(0), |past| past.dim(1))?;
        let own_height = s.height - around.count();
        let launch = launch.int(x.dim(4)?).int(s.c_out).int(x.dim(1)?).int(own_height).int(s.width);
        let launch = launch.int(past_frames).int(before.zeros);
        let launch = s.kernel.into_iter().fold(launch, Launch::int);
        let Conv3dGeometry { time_stride, space_stride, padding } = s.geometry;
        // Above the band's own first row.
        let top = padding.top + usize::from(around.above.is_some());
        let launch = launch.int(time_stride).int(space_stride).int(top).int(padding.left);
        let launch = launch.int(s.out_frames).int(s.out_height).int(s.out_width);
        let positions = (s.out_frames * s.out_height * s.out_width).div_ceil(blocks.positions);
        let count = s.batch * positions * s.c_out.div_ceil(blocks.channels);
        launch.shared(blocks.shared_bytes).rows(count, 256)?;
        planes(&y).map(Some)
    }
}
