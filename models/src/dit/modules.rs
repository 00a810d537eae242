//! The modules of a Wan DiT, each described once: its names, and the shapes and storage of its tensors.
//!
//! Listing, checking, loading, sizing and renaming all read these tables. Source: the key names of Wan-Video/Wan2.1
//! `wan/modules/model.py` and of diffusers `transformer_wan.py` with its checkpoint converter.

use super::animate::FACE_HEADS;
use super::causal::TAPS;
use super::config::{DitConfig, PATCH};
use super::control::CameraSizes;
use super::layer_id::LayerId;
use super::speech::KINDS;
use crate::weights::{TensorClass, TensorSpec};

/// A module: a linear layer, a norm, or a single tensor.
#[derive(Debug, Clone, Copy)]
pub struct Module {
    /// Its name in the official checkpoints and in ComfyUI, without the layer's.
    pub official: &'static str,
    /// Its name in diffusers, without the layer's.
    pub diffusers: &'static str,
    /// How its tensors are stored; the bias of a matrix is in the compute dtype.
    pub class: TensorClass,
    shape: Shape,
    when: When,
}

/// The tensors of a module.
#[derive(Debug, Clone, Copy)]
enum Shape {
    /// `weight` [out, in] and `bias` `[out]`.
    Linear(Width, Width),
    /// `weight` [d, channels, 1, patch, patch] and `bias` `[d]`.
    Patches(Width),
    /// `weight` [d, channels, side, side] and `bias` `[d]`.
    Kernel(Width, usize),
    /// `weight` [out, in, taps] and `bias` `[out]` of a convolution over frames.
    Frames(Width, Width),
    /// `weight` `[width]`.
    Gain(Width),
    /// `weight` and `bias` `[width]`.
    Norm(Width),
    /// The module is a tensor itself: [1, rows, width].
    Rows(Rows, Width),
    /// The module is a tensor itself: [1, 1, 1, width].
    Token(Width),
    /// `weight` [rows, width] without a bias.
    Table(usize, Width),
    /// `weight` [d, channels, scale, 2 scale, 2 scale] and `bias` `[d]`.
    Pack(Width, usize),
}

/// A width of the model.
#[derive(Debug, Clone, Copy)]
enum Width {
    Model,
    /// Six times the model's.
    Modulation,
    FeedForward,
    Text,
    Sinusoid,
    /// The numbers of a patch of the velocity.
    Velocity,
    /// CLIP's.
    Picture,
    /// The channels of the network's input.
    Input,
    /// Those of a reference picture's latents.
    Reference,
    /// The camera's channels of all pixels of a latent.
    Camera,
    /// The channels that the side chain reads.
    Hints,
    /// The channels of latents.
    Latents,
    /// Twice the model's: keys and values.
    KeysAndValues,
    /// One head's.
    Head,
    /// A motion vector's.
    Motion,
    /// The face encoder's, of one head and of all four.
    Face,
    FaceHeads,
    /// Of the speech encoder's states.
    Audio,
    /// A quarter and half of the model's, of the audio encoder.
    Quarter,
    Half,
}

#[derive(Debug, Clone, Copy)]
enum Rows {
    Of(usize),
    /// Of the learned positions of pictures.
    Positions,
}

/// Which models have a module.
#[derive(Debug, Clone, Copy)]
enum When {
    Always,
    ImageBranch,
    PicturePositions,
    Reference,
    Camera,
    SideChain,
    Animate,
    Speech,
}

/// The layers of a chain, and the modules that each has.
#[derive(Debug, Clone, Copy)]
pub struct Chain {
    /// The prefix of the names of their tensors, before the number, in the official layout.
    pub name: &'static str,
    /// The same in diffusers.
    pub diffusers: &'static str,
    /// The modules of a transformer block, where it has one, and those of its own.
    modules: [&'static [Module]; 2],
}

/// Every chain of layers in the names of files.
pub const CHAINS: &[Chain] = &[
    Chain { name: LayerId::BLOCKS, diffusers: LayerId::BLOCKS, modules: [BLOCK, &[]] },
    Chain {
        name: LayerId::SIDE_BLOCKS,
        diffusers: LayerId::SIDE_BLOCKS,
        modules: [BLOCK, &[BEFORE_HINTS, AFTER_HINTS]],
    },
    Chain { name: LayerId::FACE_BLOCKS, diffusers: "face_adapter", modules: [&[], FACE_BLOCK] },
    Chain { name: LayerId::INJECTIONS, diffusers: LayerId::INJECTIONS, modules: [&[], INJECTION] },
];

/// The modules of an audio injection (S2V), which diffusers does not have.
const INJECTION: &[Module] = &[
    matrix("q", "q", Width::Model, Width::Model),
    condition("k", "k"),
    condition("v", "v"),
    matrix("o", "o", Width::Model, Width::Model),
    full("norm_q", "norm_q", Shape::Gain(Width::Model)),
    full("norm_k", "norm_k", Shape::Gain(Width::Model)),
];

/// The modules of a face block (Animate). In diffusers keys and values are two modules: see [`JOINED`].
const FACE_BLOCK: &[Module] = &[
    matrix("linear1_q", "to_q", Width::Model, Width::Model),
    module(
        "linear1_kv",
        "linear1_kv",
        Shape::Linear(Width::KeysAndValues, Width::Model),
        TensorClass::ConditionMatrix,
    ),
    matrix("linear2", "to_out", Width::Model, Width::Model),
    full("q_norm", "norm_q", Shape::Gain(Width::Head)),
    full("k_norm", "norm_k", Shape::Gain(Width::Head)),
];

/// An official module whose rows diffusers has as two modules: (its name in a face block, theirs).
pub const JOINED: (&str, [&str; 2]) = ("linear1_kv", ["to_k", "to_v"]);

/// What the side chain begins with; the official name is that of its first block, which has it alone.
pub(super) const BEFORE_HINTS: Module =
    compute("before_proj", "proj_in", Shape::Linear(Width::Model, Width::Model)).when(When::SideChain);

/// What turns the stream of a side block into what is added to the main stream.
const AFTER_HINTS: Module =
    matrix("after_proj", "proj_out", Width::Model, Width::Model).when(When::SideChain);

impl Chain {
    /// The modules of a layer.
    pub fn modules(&self) -> impl Iterator<Item = &'static Module> + use<> {
        self.modules.into_iter().flatten()
    }
}

/// The modules of a transformer block. The affine norm before cross-attention is official `norm3` and diffusers `norm2`:
/// the trap of this table.
pub const BLOCK: &[Module] = &[
    rows("modulation", "scale_shift_table", Rows::Of(6)),
    matrix("self_attn.q", "attn1.to_q", Width::Model, Width::Model),
    matrix("self_attn.k", "attn1.to_k", Width::Model, Width::Model),
    matrix("self_attn.v", "attn1.to_v", Width::Model, Width::Model),
    matrix("self_attn.o", "attn1.to_out.0", Width::Model, Width::Model),
    full("self_attn.norm_q", "attn1.norm_q", Shape::Gain(Width::Model)),
    full("self_attn.norm_k", "attn1.norm_k", Shape::Gain(Width::Model)),
    matrix("cross_attn.q", "attn2.to_q", Width::Model, Width::Model),
    condition("cross_attn.k", "attn2.to_k"),
    condition("cross_attn.v", "attn2.to_v"),
    matrix("cross_attn.o", "attn2.to_out.0", Width::Model, Width::Model),
    full("cross_attn.norm_q", "attn2.norm_q", Shape::Gain(Width::Model)),
    full("cross_attn.norm_k", "attn2.norm_k", Shape::Gain(Width::Model)),
    condition("cross_attn.k_img", "attn2.add_k_proj").when(When::ImageBranch),
    condition("cross_attn.v_img", "attn2.add_v_proj").when(When::ImageBranch),
    full("cross_attn.norm_k_img", "attn2.norm_added_k", Shape::Gain(Width::Model)).when(When::ImageBranch),
    full("norm3", "norm2", Shape::Norm(Width::Model)),
    matrix("ffn.0", "ffn.net.0.proj", Width::FeedForward, Width::Model),
    matrix("ffn.2", "ffn.net.2", Width::Model, Width::FeedForward),
];

/// The modules outside the layers: the embeddings, and the head, whose official names begin with `head.`.
pub const OUTSIDE: &[Module] = &[
    compute("patch_embedding", "patch_embedding", Shape::Patches(Width::Input)),
    rows("head.modulation", "scale_shift_table", Rows::Of(2)),
    compute(
        "text_embedding.0",
        "condition_embedder.text_embedder.linear_1",
        Shape::Linear(Width::Model, Width::Text),
    ),
    compute(
        "text_embedding.2",
        "condition_embedder.text_embedder.linear_2",
        Shape::Linear(Width::Model, Width::Model),
    ),
    full(
        "time_embedding.0",
        "condition_embedder.time_embedder.linear_1",
        Shape::Linear(Width::Model, Width::Sinusoid),
    ),
    full(
        "time_embedding.2",
        "condition_embedder.time_embedder.linear_2",
        Shape::Linear(Width::Model, Width::Model),
    ),
    full("time_projection.1", "condition_embedder.time_proj", Shape::Linear(Width::Modulation, Width::Model)),
    full("head.head", "proj_out", Shape::Linear(Width::Velocity, Width::Model)),
    full("img_emb.proj.0", "condition_embedder.image_embedder.norm1", Shape::Norm(Width::Picture))
        .when(When::ImageBranch),
    compute(
        "img_emb.proj.1",
        "condition_embedder.image_embedder.ff.net.0.proj",
        Shape::Linear(Width::Picture, Width::Picture),
    )
    .when(When::ImageBranch),
    compute(
        "img_emb.proj.3",
        "condition_embedder.image_embedder.ff.net.2",
        Shape::Linear(Width::Model, Width::Picture),
    )
    .when(When::ImageBranch),
    full("img_emb.proj.4", "condition_embedder.image_embedder.norm2", Shape::Norm(Width::Model))
        .when(When::ImageBranch),
    full(
        "img_emb.emb_pos",
        "condition_embedder.image_embedder.pos_embed",
        Shape::Rows(Rows::Positions, Width::Picture),
    )
    .when(When::PicturePositions),
    // No program has other names for the parts of Fun.
    same("ref_conv", Shape::Kernel(Width::Reference, PATCH), When::Reference),
    same("control_adapter.conv", Shape::Kernel(Width::Camera, PATCH), When::Camera),
    same("control_adapter.residual_blocks.0.conv1", Shape::Kernel(Width::Model, 3), When::Camera),
    same("control_adapter.residual_blocks.0.conv2", Shape::Kernel(Width::Model, 3), When::Camera),
    same("vace_patch_embedding", Shape::Patches(Width::Hints), When::SideChain),
    same("pose_patch_embedding", Shape::Patches(Width::Latents), When::Animate),
    compute(
        "face_encoder.conv1_local.conv",
        "face_encoder.conv1_local",
        Shape::Frames(Width::FaceHeads, Width::Motion),
    )
    .when(When::Animate),
    compute("face_encoder.conv2.conv", "face_encoder.conv2", Shape::Frames(Width::Face, Width::Face))
        .when(When::Animate),
    compute("face_encoder.conv3.conv", "face_encoder.conv3", Shape::Frames(Width::Face, Width::Face))
        .when(When::Animate),
    same("face_encoder.out_proj", Shape::Linear(Width::Model, Width::Face), When::Animate),
    same("face_encoder.padding_tokens", Shape::Token(Width::Model), When::Animate),
    same("cond_encoder", Shape::Patches(Width::Latents), When::Speech),
    full("trainable_cond_mask", "trainable_cond_mask", Shape::Table(KINDS, Width::Model)).when(When::Speech),
    same("frame_packer.proj", Shape::Pack(Width::Latents, 1), When::Speech),
    same("frame_packer.proj_2x", Shape::Pack(Width::Latents, 2), When::Speech),
    same("frame_packer.proj_4x", Shape::Pack(Width::Latents, 4), When::Speech),
    same(
        "casual_audio_encoder.encoder.conv1_local.conv",
        Shape::Frames(Width::Model, Width::Audio),
        When::Speech,
    ),
    same(
        "casual_audio_encoder.encoder.conv1_global.conv",
        Shape::Frames(Width::Quarter, Width::Audio),
        When::Speech,
    ),
    same("casual_audio_encoder.encoder.conv2.conv", Shape::Frames(Width::Half, Width::Quarter), When::Speech),
    same("casual_audio_encoder.encoder.conv3.conv", Shape::Frames(Width::Model, Width::Half), When::Speech),
    same(
        "casual_audio_encoder.encoder.final_linear",
        Shape::Linear(Width::Model, Width::Model),
        When::Speech,
    ),
    same("casual_audio_encoder.encoder.padding_tokens", Shape::Token(Width::Model), When::Speech),
];

const fn module(official: &'static str, diffusers: &'static str, shape: Shape, class: TensorClass) -> Module {
    Module { official, diffusers, shape, class, when: When::Always }
}

/// A linear layer of a block: adapters attach to it, and its matrix may be quantised.
const fn matrix(official: &'static str, diffusers: &'static str, out: Width, input: Width) -> Module {
    module(official, diffusers, Shape::Linear(out, input), TensorClass::Matrix)
}

/// A [`matrix`] that only the rows of text or picture go through.
const fn condition(official: &'static str, diffusers: &'static str) -> Module {
    module(official, diffusers, Shape::Linear(Width::Model, Width::Model), TensorClass::ConditionMatrix)
}

const fn compute(official: &'static str, diffusers: &'static str, shape: Shape) -> Module {
    module(official, diffusers, shape, TensorClass::Compute)
}

/// A module of the compute dtype with one name in both layouts.
const fn same(name: &'static str, shape: Shape, when: When) -> Module {
    compute(name, name, shape).when(when)
}

const fn full(official: &'static str, diffusers: &'static str, shape: Shape) -> Module {
    module(official, diffusers, shape, TensorClass::Full)
}

/// Rows of modulation, as wide as the model.
const fn rows(official: &'static str, diffusers: &'static str, rows: Rows) -> Module {
    full(official, diffusers, Shape::Rows(rows, Width::Model))
}

impl Width {
    fn of(self, config: &DitConfig) -> usize {
        match self {
            Self::Model => config.dim,
            Self::Modulation => 6 * config.dim,
            Self::FeedForward => config.ffn_dim,
            Self::Text => config.text_dim,
            Self::Sinusoid => config.freq_dim,
            Self::Velocity => config.out_channels * PATCH * PATCH,
            Self::Picture => config.image.map_or(0, |image| image.dim),
            Self::Input => config.in_channels,
            Self::Reference => config.control.reference.unwrap_or(0),
            Self::Camera => config.control.camera.map_or(0, CameraSizes::width),
            Self::Hints => config.control.side_chain.as_ref().map_or(0, |chain| chain.channels),
            Self::Latents => config.out_channels,
            Self::KeysAndValues => 2 * config.dim,
            Self::Head => config.head_size(),
            Self::Motion => config.control.animate.as_ref().map_or(0, |animate| animate.motion.width),
            Self::Face => config.control.animate.as_ref().map_or(0, |animate| animate.face_width),
            Self::FaceHeads => FACE_HEADS * Self::Face.of(config),
            Self::Audio => config.control.speech.as_ref().map_or(0, |speech| speech.audio_width),
            Self::Quarter => config.dim / 4,
            Self::Half => config.dim / 2,
        }
    }
}

impl Module {
    const fn when(self, when: When) -> Self {
        Self { when, ..self }
    }

    /// Its tensors in a model of `config`, their names prefixed with `prefix`; none if the model has no such module.
    pub fn tensors(&self, config: &DitConfig, prefix: &str) -> Vec<TensorSpec> {
        let positions = config.image.and_then(|image| image.positions);
        let is_there = match self.when {
            When::Always => true,
            When::ImageBranch => config.image.is_some(),
            When::PicturePositions => positions.is_some(),
            When::Reference => config.control.reference.is_some(),
            When::Camera => config.control.camera.is_some(),
            When::SideChain => config.control.side_chain.is_some(),
            When::Animate => config.control.animate.is_some(),
            When::Speech => config.control.speech.is_some(),
        };
        if !is_there {
            return Vec::new();
        }
        let name = format!("{prefix}{}", self.official);
        let spec = |end: &str, shape: Vec<usize>, class| TensorSpec::new(name.clone() + end, shape).of(class);
        // The bias of a matrix is never quantised.
        let beside = match self.class {
            class if class.is_matrix() => TensorClass::Compute,
            class => class,
        };
        match self.shape {
            Shape::Linear(out, input) => {
                let (out, input) = (out.of(config), input.of(config));
                vec![spec(".weight", vec![out, input], self.class), spec(".bias", vec![out], beside)]
            }
            Shape::Patches(channels) => {
                let kernel = vec![config.dim, channels.of(config), 1, PATCH, PATCH];
                vec![spec(".weight", kernel, self.class), spec(".bias", vec![config.dim], beside)]
            }
            Shape::Kernel(channels, side) => {
                let kernel = vec![config.dim, channels.of(config), side, side];
                vec![spec(".weight", kernel, self.class), spec(".bias", vec![config.dim], beside)]
            }
            Shape::Frames(out, input) => {
                let kernel = vec![out.of(config), input.of(config), TAPS];
                vec![spec(".weight", kernel, self.class), spec(".bias", vec![out.of(config)], beside)]
            }
            Shape::Gain(width) => vec![spec(".weight", vec![width.of(config)], self.class)],
            Shape::Norm(width) => {
                [".weight", ".bias"].map(|end| spec(end, vec![width.of(config)], self.class)).to_vec()
            }
            Shape::Rows(rows, width) => {
                let rows = match rows {
                    Rows::Of(rows) => rows,
                    Rows::Positions => positions.unwrap_or(0),
                };
                vec![spec("", vec![1, rows, width.of(config)], self.class)]
            }
            Shape::Table(rows, width) => vec![spec(".weight", vec![rows, width.of(config)], self.class)],
            Shape::Pack(channels, scale) => {
                let side = PATCH * scale;
                let kernel = vec![config.dim, channels.of(config), scale, side, side];
                vec![spec(".weight", kernel, self.class), spec(".bias", vec![config.dim], beside)]
            }
            Shape::Token(width) => vec![spec("", vec![1, 1, 1, width.of(config)], self.class)],
        }
    }
}

/// The tables applied to a model.
impl DitConfig {
    /// The tensors outside the layers.
    pub fn outside_tensors(&self) -> Vec<TensorSpec> {
        let first = format!("{}.", LayerId::side(0));
        let before = BEFORE_HINTS.tensors(self, &first);
        let motion = self.control.animate.iter().flat_map(|animate| animate.motion.tensors());
        let speech = self.control.speech.iter().flat_map(|speech| speech.tensors(self.dim));
        let described = OUTSIDE.iter().flat_map(|module| module.tensors(self, ""));
        described.chain(before).chain(motion).chain(speech).collect()
    }

    /// The tensors of the audio injection in the layer `id`.
    pub fn injection_tensors(&self, id: LayerId) -> Vec<TensorSpec> {
        let prefix = format!("{id}.");
        INJECTION.iter().flat_map(|module| module.tensors(self, &prefix)).collect()
    }

    /// The tensors of the face block in the layer `id`.
    pub fn face_block_tensors(&self, id: LayerId) -> Vec<TensorSpec> {
        let prefix = format!("{id}.");
        FACE_BLOCK.iter().flat_map(|module| module.tensors(self, &prefix)).collect()
    }

    /// The tensors of the side block in the layer `id`.
    pub fn side_block_tensors(&self, id: LayerId) -> Vec<TensorSpec> {
        let own = AFTER_HINTS.tensors(self, &format!("{id}."));
        self.block_tensors(id).into_iter().chain(own).collect()
    }

    /// The tensors of the transformer block in the layer `id`.
    pub fn block_tensors(&self, id: LayerId) -> Vec<TensorSpec> {
        let prefix = format!("{id}.");
        BLOCK.iter().flat_map(|module| module.tensors(self, &prefix)).collect()
    }
}
