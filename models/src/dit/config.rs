//! The sizes of a Wan DiT, from its config file and its tensors.

use kernels::attention::Heads;
use serde::Deserialize;

use super::conditioning::{Conditioning, Raw};
use super::control::Control;
use super::role::Role;
use crate::expert::Networks;
use crate::kind::{Defaults, Facts, Kind};
use crate::{Error, Result};

pub use crate::kind::{PATCH, Pictures};

/// Everything that a DiT's code needs to know about its sizes.
///
/// The real models: spec of Wan-Video/Wan2.1 `wan/configs/wan_t2v_14B.py` and its neighbours.
#[derive(Debug, Clone, PartialEq)]
pub struct DitConfig {
    /// How it takes pictures, and which VAE's latents it works on.
    pub kind: Kind,
    /// Model width D.
    pub dim: usize,
    /// Width of the feed-forward layer F.
    pub ffn_dim: usize,
    /// Number of attention heads; the head size is dim / heads.
    pub heads: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Channels of the network input.
    pub in_channels: usize,
    /// Channels of the predicted velocity.
    pub out_channels: usize,
    /// Width of a text state.
    pub text_dim: usize,
    /// Rows of text that the blocks attend to; shorter prompts are padded with zero rows.
    pub text_len: usize,
    /// Width of the sinusoidal time embedding.
    pub freq_dim: usize,
    /// The epsilon of every norm in the blocks and the head.
    pub eps: f64,
    /// The branch that attends to a picture; only Wan 2.1's image-to-video models have one.
    pub image: Option<ImageBranch>,
    /// What a control model has besides.
    pub control: Control,
}

/// The sizes of the branch that attends to CLIP's view of a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageBranch {
    /// Width of a picture's states: CLIP's.
    pub dim: usize,
    /// Rows of learned positions, where the model sees a first and a last picture: the states of both together.
    pub positions: Option<usize>,
}

impl ImageBranch {
    /// Rows of states that the model reads: CLIP's 257 of one picture, or those of two.
    pub fn rows(&self) -> usize {
        self.positions.unwrap_or(PICTURE_ROWS)
    }
}

/// Rows of CLIP ViT-H/14 at 224 pixels: 16 x 16 patches and the class.
const PICTURE_ROWS: usize = 257;

/// Channels of the mask between the noisy latents and the picture's: one for each frame of a latent frame.
pub const MASK_CHANNELS: usize = 4;

/// `config.json` of either layout: the official names, with diffusers' as aliases. Other keys are other programs' business.
#[derive(Deserialize)]
struct ConfigFile {
    #[serde(alias = "num_attention_heads")]
    num_heads: usize,
    #[serde(default = "default_eps")]
    eps: f64,
    #[serde(default = "default_text_len")]
    text_len: usize,
    #[serde(default)]
    model_type: Option<String>,
    #[serde(default)]
    vace_layers: Option<Vec<usize>>,
    #[serde(default)]
    audio_inject_layers: Option<Vec<usize>>,
}

fn default_eps() -> f64 {
    1e-6
}

fn default_text_len() -> usize {
    512
}

impl DitConfig {
    /// The config of the weights whose shapes `shape_of` gives by official name, with what shapes do not show
    /// (heads, eps, text length) from the text of `config.json`.
    ///
    /// # Errors
    /// If the config cannot be read, or names a kind of model that is not supported.
    pub fn from_parts(config_json: &str, shape_of: impl Fn(&str) -> Option<Vec<usize>>) -> Result<Self> {
        let file: ConfigFile = serde_json::from_str(config_json).map_err(|e| {
            Error::Mismatch(format!(
                "its config.json cannot be read ({e}); replace it with the one that was published with the model"
            ))
        })?;
        let shape = |name: &str, rank: usize| match shape_of(name) {
            Some(shape) if shape.len() == rank => Ok(shape),
            Some(shape) => {
                Err(Error::Mismatch(format!("{name} has shape {shape:?}: {rank} axes are expected")))
            }
            None => Err(Error::Mismatch(format!(
                "it holds no {name}, so it is not a whole Wan DiT; fetch it again"
            ))),
        };
        let image = shape_of("img_emb.proj.0.weight").map(|norm| ImageBranch {
            dim: norm[0],
            positions: shape_of("img_emb.emb_pos").and_then(|shape| shape.get(1).copied()),
        });
        let patch = shape("patch_embedding.weight", 5)?;
        let out_channels = shape("head.head.weight", 2)?[0] / PATCH.pow(2);
        let facts = Facts::read(&shape_of);
        let layers = (0..).take_while(|n| shape_of(&format!("blocks.{n}.modulation")).is_some()).count();
        let config = Self {
            kind: Kind::of(facts).ok_or_else(|| unknown(facts, file.model_type.as_deref()))?,
            dim: patch[0],
            in_channels: patch[1],
            ffn_dim: shape("blocks.0.ffn.0.weight", 2)?[0],
            heads: file.num_heads,
            layers,
            out_channels,
            text_dim: shape("text_embedding.0.weight", 2)?[1],
            text_len: file.text_len,
            freq_dim: shape("time_embedding.0.weight", 2)?[1],
            eps: file.eps,
            image,
            control: Control::read(&shape_of, layers, (file.vace_layers, file.audio_inject_layers))?,
        };
        config.check_heads()?;
        Ok(config)
    }

    /// Size of one head.
    pub fn head_size(&self) -> usize {
        self.dim / self.heads
    }

    /// Tokens of a latent clip of `frames` x `height` x `width`, with those in front and behind; of the frames before a clip there are
    /// none.
    pub fn tokens(&self, frames: usize, height: usize, width: usize) -> usize {
        let besides = self.control.tokens_in_front(height, width);
        frames * (height / PATCH) * (width / PATCH)
            + besides
            + self.control.tokens_behind(height, width, false)
    }

    /// Tokens besides of a clip that continues another, of a model that takes the frames before as tokens (S2V).
    pub fn tokens_of_past(&self, height: usize, width: usize) -> usize {
        self.control.tokens_behind(height, width, true) - self.control.tokens_behind(height, width, false)
    }

    /// The attentions of a block over `batch` samples of `tokens` tokens: over themselves, over the text, and over a picture.
    pub fn attentions(&self, batch: usize, tokens: usize) -> Vec<Heads> {
        let pictures = self.image.map(|image| image.rows());
        let keys = [Some(tokens), Some(self.text_len), pictures];
        let (heads, size) = (self.heads, self.head_size());
        keys.into_iter().flatten().map(|keys| Heads { batch, heads, size, queries: tokens, keys }).collect()
    }

    fn check_heads(&self) -> Result<()> {
        if self.heads == 0
            || !self.dim.is_multiple_of(self.heads)
            || !self.head_size().is_multiple_of(2)
            || self.head_size() < 6
        {
            return Err(Error::Mismatch(format!(
                "config.json asks for {} heads, which do not divide the model width {} into even heads",
                self.heads, self.dim
            )));
        }
        Ok(())
    }

    /// The largest shape of the raw conditioning of one sample, [rows, width] by role, without its timestep.
    pub fn conditioning_shapes(&self) -> Conditioning<Raw, [usize; 2]> {
        Conditioning::new()
            .with(Role::TEXT, [self.text_len, self.text_dim])
            .with_optional(Role::PICTURE, self.image.map(|image| [image.rows(), image.dim]))
    }

    /// How the model takes a picture.
    pub fn pictures(&self) -> Pictures {
        self.kind.facts().pictures
    }

    /// The settings that models of its kind were published with.
    pub fn defaults(&self, networks: Networks) -> &'static Defaults {
        self.kind.defaults(networks)
    }
}

/// Why a DiT of no known kind cannot be used.
fn unknown(facts: Facts, model_type: Option<&str>) -> Error {
    let Facts { channels_in, channels_out, .. } = facts;
    Error::Mismatch(format!(
        "this DiT ({}) takes {channels_in} channels and predicts {channels_out}: text-to-video models take as many as they \
         predict, image-to-video models {MASK_CHANNELS} and the picture's besides, Fun's control models 48 or 52; others \
         are not supported",
        model_type.unwrap_or("no model_type"),
    ))
}
