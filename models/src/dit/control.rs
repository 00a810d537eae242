//! The parts of control models besides those of the plain DiT: a reference picture's tokens, a camera adapter, a side chain,
//! Animate's poses and faces, S2V's audio.
//!
//! Sources: aigc-apps/VideoX-Fun videox_fun/models/wan_transformer3d.py (`ref_conv`, `control_adapter`); Wan-Video/Wan2.1
//! wan/modules/vace_model.py.

use super::animate::Animate;
use super::config::PATCH;
use super::layer_id::LayerId;
use super::role::Role;
use super::speech::{self, Speech};
use crate::{Error, Result};

/// Latents [b, c, h, w] of a reference picture, which Fun takes as tokens in front, zeros where there is none, and S2V as tokens behind.
pub const REFERENCE: Role = Role::new("reference", "the latents of a reference picture (ref_latent)");
/// The camera's rays [b, 24, t, 8h, 8w] of every pixel, as Fun's camera adapter reads them, a latent frame at a time.
pub const CAMERA: Role = Role::new("camera", "the rays of a camera path (camera)").on_host();
/// What VACE's side chain reads, [b, 96, t, h, w]: inactive and reactive latents, and the mask.
pub const CONTEXT: Role = Role::new("vace-context", "the context of VACE's side chain (vace_context)");
/// What each sample's hints are multiplied by, `[b]`, of VACE's side chain; 1 where there is none. Embedded: [b, 1, 1].
pub const HINT_SCALE: Role = Role::new("hint-scale", "the factor of VACE's hints (hint scale)").on_host();

/// Channels of a camera's rays in a latent frame: six Pluecker coordinates of four frames.
pub const CAMERA_CHANNELS: usize = 24;

/// The control parts of a model; none by default.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Control {
    /// Channels of the reference picture's latents, where the model takes one as tokens in front.
    pub reference: Option<usize>,
    /// The camera adapter.
    pub camera: Option<CameraSizes>,
    /// VACE's side chain.
    pub side_chain: Option<SideChain>,
    /// Animate's pose patches, motion encoder and face blocks.
    pub animate: Option<Animate>,
    /// S2V's audio, reference and past.
    pub speech: Option<Speech>,
}

/// The sizes of a camera adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CameraSizes {
    /// Pixels per latent along height and width, which its first convolution reads at once.
    pub stride: usize,
}

/// The sizes of VACE's side chain.
#[derive(Debug, Clone, PartialEq)]
pub struct SideChain {
    /// Channels that it reads.
    pub channels: usize,
    /// The main blocks after which its blocks add to the main stream, ascending.
    pub after: Vec<usize>,
    /// What is added is multiplied by this. Default 1.
    pub scale: f64,
}

impl CameraSizes {
    /// Channels of its first convolution.
    pub fn width(self) -> usize {
        CAMERA_CHANNELS * self.stride * self.stride
    }
}

impl Control {
    /// The control parts of the weights whose shapes `shape_of` gives by official name, of a model of `layers` main blocks;
    /// `after` are the main blocks that side blocks follow and `injected` those that audio injections follow, where the config names
    /// them.
    ///
    /// # Errors
    /// A camera adapter of another kind, and a list of main blocks that does not fit the side blocks.
    pub fn read(
        shape_of: impl Fn(&str) -> Option<Vec<usize>>,
        layers: usize,
        (after, injected): (Option<Vec<usize>>, Option<Vec<usize>>),
    ) -> Result<Self> {
        let channels = |name: &str| shape_of(name).and_then(|shape| shape.get(1).copied());
        let camera = channels("control_adapter.conv.weight").map(|width| {
            let stride = (width / CAMERA_CHANNELS).isqrt();
            let sizes = CameraSizes { stride };
            match sizes.width() == width && stride > 0 {
                true => Ok(sizes),
                false => Err(Error::Mismatch(format!(
                    "control_adapter.conv.weight reads {width} channels: {CAMERA_CHANNELS} times a square are expected"
                ))),
            }
        });
        let blocks = (0..).take_while(|n| shape_of(&format!("{}.modulation", LayerId::side(*n))).is_some());
        let side_chain = channels("vace_patch_embedding.weight")
            .map(|channels| SideChain::new(channels, blocks.count(), layers, after));
        let animate = Animate::read(&shape_of, layers)?;
        let speech = Speech::read(&shape_of, layers, injected)?;
        Ok(Self {
            animate,
            speech,
            reference: channels("ref_conv.weight"),
            camera: camera.transpose()?,
            side_chain: side_chain.transpose()?,
        })
    }

    /// Latent frames before those of the clip, of a clip with `count` reference pictures: VACE has one for each, Animate one.
    pub fn frames_of_references(&self, count: usize) -> usize {
        match (&self.side_chain, &self.animate) {
            (Some(_), _) => count,
            (None, Some(_)) => 1,
            (None, None) => 0,
        }
    }

    /// Latent frames that the network learns beyond those of a clip with `count` reference pictures; -1 of S2V, for which the first of
    /// the clip's own is the reference picture.
    pub fn frames_beyond(&self, count: usize) -> isize {
        match &self.speech {
            Some(_) => -1,
            None => self.frames_of_references(count).cast_signed(),
        }
    }

    /// Blocks of the side chain.
    pub fn side_blocks(&self) -> usize {
        self.side_chain.as_ref().map_or(0, |chain| chain.after.len())
    }

    /// Tokens behind those of latents of this height and width; `has_past` says whether frames before the clip are among them.
    pub fn tokens_behind(&self, height: usize, width: usize, has_past: bool) -> usize {
        self.speech.as_ref().map_or(0, |_| speech::tokens_behind(height, width, has_past))
    }

    /// Tokens in front of those of latents of this height and width.
    pub fn tokens_in_front(&self, height: usize, width: usize) -> usize {
        self.reference.map_or(0, |_| (height / PATCH) * (width / PATCH))
    }
}

impl SideChain {
    /// A chain of `blocks` side blocks in a model of `layers` main blocks. They are spread evenly unless `after` says where they
    /// add to the main stream.
    ///
    /// # Errors
    /// If there is no side block, or `after` does not name one ascending main block for each, the first one first.
    pub fn new(channels: usize, blocks: usize, layers: usize, after: Option<Vec<usize>>) -> Result<Self> {
        let refuse = |why: String| Err(Error::Mismatch(why));
        if blocks == 0 {
            return refuse("it has a vace_patch_embedding and no vace_blocks".into());
        }
        let after = after.unwrap_or_else(|| {
            let step = layers.div_ceil(blocks);
            (0..blocks).map(|block| block * step).collect()
        });
        let is_ascending = after.windows(2).all(|pair| pair[0] < pair[1]);
        if after.len() != blocks || !is_ascending || after[0] != 0 || after[blocks - 1] >= layers {
            return refuse(format!(
                "its {blocks} vace_blocks do not fit vace_layers {after:?} of {layers} blocks: one block for each is \
                 expected, ascending from 0"
            ));
        }
        Ok(Self { channels, after, scale: 1.0 })
    }

    /// The side block that follows the main block `n`, if any.
    pub fn following(&self, n: usize) -> Option<LayerId> {
        self.after.iter().position(|&block| block == n).map(LayerId::side)
    }
}
