//! The motion encoder: pictures of a face to motion vectors, forward only and in f32. It is frozen and reads pixels alone, so a
//! clip goes through it once, when it is cached, and the vectors are what the network is given.
//!
//! Layers are equalised: a stored weight is used times 1 / sqrt(its fan-in). Source: Wan-Video/Wan2.2
//! wan/modules/animate/motion_encoder.py.

use std::f64::consts::SQRT_2;

use kernels::conv3d::{Conv3dGeometry, Padding, conv3d};
use kernels::weight::Weight;
use kernels::{DType, Device, Tensor, video};

use super::orthonormal::q_factor;
use crate::weights::{TensorClass, TensorSpec, Weights};
use crate::{Error, Result};

/// Linear layers after the convolutions.
const LINEARS: usize = 5;
/// Side of the last convolution's kernel.
const LAST: usize = 4;
/// The slope of the activation below zero.
const SLOPE: f64 = 0.2;
/// Is added to the directions before they are made orthonormal.
const DIRECTION_EPS: f32 = 1e-8;
/// A line of the blur before each step of two: its kernel is the outer product with itself.
const BLUR: [f64; 4] = [0.125, 0.375, 0.375, 0.125];

/// The sizes of a motion encoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MotionSizes {
    /// Channels behind the first convolution and behind each residual block, each of which halves height and width.
    pub channels: Vec<usize>,
    /// Width of the features behind the convolutions.
    pub style: usize,
    /// Directions of motion.
    pub directions: usize,
    /// Width of a motion vector.
    pub width: usize,
}

/// The prefix of the names of its convolutions.
const CONVS: &str = "motion_encoder.enc.net_app.convs";

impl MotionSizes {
    /// Those of the weights whose shapes `shape_of` gives by official name.
    pub(super) fn read(shape_of: impl Fn(&str) -> Option<Vec<usize>>) -> Option<Self> {
        let axis = |name: String, axis: usize| shape_of(&name).and_then(|shape| shape.get(axis).copied());
        let mut channels = vec![axis(format!("{CONVS}.0.0.weight"), 0)?];
        channels.extend((1..).map_while(|n| axis(format!("{CONVS}.{n}.conv2.1.weight"), 0)));
        let last = shape_of(DIRECTIONS.0).filter(|shape| shape.len() == 2)?;
        Some(Self {
            style: axis(format!("{CONVS}.{}.weight", channels.len()), 0)?,
            channels,
            directions: last[1],
            width: last[0],
        })
    }

    /// Those of the published model.
    pub fn published() -> Self {
        Self { channels: vec![32, 64, 128, 256, 512, 512, 512, 512], style: 512, directions: 20, width: 512 }
    }

    /// Height and width of a picture of a face in pixels.
    pub fn side(&self) -> usize {
        LAST << (self.channels.len() - 1)
    }

    /// Its tensors by official name.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let spec = |name: String, shape: Vec<usize>| TensorSpec::new(name, shape).of(TensorClass::Full);
        let bias = |name: String, n: usize| spec(name, vec![1, n, 1, 1]).with_any_ones();
        let first = self.channels[0]; // there is a first convolution
        let mut all = vec![
            spec(format!("{CONVS}.0.0.weight"), vec![first, 3, 1, 1]),
            bias(format!("{CONVS}.0.1.bias"), first),
        ];
        for (n, pair) in self.channels.windows(2).enumerate() {
            let (name, from, to) = (format!("{CONVS}.{}", n + 1), pair[0], pair[1]);
            all.extend([
                spec(format!("{name}.conv1.0.weight"), vec![from, from, 3, 3]),
                bias(format!("{name}.conv1.1.bias"), from),
                spec(format!("{name}.conv2.1.weight"), vec![to, from, 3, 3]),
                bias(format!("{name}.conv2.2.bias"), to),
                spec(format!("{name}.skip.1.weight"), vec![to, from, 1, 1]),
            ]);
        }
        let last = self.channels[self.channels.len() - 1];
        all.push(spec(format!("{CONVS}.{}.weight", self.channels.len()), vec![self.style, last, LAST, LAST]));
        for n in 0..LINEARS {
            let out = if n + 1 == LINEARS { self.directions } else { self.style };
            let name = format!("motion_encoder.enc.fc.{n}");
            all.extend([
                spec(format!("{name}.weight"), vec![out, self.style]),
                spec(format!("{name}.bias"), vec![out]),
            ]);
        }
        all.push(spec(DIRECTIONS.0.into(), vec![self.width, self.directions]));
        all
    }
}

/// The tensor of directions: its official name, and that of diffusers, where it is no module's.
pub(crate) const DIRECTIONS: (&str, &str) =
    ("motion_encoder.dec.direction.weight", "motion_encoder.motion_synthesis_weight");

/// The diffusers name of an official module of the motion encoder, but for [`DIRECTIONS`].
pub(crate) fn to_diffusers(official: &str) -> Option<String> {
    if let Some(n) = official.strip_prefix("motion_encoder.enc.fc.") {
        return Some(format!("motion_encoder.motion_network.{n}"));
    }
    let (n, module) = match official.strip_prefix(CONVS)?.strip_prefix('.')?.split_once('.') {
        Some((n, module)) => (n, module),
        // The last convolution is a module itself.
        None => return Some("motion_encoder.conv_out".into()),
    };
    let block = n.parse::<usize>().ok()?.checked_sub(1);
    Some(match (block, module) {
        (None, "0") => "motion_encoder.conv_in".into(),
        (None, _) => "motion_encoder.conv_in.act_fn".into(),
        (Some(block), module) => {
            let module = match module {
                "conv1.0" => "conv1",
                "conv1.1" => "conv1.act_fn",
                "conv2.1" => "conv2",
                "conv2.2" => "conv2.act_fn",
                "skip.1" => "conv_skip",
                _ => return None,
            };
            format!("motion_encoder.res_blocks.{block}.{module}")
        }
    })
}

/// Whether a tensor of an official file is the kernel of a blur, a constant of the network that the file also has.
pub(crate) fn is_blur(name: &str) -> bool {
    name.starts_with(CONVS) && name.ends_with(".kernel")
}

/// The motion encoder.
#[derive(Debug)]
pub struct MotionEncoder {
    sizes: MotionSizes,
    first: (Tensor, Tensor),
    blocks: Vec<Residual>,
    last: Tensor,
    linears: Vec<(Weight, Tensor)>,
    /// Orthonormal directions of motion, `[width, directions]`.
    directions: Weight,
}

/// Two convolutions, and one around them that is added; the second and the one around have the blur in their kernels.
#[derive(Debug)]
struct Residual {
    first: (Tensor, Tensor),
    second: (Tensor, Tensor),
    around: Tensor,
}

impl MotionEncoder {
    /// Pictures that go through the convolutions at once.
    pub const AT_ONCE: usize = 4;

    /// Loads it from the weights of a DiT onto `device`.
    ///
    /// # Errors
    /// Weights that cannot be read, or that have none.
    pub fn load(weights: &Weights, sizes: &MotionSizes, device: &Device) -> Result<Self> {
        let read = Loading { weights, device };
        let (style, blocks) = (sizes.style, 1..sizes.channels.len());
        let block = |n: usize| -> Result<Residual> {
            let name = |part: &str| format!("{CONVS}.{n}.{part}");
            Ok(Residual {
                first: (read.kernel(&name("conv1.0"), false)?, read.bias(&name("conv1.1"))?),
                second: (read.kernel(&name("conv2.1"), true)?, read.bias(&name("conv2.2"))?),
                around: read.kernel(&name("skip.1"), true)?,
            })
        };
        let linear = |n: usize| -> Result<(Weight, Tensor)> {
            let name = format!("motion_encoder.enc.fc.{n}");
            let weight = (read.tensor(&format!("{name}.weight"))? * (1.0 / (style as f64).sqrt()))?;
            Ok((Weight::Dense(weight), read.tensor(&format!("{name}.bias"))?))
        };
        Ok(Self {
            first: (read.kernel(&format!("{CONVS}.0.0"), false)?, read.bias(&format!("{CONVS}.0.1"))?),
            blocks: blocks.map(block).collect::<Result<_>>()?,
            last: read.kernel(&format!("{CONVS}.{}", sizes.channels.len()), false)?,
            linears: (0..LINEARS).map(linear).collect::<Result<_>>()?,
            directions: Weight::Dense(read.directions(sizes)?),
            sizes: sizes.clone(),
        })
    }

    /// The device that it is on.
    pub fn device(&self) -> &Device {
        self.last.device()
    }

    /// Height and width of the pictures that it takes.
    pub fn side(&self) -> usize {
        self.sizes.side()
    }

    /// Orthonormal directions of motion, `[width, directions]`.
    ///
    /// # Errors
    /// When the tensor library fails.
    pub fn directions(&self) -> Result<Tensor> {
        Ok(self.directions.dequantised(DType::F32)?)
    }

    /// Motion vectors [b, f, width] f32 of pictures of faces `pixels` [b, 3, f, side, side] in -1..1.
    ///
    /// # Errors
    /// Pictures of another size.
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let (batch, channels, frames, height, width) = pixels.dims5()?;
        let side = self.side();
        if (channels, height, width) != (3, side, side) {
            return Err(Error::Mismatch(format!(
                "pictures of faces (face_pixel_values) have shape {:?}: [b, 3, frames, {side}, {side}] is expected",
                pixels.dims()
            )));
        }
        let mut vectors = Vec::new();
        for sample in 0..batch {
            let own = pixels.narrow(0, sample, 1)?;
            for start in (0..frames).step_by(Self::AT_ONCE) {
                let faces = own.narrow(2, start, Self::AT_ONCE.min(frames - start))?.contiguous()?;
                vectors.push(self.few(&faces.to_device(self.device())?.to_dtype(DType::F32)?)?);
            }
        }
        Ok(Tensor::cat(&vectors, 0)?.reshape((batch, frames, self.sizes.width))?)
    }

    /// [`Self::forward`] of a few frames [1, 3, f, side, side]: [f, width].
    fn few(&self, pixels: &Tensor) -> Result<Tensor> {
        let mut x = activated(&convolved(pixels, &self.first.0, 0, 1)?, &self.first.1)?;
        for block in &self.blocks {
            let inner = activated(&convolved(&x, &block.first.0, 1, 1)?, &block.first.1)?;
            let inner = activated(&convolved(&inner, &block.second.0, 2, 2)?, &block.second.1)?;
            let around = convolved(&x, &block.around, 1, 2)?;
            x = ((inner + around)? * (1.0 / SQRT_2))?;
        }
        let features = convolved(&x, &self.last, 0, 1)?;
        let mut x = features.squeeze(4)?.squeeze(3)?.squeeze(0)?.t()?.contiguous()?;
        for (weight, bias) in &self.linears {
            x = kernels::linear::forward(&x, weight, Some(bias), None)?;
        }
        Ok(kernels::linear::forward(&x, &self.directions, None, None)?)
    }
}

/// Reads its tensors.
struct Loading<'a> {
    weights: &'a Weights,
    device: &'a Device,
}

impl Loading<'_> {
    fn tensor(&self, name: &str) -> Result<Tensor> {
        self.weights.tensor(name, DType::F32, self.device)
    }

    fn bias(&self, name: &str) -> Result<Tensor> {
        let bias = self.tensor(&format!("{name}.bias"))?;
        let channels = bias.elem_count();
        Ok(bias.reshape((1, channels, 1, 1, 1))?)
    }

    /// The kernel of a convolution, [out, in, 1, h, w], equalised, and where it `is_blurred` with the blur before it in it.
    fn kernel(&self, name: &str, is_blurred: bool) -> Result<Tensor> {
        let kernel = self.tensor(&format!("{name}.weight"))?;
        let (_, channels, height, width) = kernel.dims4()?;
        let mut kernel = (kernel * (1.0 / ((channels * height * width) as f64).sqrt()))?;
        if is_blurred {
            kernel = blurred(&blurred(&kernel, 2)?, 3)?;
        }
        Ok(video::arranged(&kernel.unsqueeze(2)?)?)
    }

    /// The orthonormal directions, which depend on weights alone.
    fn directions(&self, sizes: &MotionSizes) -> Result<Tensor> {
        let shape = (sizes.width, sizes.directions);
        if self.device.is_shadow() {
            return Ok(Tensor::zeros(shape, DType::F32, self.device)?);
        }
        let stored: Vec<f32> =
            self.weights.tensor(DIRECTIONS.0, DType::F32, &Device::Cpu)?.flatten_all()?.to_vec1()?;
        let stored: Vec<f64> = stored.into_iter().map(|x| f64::from(x + DIRECTION_EPS)).collect();
        let q = q_factor(&stored, sizes.width, sizes.directions).into_iter().map(|x| x as f32);
        Ok(Tensor::from_vec(q.collect::<Vec<_>>(), shape, self.device)?)
    }
}

/// `kernel` behind the blur along one axis, as one kernel: the sum of it at each place of the blur, by that place's factor.
fn blurred(kernel: &Tensor, axis: usize) -> Result<Tensor> {
    let last = BLUR.len() - 1;
    let mut sum: Option<Tensor> = None;
    for (place, factor) in BLUR.into_iter().enumerate() {
        let part = (kernel.pad_with_zeros(axis, place, last - place)? * factor)?;
        sum = Some(match sum {
            Some(sum) => (sum + part)?,
            None => part,
        });
    }
    sum.ok_or_else(|| Error::Mismatch("a blur has no places".into()))
}

/// `x` [1, c, f, h, w] through a convolution of single frames without bias.
fn convolved(x: &Tensor, kernel: &Tensor, padding: usize, step: usize) -> Result<Tensor> {
    let geometry = Conv3dGeometry { time_stride: 1, space_stride: step, padding: Padding::all(padding) };
    Ok(conv3d(x, kernel, None, geometry)?)
}

/// sqrt(2) leaky_relu(x + bias), with a slope of 0.2.
fn activated(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let x = x.broadcast_add(bias)?;
    let above = (x.relu()? * (SQRT_2 * (1.0 - SLOPE)))?;
    Ok((above + (x * (SQRT_2 * SLOPE))?)?)
}
