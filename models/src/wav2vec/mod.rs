//! wav2vec 2.0 with layer norms in front (XLSR-53), by whose states Wan 2.2 S2V hears speech. Frozen: forward only, in f32.
//!
//! Sources: Hugging Face transformers 4.51.3 `models/wav2vec2/modeling_wav2vec2.py`, in its stable form (`feat_extract_norm`
//! "layer", `do_stable_layer_norm`); Wan-Video/Wan2.2 wan/modules/s2v/audio_encoder.py.

mod sizes;

use std::path::Path;

use kernels::weight::Weight;
use kernels::{DType, Device, Tensor, attention, linear, norm};

pub use sizes::SpeechSizes;

use crate::weights::Weights;
use crate::{Error, Result, taps};

/// Samples a second of the audio that it hears.
pub const SAMPLE_RATE: u32 = 16_000;
/// States a second that it makes.
pub const STATE_RATE: f64 = 50.0;
/// The epsilon of every norm.
const EPSILON: f64 = 1e-5;
/// Is added to the variance of the samples.
const VARIANCE_EPSILON: f64 = 1e-7;

/// The encoder with its weights on one device.
#[derive(Debug)]
pub struct SpeechEncoder {
    sizes: SpeechSizes,
    convolutions: Vec<Convolution>,
    projection_norm: Norm,
    projection: Linear,
    positions: Positions,
    layers: Vec<Layer>,
    last_norm: Norm,
}

type Norm = (Tensor, Tensor);
type Linear = (Weight, Tensor);

#[derive(Debug)]
struct Convolution {
    linear: Linear,
    norm: Norm,
    taps: usize,
    stride: usize,
}

/// A convolution over frames in groups of channels, whose output is added to its input.
#[derive(Debug)]
struct Positions {
    groups: Vec<Weight>,
    bias: Tensor,
    taps: usize,
}

#[derive(Debug)]
struct Layer {
    norm: Norm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    last_norm: Norm,
    up: Linear,
    down: Linear,
}

impl SpeechEncoder {
    /// Loads it from a `model.safetensors` of Hugging Face, or the folder of one; without the head for letters.
    ///
    /// Heads are in no tensor: `config`, or the `config.json` beside the weights, tells them; without either they are 64 wide, as
    /// the published ones.
    ///
    /// # Errors
    /// Anything that [`Weights::open`] refuses, and files that hold no such encoder.
    pub fn load(path: &Path, config: Option<&Path>, device: &Device) -> Result<Self> {
        let (sizes, weights) = sizes::open(path, config)?;
        Self::build(&weights, sizes, device)
    }

    /// The sizes of the encoder at `path`, without loading it.
    ///
    /// # Errors
    /// As [`SpeechEncoder::load`].
    pub fn sizes_at(path: &Path, config: Option<&Path>) -> Result<SpeechSizes> {
        Ok(sizes::open(path, config)?.0)
    }

    /// An encoder of these sizes with weights made from `seed`, for measuring memory.
    ///
    /// # Errors
    /// When the device has too little memory.
    pub fn seeded(sizes: SpeechSizes, seed: u64, device: &Device) -> Result<Self> {
        Self::build(&Weights::seeded(sizes.tensors(), seed), sizes, device)
    }

    fn build(weights: &Weights, sizes: SpeechSizes, device: &Device) -> Result<Self> {
        let read = Loading { weights, device };
        let convolution = |(n, &(_, taps, stride)): (usize, &(usize, usize, usize))| {
            let name = format!("feature_extractor.conv_layers.{n}");
            let kernel = taps::matrix(&read.tensor(&format!("{name}.conv.weight"))?)?;
            let linear = (Weight::Dense(kernel), read.tensor(&format!("{name}.conv.bias"))?);
            Ok(Convolution { linear, norm: read.norm(&format!("{name}.layer_norm"))?, taps, stride })
        };
        let layer = |n: usize| {
            let name = |part: &str| format!("encoder.layers.{n}.{part}");
            Ok(Layer {
                norm: read.norm(&name("layer_norm"))?,
                q: read.linear(&name("attention.q_proj"))?,
                k: read.linear(&name("attention.k_proj"))?,
                v: read.linear(&name("attention.v_proj"))?,
                out: read.linear(&name("attention.out_proj"))?,
                last_norm: read.norm(&name("final_layer_norm"))?,
                up: read.linear(&name("feed_forward.intermediate_dense"))?,
                down: read.linear(&name("feed_forward.output_dense"))?,
            })
        };
        Ok(Self {
            convolutions: sizes.convolutions.iter().enumerate().map(convolution).collect::<Result<_>>()?,
            projection_norm: read.norm("feature_projection.layer_norm")?,
            projection: read.linear("feature_projection.projection")?,
            positions: read.positions(&sizes)?,
            layers: (0..sizes.layers).map(layer).collect::<Result<_>>()?,
            last_norm: read.norm("encoder.layer_norm")?,
            sizes,
        })
    }

    /// Its sizes.
    pub fn sizes(&self) -> &SpeechSizes {
        &self.sizes
    }

    /// The states [layers + 1, n, width] f32 of `samples`, mono at [`SAMPLE_RATE`]: those before the first layer, behind each layer, and
    /// those of the last behind its norm.
    ///
    /// # Errors
    /// Fewer samples than one state needs.
    pub fn encode(&self, samples: &[f32]) -> Result<Tensor> {
        let least = self.sizes.samples_of_one_state();
        if samples.len() < least {
            return Err(Error::Mismatch(format!(
                "audio of {} samples is too short: {least} at {SAMPLE_RATE} a second are the least",
                samples.len()
            )));
        }
        let samples = normalised(samples);
        let count = samples.len();
        let mut x = Tensor::from_vec(samples, (1, count, 1), self.last_norm.0.device())?;
        for Convolution { linear, norm, taps, stride } in &self.convolutions {
            x = through(&taps::windows(&x, *taps, *stride)?, linear)?;
            x = normed(&x, norm)?.gelu_erf()?;
        }
        let x = through(&normed(&x, &self.projection_norm)?, &self.projection)?;
        let mut x = (&x + self.positions.forward(&x)?)?;
        let mut states = vec![x.clone()];
        for layer in &self.layers {
            x = layer.forward(&x, self.sizes.heads)?;
            states.push(x.clone());
        }
        if let Some(last) = states.last_mut() {
            *last = normed(last, &self.last_norm)?;
        }
        Ok(Tensor::cat(&states, 0)?)
    }
}

/// `samples` less their mean, over their deviation.
pub fn normalised(samples: &[f32]) -> Vec<f32> {
    let count = samples.len().max(1) as f64;
    let mean = samples.iter().map(|x| f64::from(*x)).sum::<f64>() / count;
    let variance = samples.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / count;
    let deviation = (variance + VARIANCE_EPSILON).sqrt();
    samples.iter().map(|x| ((f64::from(*x) - mean) / deviation) as f32).collect()
}

fn through(x: &Tensor, (weight, bias): &Linear) -> Result<Tensor> {
    Ok(linear::forward(x, weight, Some(bias), None)?)
}

fn normed(x: &Tensor, (gain, shift): &Norm) -> Result<Tensor> {
    Ok(norm::affine_layer_norm(x, gain, shift, EPSILON, DType::F32)?)
}

impl Positions {
    /// GELU of the convolution of `x` [1, n, width], centred; of an even number of taps the last is behind the middle.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let width = x.dim(2)? / self.groups.len();
        let before = self.taps / 2;
        let padded = x.pad_with_zeros(1, before, self.taps - 1 - before)?;
        let group = |(n, weight): (usize, &Weight)| -> Result<Tensor> {
            let own = padded.narrow(2, n * width, width)?.contiguous()?;
            Ok(linear::forward(&taps::windows(&own, self.taps, 1)?, weight, None, None)?)
        };
        let groups = self.groups.iter().enumerate().map(group).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&groups, 2)?.broadcast_add(&self.bias)?.gelu_erf()?)
    }
}

impl Layer {
    fn forward(&self, x: &Tensor, heads: usize) -> Result<Tensor> {
        let (batch, frames, width) = x.dims3()?;
        let inner = normed(x, &self.norm)?;
        let split = |linear: &Linear| -> Result<Tensor> {
            Ok(through(&inner, linear)?.reshape((batch, frames, heads, width / heads))?)
        };
        let attended = attention::forward(&split(&self.q)?, &split(&self.k)?, &split(&self.v)?)?.o;
        let x = (x + through(&attended.contiguous()?.reshape((batch, frames, width))?, &self.out)?)?;
        let inner = through(&normed(&x, &self.last_norm)?, &self.up)?.gelu_erf()?;
        Ok((&x + through(&inner, &self.down)?)?)
    }
}

struct Loading<'a> {
    weights: &'a Weights,
    device: &'a Device,
}

impl Loading<'_> {
    fn tensor(&self, name: &str) -> Result<Tensor> {
        self.weights.tensor(name, DType::F32, self.device)
    }

    fn norm(&self, name: &str) -> Result<Norm> {
        Ok((self.tensor(&format!("{name}.weight"))?, self.tensor(&format!("{name}.bias"))?))
    }

    fn linear(&self, name: &str) -> Result<Linear> {
        Ok((Weight::Dense(self.tensor(&format!("{name}.weight"))?), self.tensor(&format!("{name}.bias"))?))
    }

    /// The kernel is stored as its direction v and its length g at each tap: w = g v / |v|, the length over both axes of channels.
    fn positions(&self, sizes: &SpeechSizes) -> Result<Positions> {
        let v = self.tensor(sizes::DIRECTION)?;
        let length = v.sqr()?.sum_keepdim(0)?.sum_keepdim(1)?.sqrt()?;
        let kernel = v.broadcast_mul(&self.tensor(sizes::LENGTH)?.broadcast_div(&length)?)?;
        let (groups, rows) = (sizes.groups, sizes.width / sizes.groups);
        let group = |n: usize| -> Result<Weight> {
            Ok(Weight::Dense(taps::matrix(&kernel.narrow(0, n * rows, rows)?.contiguous()?)?))
        };
        Ok(Positions {
            groups: (0..groups).map(group).collect::<Result<_>>()?,
            bias: self.tensor("encoder.pos_conv_embed.conv.bias")?,
            taps: sizes.taps,
        })
    }
}
