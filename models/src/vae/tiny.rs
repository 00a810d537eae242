//! Tiny decoders for previews: latents to pixels in a fraction of a VAE's time and memory, and not quite its picture.
//!
//! taew2_1 is for latents of the Wan 2.1 VAE, taew2_2 for those of Wan 2.2 TI2V-5B. Source: madebyollin/taehv `taehv.py`. Every
//! convolution is in space only but the first of a memory block, which sees the frame before too. Of a file only the decoder is
//! read.

use std::path::Path;

use kernels::conv3d::{Before, Conv3dGeometry, Padding, conv3d, conv3d_after};
use kernels::resample::{frames_from_channels, unfold_pixels, upsample_nearest_2x};
use kernels::{DType, Device, Tensor, video};

use crate::weights::{Checkpoint, TensorSpec, Weights};
use crate::{Contents, Error, Movable, Result};

use super::scaling::Scaling;
use super::sizes::{Generation, Sizes};
use super::{TEMPORAL_RATIO, VaeConfig};

/// Memory blocks of a level.
const BLOCKS: usize = 3;
/// Each level's first convolution, first memory block and growing convolution, as positions in the official sequence.
const LEVELS: [Place; 3] = [
    Place { enter: 1, memory: 3, grow: 7 },
    Place { enter: 8, memory: 9, grow: 13 },
    Place { enter: 14, memory: 15, grow: 19 },
];
/// The last two convolutions.
const LAST: [usize; 2] = [20, 22];
/// Frames that each level's growing convolution makes of one.
const GROWTH: [usize; 3] = [1, 2, 2];
/// Frames that are dropped at the start of a clip, so that one latent frame is one frame.
const DROPPED: usize = TEMPORAL_RATIO - 1;
/// Latents are softly bounded to this magnitude.
const BOUND: f64 = 3.0;

/// Where a level's modules are.
#[derive(Debug, Clone, Copy)]
struct Place {
    enter: usize,
    memory: usize,
    grow: usize,
}

/// Which latents a tiny decoder takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TinyLatents {
    /// Scaled ones, as the DiT has them: taew2_1 and taew2_2.
    Scaled,
    /// Those of the VAE, without scaling: LightX2V's lighttaew2_1 and lighttaew2_2, of the same architecture.
    Raw,
}

impl TinyLatents {
    /// By the name of a file, as LightX2V has it: `lighttae...` takes raw latents.
    pub fn by_name(path: &Path) -> Self {
        let name = path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
        if name.contains("lighttae") { Self::Raw } else { Self::Scaled }
    }
}

/// The sizes of a tiny decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TinySizes {
    /// Latent channels.
    pub latent: usize,
    /// Channels of the three levels, and before the last convolution.
    pub widths: [usize; 4],
    /// Pixels folded into channels along each axis of the output: 1 or 2.
    pub patch: usize,
    /// Rows of the growing convolutions in the file, which may be more than are used: the last are.
    pub grown: [usize; 3],
}

impl TinySizes {
    /// Those of taew2_1 and taew2_2.
    pub const fn published(generation: Generation) -> Self {
        let latent = Sizes::published(generation).latent;
        let (widths, grown) = ([256, 128, 64, 64], [256, 256, 128]);
        Self { latent, widths, patch: generation.patch(), grown }
    }

    /// Of the file at `path`, from its header.
    ///
    /// # Errors
    /// As [`TinyDecoder::load`], without reading the tensors.
    pub fn at(path: &Path) -> Result<Self> {
        Self::open(path).map(|(sizes, _)| sizes)
    }

    fn open(path: &Path) -> Result<(Self, Weights)> {
        let checkpoint = Checkpoint::open(path)?;
        let sizes = Self::detect(&checkpoint)?;
        let is_encoder = |name: &str| name.starts_with("encoder.");
        Ok((sizes, Weights::from_checkpoint(checkpoint, &sizes.tensors(), |_| None, is_encoder)?))
    }

    fn detect(checkpoint: &Checkpoint) -> Result<Self> {
        if checkpoint.contains("decoder.1.conv.3.weight") {
            return Err(Error::Mismatch(format!(
                "{}: this is taew2_2_super, a tiny decoder of another architecture, which is not supported; use taew2_2",
                checkpoint.path().display()
            )));
        }
        let axis = |name: String, axis: usize| {
            let size = checkpoint.shape(&name).and_then(|shape| shape.get(axis).copied());
            size.filter(|n| *n > 0).ok_or_else(|| Contents::TinyDecoder.refusal(checkpoint, &name))
        };
        let weight = |n: usize| format!("decoder.{n}.weight");
        let [a, b, c] = LEVELS;
        let widths = [axis(weight(a.enter), 0)?, axis(weight(b.enter), 0)?, axis(weight(c.enter), 0)?];
        let grown = LEVELS.map(|level| axis(format!("decoder.{}.conv.weight", level.grow), 0));
        let [grown_0, grown_1, grown_2] = grown;
        let channels = axis(weight(LAST[1]), 0)?;
        let patch = match channels {
            3 => 1,
            12 => 2,
            n => {
                return Err(Error::Mismatch(format!(
                    "{}: the tiny decoder makes {n} channels; taew2_1 makes 3, taew2_2 makes 12",
                    checkpoint.path().display()
                )));
            }
        };
        Ok(Self {
            latent: axis(weight(a.enter), 1)?,
            widths: [widths[0], widths[1], widths[2], axis(weight(LAST[0]), 0)?],
            patch,
            grown: [grown_0?, grown_1?, grown_2?],
        })
    }

    /// Every tensor of such a decoder, by official name.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let spec = |name: String, shape: &[usize]| TensorSpec::new(name, shape);
        let mut specs = Vec::new();
        let mut conv = |name: String, [to, from, side]: [usize; 3], has_bias: bool| {
            specs.push(spec(format!("{name}.weight"), &[to, from, side, side]));
            if has_bias {
                specs.push(spec(format!("{name}.bias"), &[to]));
            }
        };
        let mut from = self.latent;
        for (i, level) in LEVELS.into_iter().enumerate() {
            let width = self.widths[i];
            conv(format!("decoder.{}", level.enter), [width, from, 3], i == 0);
            for block in level.memory..level.memory + BLOCKS {
                conv(format!("decoder.{block}.conv.0"), [width, 2 * width, 3], true);
                conv(format!("decoder.{block}.conv.2"), [width, width, 3], true);
                conv(format!("decoder.{block}.conv.4"), [width, width, 3], true);
            }
            conv(format!("decoder.{}.conv", level.grow), [self.grown[i], width, 1], false);
            from = width;
        }
        conv(format!("decoder.{}", LAST[0]), [self.widths[3], from, 3], false);
        conv(format!("decoder.{}", LAST[1]), [3 * self.patch * self.patch, self.widths[3], 3], true);
        specs
    }

    /// Which VAE's latents have so many channels.
    fn generation(&self) -> Generation {
        match self.latent == Sizes::published(Generation::Wan22).latent {
            true => Generation::Wan22,
            false => Generation::Wan21,
        }
    }
}

/// A tiny decoder with its weights on one device.
#[derive(Debug)]
pub struct TinyDecoder {
    sizes: TinySizes,
    /// Of raw latents, where the decoder takes those.
    scaling: Option<Scaling>,
    levels: Vec<Level>,
    last: [Conv; 2],
    dtype: DType,
    device: Device,
}

/// A level: a convolution, memory blocks, and a convolution whose channels become frames.
#[derive(Debug)]
struct Level {
    enter: Conv,
    memory: Vec<MemoryBlock>,
    grow: Conv,
}

impl Level {
    fn convs_mut(&mut self) -> Vec<&mut Conv> {
        let Self { enter, memory, grow } = self;
        let blocks = memory.iter_mut();
        let blocks = blocks.flat_map(|MemoryBlock { remember, middle, put }| [remember, middle, put]);
        blocks.chain([enter, grow]).collect()
    }
}

impl TinyDecoder {
    /// Loads the decoder of a `.pth` or `.safetensors` file with official names; sizes are read from the tensors.
    ///
    /// # Errors
    /// Anything that [`Checkpoint::open`] refuses, and files that hold no such decoder; taew2_2_super by name.
    pub fn load(path: &Path, latents: TinyLatents, dtype: DType, device: &Device) -> Result<Self> {
        let (sizes, weights) = TinySizes::open(path)?;
        Self::build(&weights, sizes, latents, dtype, device)
    }

    /// A decoder of these sizes with weights made from `seed`, for measuring speed and memory.
    pub fn seeded(sizes: TinySizes, seed: u64, dtype: DType, device: &Device) -> Result<Self> {
        let weights = Weights::seeded(sizes.tensors(), seed);
        Self::build(&weights, sizes, TinyLatents::Scaled, dtype, device)
    }

    fn build(
        weights: &Weights,
        sizes: TinySizes,
        latents: TinyLatents,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let read = Reader { weights, dtype, device };
        let mut levels = Vec::new();
        for (i, level) in LEVELS.into_iter().enumerate() {
            let memory =
                (level.memory..level.memory + BLOCKS).map(|n| read.memory(n)).collect::<Result<_>>()?;
            let grow = read.grow(level.grow, GROWTH[i] * sizes.widths[i])?;
            levels.push(Level { enter: read.conv(&format!("decoder.{}", level.enter))?, memory, grow });
        }
        let scaling = match latents {
            TinyLatents::Scaled => None,
            TinyLatents::Raw => {
                Some(Scaling::new(&Sizes::published(sizes.generation()), &VaeConfig::default())?)
            }
        };
        let last = [read.conv(&format!("decoder.{}", LAST[0]))?, read.last(LAST[1], sizes.patch)?];
        Ok(Self { sizes, scaling, levels, last, dtype, device: device.clone() })
    }

    /// Its sizes.
    pub fn sizes(&self) -> &TinySizes {
        &self.sizes
    }

    /// The device that the weights are on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Decodes the DiT's latents `[B,C,T,H,W]` to video `[B,3,1+4(T-1),8H,8W]` (taew2_2: 16H, 16W) in f32, -1..1.
    ///
    /// # Errors
    /// Latents with another number of channels.
    pub fn decode(&self, latents_bcthw: &Tensor) -> Result<Tensor> {
        self.decode_at(latents_bcthw, Pace::Frames)
    }

    /// [`Self::decode`] without growth in time, one frame for each latent frame: `[B,3,T,8H,8W]`.
    ///
    /// # Errors
    /// As there.
    pub fn decode_at_latent_rate(&self, latents_bcthw: &Tensor) -> Result<Tensor> {
        self.decode_at(latents_bcthw, Pace::Latents)
    }

    fn decode_at(&self, latents_bcthw: &Tensor, pace: Pace) -> Result<Tensor> {
        let mut stream = TinyStream { pace, ..self.stream() };
        let frames = latents_bcthw.dim(2)?;
        let chunk = |i: usize| stream.push(&latents_bcthw.narrow(2, i, 1)?);
        Ok(Tensor::cat(&(0..frames).map(chunk).collect::<Result<Vec<_>>>()?, 2)?)
    }

    /// A clip that is decoded as its latents come.
    pub fn stream(&self) -> TinyStream<'_> {
        let past = self.levels.iter().map(|level| vec![None; level.memory.len()]).collect();
        TinyStream { decoder: self, past, is_begun: false, pace: Pace::Frames }
    }
}

impl Movable for TinyDecoder {
    fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let convs = self.levels.iter_mut().flat_map(Level::convs_mut).chain(&mut self.last);
        convs.flat_map(|conv| std::iter::once(&mut conv.weight).chain(&mut conv.bias)).collect()
    }

    fn move_to(&mut self, device: &Device) -> Result<()> {
        for tensor in self.tensors_mut() {
            *tensor = tensor.to_device(device)?;
        }
        self.device = device.clone();
        Ok(())
    }
}

/// Whether frames grow in number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pace {
    /// To those of the video.
    Frames,
    /// Not at all.
    Latents,
}

/// A clip on its way through a tiny decoder: what its memory blocks keep of the frame before.
#[derive(Debug)]
pub struct TinyStream<'a> {
    decoder: &'a TinyDecoder,
    past: Vec<Vec<Option<Tensor>>>,
    is_begun: bool,
    pace: Pace,
}

impl TinyStream<'_> {
    /// Decodes the next latents `[B,C,T,H,W]` of the clip: 4 frames for each latent frame, 1 for the first, in any
    /// division the same.
    ///
    /// # Errors
    /// Latents with another number of channels.
    pub fn push(&mut self, latents_bcthw: &Tensor) -> Result<Tensor> {
        let Self { decoder, past, is_begun, pace } = self;
        let channels = latents_bcthw.dim(1)?;
        if latents_bcthw.rank() != 5 || channels != decoder.sizes.latent || latents_bcthw.elem_count() == 0 {
            return Err(Error::Mismatch(format!(
                "the tiny decoder decodes latents [B, {}, T, H, W], not {:?}",
                decoder.sizes.latent,
                latents_bcthw.dims()
            )));
        }
        let z = latents_bcthw.to_device(&decoder.device)?.to_dtype(DType::F32)?;
        let z = match &decoder.scaling {
            Some(scaling) => scaling.unscale(&z)?,
            None => z,
        };
        let mut h = (((z * (1.0 / BOUND))?.tanh()? * BOUND)?).to_dtype(decoder.dtype)?.contiguous()?;
        for (i, (level, past)) in decoder.levels.iter().zip(past).enumerate() {
            h = level.enter.forward(&h)?;
            if i == 0 {
                h = video::relu(&h)?;
            }
            for (block, past) in level.memory.iter().zip(past) {
                h = block.forward(&h, past)?;
            }
            // Before the doubling in space, which only repeats what this makes, at a quarter of the work.
            h = level.grow.grown(&h, (*pace, GROWTH[i]))?;
            if i + 1 < decoder.levels.len() {
                h = upsample_nearest_2x(&h)?;
            }
        }
        // What follows knows no other frame: one at a time, and those that are dropped not at all.
        let dropped = if *is_begun || *pace == Pace::Latents { 0 } else { DROPPED };
        *is_begun = true;
        let frames = (dropped..h.dim(2)?).map(|t| decoder.picture(&h.narrow(2, t, 1)?));
        Ok(Tensor::cat(&frames.collect::<Result<Vec<_>>>()?, 2)?)
    }
}

impl TinyDecoder {
    /// The pixels of the last level's frames, f32 in -1..1.
    fn picture(&self, h: &Tensor) -> Result<Tensor> {
        let [first, second] = &self.last;
        let h = video::relu(&first.forward(&upsample_nearest_2x(h)?)?)?;
        let pixels = unfold_pixels(&second.forward(&h)?.to_dtype(DType::F32)?, self.sizes.patch)?;
        Ok(pixels.contiguous()?.clamp(0.0, 1.0)?.affine(2.0, -1.0)?)
    }
}

/// A convolution in space; a memory block's first sees the frame before too.
#[derive(Debug)]
struct Conv {
    weight: Tensor,
    bias: Option<Tensor>,
    geometry: Conv3dGeometry,
}

impl Conv {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(conv3d(x, &self.weight, self.bias.as_ref(), self.geometry)?)
    }

    fn forward_after(&self, before: Before, x: &Tensor, onto: Option<&Tensor>) -> Result<Tensor> {
        Ok(conv3d_after(before, x, &self.weight, self.bias.as_ref(), self.geometry, onto)?)
    }

    /// As a growing convolution, of which each pair of frames is made, or the later of it alone.
    fn grown(&self, x: &Tensor, (pace, growth): (Pace, usize)) -> Result<Tensor> {
        let y = self.forward(x)?;
        match (pace, growth) {
            (_, 1) => Ok(y),
            (Pace::Frames, _) => Ok(frames_from_channels(&y)?),
            (Pace::Latents, _) => {
                let channels = y.dim(1)? / growth;
                Ok(y.narrow(1, y.dim(1)? - channels, channels)?.contiguous()?)
            }
        }
    }
}

/// Three convolutions around which the input goes; the first sees the frame before.
#[derive(Debug)]
struct MemoryBlock {
    remember: Conv,
    middle: Conv,
    put: Conv,
}

impl MemoryBlock {
    fn forward(&self, x: &Tensor, past: &mut Option<Tensor>) -> Result<Tensor> {
        let before = Before { zeros: usize::from(past.is_none()), past: past.as_ref(), ..Before::default() };
        let h = video::relu(&self.remember.forward_after(before, x, None)?)?;
        *past = Some(video::last_frames(x, 1)?);
        let h = video::relu(&self.middle.forward(&h)?)?;
        Ok(video::relu(&self.put.forward_after(Before::default(), &h, Some(x))?)?)
    }
}

/// Reads convolutions.
struct Reader<'a> {
    weights: &'a Weights,
    dtype: DType,
    device: &'a Device,
}

impl Reader<'_> {
    fn tensor(&self, name: &str) -> Result<Tensor> {
        self.weights.tensor(name, self.dtype, self.device)
    }

    /// Of a kernel [O,I,k,k], or one of several frames [O,I,t,k,k].
    fn made(&self, weight: Tensor, bias: Option<Tensor>) -> Result<Conv> {
        let weight = if weight.rank() == 4 { weight.unsqueeze(2)? } else { weight };
        let geometry = Conv3dGeometry::unit(Padding::all(weight.dim(3)? / 2));
        Ok(Conv { weight: video::arranged(&weight)?, bias, geometry })
    }

    fn conv(&self, name: &str) -> Result<Conv> {
        let bias = format!("{name}.bias");
        let bias = self.weights.contains(&bias).then(|| self.tensor(&bias)).transpose()?;
        self.made(self.tensor(&format!("{name}.weight"))?, bias)
    }

    /// The memory block `n`: its first kernel takes the channels of this frame, then those of the one before.
    fn memory(&self, n: usize) -> Result<MemoryBlock> {
        let name = |i: usize| format!("decoder.{n}.conv.{i}");
        let weight = self.tensor(&format!("{}.weight", name(0)))?;
        let width = weight.dim(0)?;
        let [this, before] = [0, width].map(|first| weight.narrow(1, first, width));
        let weight = Tensor::stack(&[before?.contiguous()?, this?.contiguous()?], 2)?;
        let remember = self.made(weight, Some(self.tensor(&format!("{}.bias", name(0)))?))?;
        Ok(MemoryBlock { remember, middle: self.conv(&name(2))?, put: self.conv(&name(4))? })
    }

    /// The growing convolution `n`: its last `rows` rows.
    fn grow(&self, n: usize, rows: usize) -> Result<Conv> {
        let weight = self.tensor(&format!("decoder.{n}.conv.weight"))?;
        let Some(first) = weight.dim(0)?.checked_sub(rows) else {
            return Err(Error::Mismatch(format!(
                "the tiny decoder's `decoder.{n}.conv.weight` has {} rows, where {rows} are needed",
                weight.dim(0)?
            )));
        };
        self.made(weight.narrow(0, first, rows)?.contiguous()?, None)
    }

    /// The last convolution, its channels in the order of [`unfold_pixels`]: the file has the row of a pixel slower than its
    /// column.
    fn last(&self, n: usize, patch: usize) -> Result<Conv> {
        let cell = patch * patch;
        let order = |i: usize| i / cell * cell + i % patch * patch + i / patch % patch;
        let order: Vec<u32> = (0..3 * cell).map(|i| order(i) as u32).collect();
        let order = Tensor::new(order, self.device)?;
        let of =
            |end: &str| Ok::<_, Error>(self.tensor(&format!("decoder.{n}.{end}"))?.index_select(&order, 0)?);
        self.made(of("weight")?, Some(of("bias")?))
    }
}
