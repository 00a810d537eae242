//! The kinds of Wan networks: how each takes pictures, how it is recognised, and the settings that models of it were
//! published with.

mod defaults;
mod table;

pub use defaults::{Defaults, PublishedSolver};

use crate::expert::Networks;
use crate::vae::Generation;

/// Height and width of a patch; the patch is one frame deep.
pub const PATCH: usize = 2;

/// How a network takes pictures: recognised by the channels of its input and output and by its CLIP branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Text alone: T2V of Wan 2.1 and 2.2.
    Text,
    /// A first picture in channels after the noise, and CLIP's states of it: I2V of Wan 2.1.
    Picture,
    /// A first and a last picture, and CLIP's states of both: FLF2V of Wan 2.1.
    TwoPictures,
    /// A first picture in channels alone: the experts of Wan 2.2 I2V.
    PictureWithoutClip,
    /// Text, or a picture in place of the first frame: TI2V-5B of Wan 2.2.
    TextOrPicture,
    /// A control clip and a start picture in channels, and CLIP's states of a picture: Fun-Control of Wan 2.1.
    FunControl,
    /// A control clip and given frames in channels: the experts of Wan 2.2 Fun-Control.
    FunControlExpert,
    /// A start picture in channels, CLIP's states of it, and a camera path: Fun-Control-Camera of Wan 2.1.
    FunCamera,
    /// Given frames in channels and a camera path: the experts of Wan 2.2 Fun-Control-Camera.
    FunCameraExpert,
    /// A first picture in channels and in place of the first frame: Wan 2.2 Fun-InP of 5B.
    FunInPlace,
    /// A control clip and given frames in channels, of which the first one also takes its place: Wan 2.2 Fun-Control of 5B.
    FunControlInPlace,
    /// The same with a camera path for the control clip: Wan 2.2 Fun-Control-Camera of 5B.
    FunCameraInPlace,
    /// A side chain of blocks over a control clip, its mask and reference pictures: VACE.
    Vace,
    /// A reference picture as the first latent frame, a pose clip, a face clip, and CLIP's states of the reference: Animate of
    /// Wan 2.2.
    Animate,
    /// Speech, a reference picture as tokens behind, and a pose clip: S2V of Wan 2.2.
    Speech,
}

/// The properties of a [`Kind`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KindFacts {
    /// Which.
    pub kind: Kind,
    /// Channels of the network's input.
    pub channels_in: usize,
    /// Channels of its output.
    pub channels_out: usize,
    /// Pictures of which the network sees CLIP's states: 0, 1 or 2.
    pub clip_pictures: usize,
    /// How it takes a picture.
    pub pictures: Pictures,
    /// Whether a first frame that is given stands, clean, in place of the first noisy one, at timestep 0.
    pub in_place: bool,
    /// What the channels of its input after the noisy ones are, in their order.
    pub beside: &'static [Beside],
    /// Whether it takes a camera path, through an adapter of its own.
    pub camera: bool,
    /// Whether it has a side chain of blocks that reads a control clip.
    pub side_chain: bool,
    /// Whether it reads a pose clip and the motion of a face.
    pub faces: bool,
    /// Whether it hears speech, and takes a reference picture as tokens behind.
    pub speech: bool,
    /// The VAE whose latents it works on.
    pub vae: Generation,
    /// Settings of one network for all noise levels, or of an expert without the other.
    pub whole: Defaults,
    /// Settings of two experts.
    pub pair: Defaults,
}

/// How a model takes a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pictures {
    /// Not at all: text alone.
    None,
    /// Always: a mask and the picture's latents in channels after the noisy ones (I2V of Wan 2.1 and 2.2).
    Beside,
    /// As clean latents in place of the first frame's, or not at all (TI2V-5B).
    InPlace,
    /// As one of several conditions, each of which may be left out (Fun, VACE).
    Condition,
}

/// A run of channels of the network's input after the noisy ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beside {
    /// Which frames or pixels are given: 4 channels, 1 for what is given.
    Mask,
    /// The latents of the clip with everything that is not given in grey.
    Given,
    /// The latents of a control clip.
    Control,
    /// The latents of a start picture alone in the first latent frame, zeros in the others.
    Start,
}

/// The facts that distinguish published models, read from a checkpoint's tensors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Facts {
    /// Model width.
    pub width: usize,
    /// Channels of the network's input.
    pub channels_in: usize,
    /// Channels of its output.
    pub channels_out: usize,
    /// Pictures of which it sees CLIP's states: 0, 1 or 2.
    pub clip_pictures: usize,
    /// Whether it has a camera adapter.
    pub camera: bool,
    /// Whether it has a side chain of blocks (VACE).
    pub side_chain: bool,
    /// Whether it has pose patches and face blocks (Animate).
    pub faces: bool,
    /// Whether it has an encoder of audio (S2V).
    pub speech: bool,
    /// Whether it takes a reference picture as tokens in front (`ref_conv`).
    pub reference: bool,
}

impl Kind {
    /// Its properties.
    pub const fn facts(self) -> &'static KindFacts {
        &table::KINDS[self as usize]
    }

    /// The kind of a network; `None` if it is of no kind that can be trained.
    pub fn of(facts: Facts) -> Option<Self> {
        let row = table::KINDS.iter().find(|row| {
            (row.channels_in, row.channels_out) == (facts.channels_in, facts.channels_out)
                && row.clip_pictures == facts.clip_pictures
                && (row.camera, row.side_chain) == (facts.camera, facts.side_chain)
                && (row.faces, row.speech) == (facts.faces, facts.speech)
                && (!facts.reference || row.beside.contains(&Beside::Control))
        });
        row.map(|row| row.kind)
    }

    /// The settings that a model of this kind was published with.
    pub const fn defaults(self, networks: Networks) -> &'static Defaults {
        match networks {
            Networks::Whole => &self.facts().whole,
            Networks::Pair => &self.facts().pair,
        }
    }
}

impl Facts {
    /// Of the network whose shapes `shape_of` gives by official name; what is missing counts 0.
    pub fn read(shape_of: impl Fn(&str) -> Option<Vec<usize>>) -> Self {
        let axis =
            |name: &str, axis: usize| shape_of(name).and_then(|shape| shape.get(axis).copied()).unwrap_or(0);
        let branch = usize::from(shape_of("img_emb.proj.0.weight").is_some());
        Self {
            width: axis("patch_embedding.weight", 0),
            channels_in: axis("patch_embedding.weight", 1),
            channels_out: axis("head.head.weight", 0) / PATCH.pow(2),
            clip_pictures: branch * if shape_of("img_emb.emb_pos").is_some() { 2 } else { 1 },
            camera: shape_of("control_adapter.conv.weight").is_some(),
            side_chain: shape_of("vace_patch_embedding.weight").is_some(),
            faces: shape_of("pose_patch_embedding.weight").is_some(),
            speech: shape_of("casual_audio_encoder.weights").is_some(),
            reference: shape_of("ref_conv.weight").is_some(),
        }
    }
}
