//! The parts of the VAEs: each sees a chunk of frames and what it kept of the chunks before.
//!
//! Source: Wan-Video/Wan2.1 `wan/modules/vae.py`.

use kernels::channel_norm::{Activation, channel_norm};
use kernels::conv3d::{Around, Before, Conv3dGeometry, Padding, conv3d, conv3d_band};
use kernels::frame_attention::frame_attention;
use kernels::resample::{frames_from_channels, upsample_nearest_2x};
use kernels::{DType, Device, Tensor, video};

use crate::weights::Weights;
use crate::{Error, Result};

use super::bands::{Edges, Rows};
use super::plan::{PartPlan, Reach};

/// What the causal parts keep of the chunks before, one slot for each, empty before the first chunk; and which rows of the frames
/// they see.
#[derive(Debug)]
pub(super) struct History<'a> {
    slots: Vec<Option<Past>>,
    rows: Rows<'a>,
}

/// Frames of the chunks before, with the rows around them in a band.
#[derive(Debug, Clone)]
struct Past {
    frames: Tensor,
    edges: Edges,
}

impl<'a> History<'a> {
    /// Of parts that see whole frames.
    pub(super) fn new(slots: usize) -> Self {
        Self::of(slots, Rows::All)
    }

    pub(super) fn of(slots: usize, rows: Rows<'a>) -> Self {
        Self { slots: vec![None; slots], rows }
    }

    fn get(&self, slot: usize) -> Option<&Past> {
        self.slots.get(slot)?.as_ref()
    }

    /// Keeps the last `frames` of `x`, in memory of their own: a view would keep the whole chunk alive.
    fn keep_last(&mut self, slot: usize, (x, edges): (&Tensor, &Edges), frames: usize) -> Result<()> {
        self.put(slot, Past { frames: video::last_frames(x, frames)?, edges: edges.last(frames)? });
        Ok(())
    }

    /// Keeps the last `frames` of what is kept and `x` together.
    fn push(&mut self, slot: usize, (x, edges): (&Tensor, &Edges), frames: usize) -> Result<()> {
        match self.get(slot) {
            Some(past) if x.dim(2)? < frames => {
                let (known, edges) = (video::join_frames(&past.frames, x)?, past.edges.then(edges)?);
                self.keep_last(slot, (&known, &edges), frames)
            }
            _ => self.keep_last(slot, (x, edges), frames),
        }
    }

    fn put(&mut self, slot: usize, x: Past) {
        if let Some(place) = self.slots.get_mut(slot) {
            *place = Some(x);
        }
    }
}

/// Reads parts from weights and counts the slots that they need.
pub(super) struct Builder<'a> {
    pub weights: &'a Weights,
    pub dtype: DType,
    pub device: &'a Device,
    pub slots: usize,
}

impl Builder<'_> {
    fn tensor(&self, name: String) -> Result<Tensor> {
        self.weights.tensor(&name, self.dtype, self.device)
    }

    fn slot(&mut self) -> usize {
        self.slots += 1;
        self.slots - 1
    }

    fn conv(&self, name: &str, geometry: Conv3dGeometry) -> Result<Conv> {
        let weight = self.tensor(format!("{name}.weight"))?;
        // A 2D kernel is a 3D one of a single frame.
        let weight = if weight.rank() == 4 { weight.unsqueeze(2)? } else { weight };
        let weight = video::arranged(&weight)?;
        Ok(Conv { weight, bias: self.tensor(format!("{name}.bias"))?, geometry })
    }

    fn causal(&mut self, name: &str) -> Result<CausalConv> {
        let conv = self.conv(name, Conv3dGeometry::unit(Padding::all(1)))?;
        Ok(CausalConv { conv, slot: self.slot() })
    }

    /// Reads the part of `plan`.
    pub(super) fn part(&mut self, plan: &PartPlan) -> Result<Part> {
        let pointwise = Conv3dGeometry::unit(Padding::default());
        Ok(match plan {
            PartPlan::Silu => Part::Silu,
            PartPlan::Conv { name, kernel: 1, .. } => Part::Pointwise(self.conv(name, pointwise)?),
            PartPlan::Conv { name, .. } => Part::Conv(self.causal(name)?),
            PartPlan::Norm { name, .. } => Part::Norm(self.tensor(format!("{name}.gamma"))?),
            PartPlan::Residual { name, from, to } => Part::Residual(Box::new(Residual {
                norm_1: self.tensor(format!("{name}.residual.0.gamma"))?,
                conv_1: self.causal(&format!("{name}.residual.2"))?,
                norm_2: self.tensor(format!("{name}.residual.3.gamma"))?,
                conv_2: self.causal(&format!("{name}.residual.6"))?,
                shortcut: match from == to {
                    true => None,
                    false => Some(self.conv(&format!("{name}.shortcut"), pointwise)?),
                },
            })),
            PartPlan::Attention { name, .. } => Part::Attention(Attention {
                norm: self.tensor(format!("{name}.norm.gamma"))?,
                to_qkv: self.conv(&format!("{name}.to_qkv"), pointwise)?,
                proj: self.conv(&format!("{name}.proj"), pointwise)?,
            }),
            PartPlan::Down { name, reach, .. } => self.down(name, *reach)?,
            PartPlan::Up { name, reach, .. } => self.up(name, *reach)?,
        })
    }

    fn down(&mut self, name: &str, reach: Reach) -> Result<Part> {
        let padding = Padding { bottom: 1, right: 1, ..Padding::default() };
        let space = self.conv(
            &format!("{name}.resample.1"),
            Conv3dGeometry { time_stride: 1, space_stride: 2, padding },
        )?;
        let halving = Conv3dGeometry { time_stride: 2, space_stride: 1, padding: Padding::default() };
        let time = self.time_conv(name, reach, halving)?;
        Ok(Part::Down { space, time })
    }

    fn up(&mut self, name: &str, reach: Reach) -> Result<Part> {
        let space = self.conv(&format!("{name}.resample.1"), Conv3dGeometry::unit(Padding::all(1)))?;
        let time = self.time_conv(name, reach, Conv3dGeometry::unit(Padding::default()))?;
        Ok(Part::Up { space, time })
    }

    fn time_conv(
        &mut self,
        name: &str,
        reach: Reach,
        geometry: Conv3dGeometry,
    ) -> Result<Option<CausalConv>> {
        match reach {
            Reach::Space => Ok(None),
            Reach::SpaceAndTime => {
                let conv = self.conv(&format!("{name}.time_conv"), geometry)?;
                Ok(Some(CausalConv { conv, slot: self.slot() }))
            }
        }
    }
}

/// A part of a network, ready to run on [B,C,T,H,W].
#[derive(Debug, Clone)]
pub(super) enum Part {
    Conv(CausalConv),
    Pointwise(Conv),
    Norm(Tensor),
    Silu,
    Residual(Box<Residual>),
    Attention(Attention),
    Down { space: Conv, time: Option<CausalConv> },
    Up { space: Conv, time: Option<CausalConv> },
}

impl Part {
    /// The part's output; the input is freed as soon as nothing needs it.
    pub(super) fn forward(&self, x: Tensor, history: &mut History) -> Result<Tensor> {
        match self {
            Self::Conv(conv) => conv.forward(x, history),
            Self::Pointwise(conv) => conv.forward(&x),
            Self::Norm(gamma) => Ok(channel_norm(&x, gamma, Activation::Identity)?),
            Self::Silu => Ok(video::silu(&x)?),
            Self::Residual(block) => block.forward(&x, history),
            Self::Attention(block) => block.forward(&x, history.rows),
            Self::Down { space, time } => {
                let halved = space.forward(&x)?;
                drop(x);
                down(&halved, time.as_ref(), history)
            }
            Self::Up { space, time } => {
                let x = match time {
                    Some(time) => up_in_time(x, time, history)?,
                    None => x,
                };
                let doubled = upsample_nearest_2x(&x)?;
                drop(x);
                let (edges, geometry) = history.rows.edges(&doubled, space.geometry)?;
                space.forward_with(geometry, Before::default(), (&doubled, edges.around()), None)
            }
        }
    }
}

impl Part {
    pub(super) fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        match self {
            Self::Conv(conv) => conv.conv.tensors_mut().into(),
            Self::Pointwise(conv) => conv.tensors_mut().into(),
            Self::Norm(gamma) => vec![gamma],
            Self::Silu => Vec::new(),
            Self::Residual(block) => {
                let Residual { norm_1, conv_1, norm_2, conv_2, shortcut } = &mut **block;
                let convs = [&mut conv_1.conv, &mut conv_2.conv].into_iter().chain(shortcut);
                [norm_1, norm_2].into_iter().chain(convs.flat_map(Conv::tensors_mut)).collect()
            }
            Self::Attention(Attention { norm, to_qkv, proj }) => {
                let convs = [to_qkv, proj].into_iter().flat_map(Conv::tensors_mut);
                std::iter::once(norm).chain(convs).collect()
            }
            Self::Down { space, time } | Self::Up { space, time } => {
                let time = time.iter_mut().map(|time| &mut time.conv);
                std::iter::once(space).chain(time).flat_map(Conv::tensors_mut).collect()
            }
        }
    }
}

/// A convolution with its bias.
#[derive(Debug, Clone)]
pub(super) struct Conv {
    weight: Tensor,
    bias: Tensor,
    geometry: Conv3dGeometry,
}

impl Conv {
    fn tensors_mut(&mut self) -> [&mut Tensor; 2] {
        [&mut self.weight, &mut self.bias]
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(conv3d(x, &self.weight, Some(&self.bias), self.geometry)?)
    }

    fn forward_after(&self, before: Before, x: &Tensor, onto: Option<&Tensor>) -> Result<Tensor> {
        self.forward_with(self.geometry, before, (x, Around::default()), onto)
    }

    fn forward_with(
        &self,
        geometry: Conv3dGeometry,
        before: Before,
        x: (&Tensor, Around),
        onto: Option<&Tensor>,
    ) -> Result<Tensor> {
        Ok(conv3d_band(before, x, &self.weight, Some(&self.bias), geometry, onto)?)
    }
}

/// Frames of the past that a kernel of three frames sees.
const PAST: usize = 2;

/// A convolution over three frames, of which two are the past: zeros before the first frame of a clip.
#[derive(Debug, Clone)]
pub(super) struct CausalConv {
    conv: Conv,
    slot: usize,
}

impl CausalConv {
    fn forward(&self, x: Tensor, history: &mut History) -> Result<Tensor> {
        self.forward_onto(x, history, None)
    }

    fn forward_onto(&self, x: Tensor, history: &mut History, onto: Option<&Tensor>) -> Result<Tensor> {
        let (edges, geometry) = history.rows.edges(&x, self.conv.geometry)?;
        let past = history.get(self.slot);
        let known = past.map_or(Ok(0), |past| past.frames.dim(2))?;
        let before = Before {
            zeros: PAST - known,
            past: past.map(|past| &past.frames),
            around: past.map(|past| past.edges.around()).unwrap_or_default(),
        };
        let y = self.conv.forward_with(geometry, before, (&x, edges.around()), onto)?;
        history.push(self.slot, (&x, &edges), PAST)?;
        Ok(y)
    }
}

/// Norm, SiLU, convolution, twice, around a shortcut that sees the raw input.
#[derive(Debug, Clone)]
pub(super) struct Residual {
    norm_1: Tensor,
    conv_1: CausalConv,
    norm_2: Tensor,
    conv_2: CausalConv,
    shortcut: Option<Conv>,
}

impl Residual {
    fn forward(&self, x: &Tensor, history: &mut History) -> Result<Tensor> {
        let h = self.conv_1.forward(channel_norm(x, &self.norm_1, Activation::Silu)?, history)?;
        let normed = channel_norm(&h, &self.norm_2, Activation::Silu)?;
        drop(h);
        let h = normed;
        match &self.shortcut {
            Some(conv) => self.conv_2.forward_onto(h, history, Some(&conv.forward(x)?)),
            None => self.conv_2.forward_onto(h, history, Some(x)),
        }
    }
}

/// One head over the positions of each frame.
#[derive(Debug, Clone)]
pub(super) struct Attention {
    norm: Tensor,
    to_qkv: Conv,
    proj: Conv,
}

impl Attention {
    fn forward(&self, x: &Tensor, rows: Rows) -> Result<Tensor> {
        let (b, c, t, h, w) = x.dims5()?;
        let qkv = self.to_qkv.forward(&channel_norm(x, &self.norm, Activation::Identity)?)?;
        // The tokens of a frame are its pixels.
        let qkv = qkv.permute((0, 2, 3, 4, 1))?.contiguous()?.reshape((b * t, h * w, 3 * c))?;
        let of_frame = |qkv: Tensor| {
            let q = qkv.narrow(1, 0, c)?.contiguous()?.reshape((1, 1, h, w, c))?.permute((0, 4, 1, 2, 3))?;
            let kv = rows.gathered(qkv.narrow(1, c, 2 * c)?.contiguous()?)?;
            let [k, v] = [0, c].map(|first| kv.narrow(1, first, c)?.contiguous());
            Ok::<_, Error>(frame_attention(&q, &k?, &v?)?.permute((0, 2, 3, 4, 1))?.contiguous()?)
        };
        let o = (0..b * t).map(|i| of_frame(qkv.get(i)?)).collect::<Result<Vec<_>>>()?;
        let y = Tensor::cat(&o, 0)?.reshape((b, t, h, w, c))?.permute((0, 4, 1, 2, 3))?;
        self.proj.forward_after(Before::default(), &y, Some(x))
    }
}

/// Halves the frames of an input that was already halved in space. The first frame of a clip passes as it is; later
/// chunks see the last frame before them.
fn down(x: &Tensor, time: Option<&CausalConv>, history: &mut History) -> Result<Tensor> {
    let Some(time) = time else { return Ok(x.clone()) };
    let y = match history.get(time.slot) {
        None => x.clone(),
        Some(past) => {
            let before = Before { past: Some(&past.frames), ..Before::default() };
            time.conv.forward_after(before, x, None)?
        }
    };
    history.keep_last(time.slot, (x, &Edges::default()), 1)?;
    Ok(y)
}

/// Doubles the frames. The first frame of a clip passes as it is and is forgotten: to the second chunk the past is zero.
fn up_in_time(x: Tensor, time: &CausalConv, history: &mut History) -> Result<Tensor> {
    if history.get(time.slot).is_none() {
        let (b, c, _, h, w) = x.dims5()?;
        let frames = Tensor::zeros((b, c, PAST, h, w), x.dtype(), x.device())?;
        history.put(time.slot, Past { frames, edges: Edges::default() });
        return Ok(x);
    }
    let pairs = time.forward(x, history)?;
    Ok(frames_from_channels(&pairs)?)
}
