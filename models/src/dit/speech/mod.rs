//! The parts of Wan 2.2 S2V besides the text-to-video network: tokens of a pose clip, of a reference picture and of the frames
//! before, an encoder of audio, and injections of it behind some main blocks.
//!
//! Source: Wan-Video/Wan2.2 wan/modules/s2v/ (`model_s2v.py`, `motioner.py`, `audio_utils.py`, `auxi_blocks.py`).

mod audio_encoder;
mod embedding;
mod injector;
mod positions;

pub(super) use embedding::SpeechEmbedding;
pub(super) use injector::Injector;
pub(super) use positions::table;

use super::config::PATCH;
use super::layer_id::LayerId;
use super::role::Role;
use crate::weights::{TensorClass, TensorSpec};
use crate::{Error, Result};

/// Raw: states of the speech encoder [b, states, width, 4 t], a column for each frame of the clip. Embedded: tokens [b, t, 5, d].
pub const AUDIO: Role = Role::new("audio", "the speech encoder's states (audio_embeds)");
/// Embedded: shift and scale of each injection's norm in each latent frame, [b, injections, t, 2 d] f32.
pub(super) const INJECTED: Role = Role::new("injected", "the modulation of audio injections");
/// Latents of the frames before the clip, [b, c, 19, h, w]; a clip that begins has none.
pub const PAST: Role = Role::new("past", "the latents of the frames before (motion_latents)");

/// Latent frames of [`PAST`].
pub const PAST_FRAMES: usize = 19;
/// Columns of audio for each latent frame.
pub const COLUMNS_PER_LATENT: usize = 4;
/// Columns before the clip's own, copies of the first: those of the pixels of [`PAST`].
const COLUMNS_BEFORE: usize = 4 * (PAST_FRAMES - 1) + 1;
/// Sides of latents are multiples of this, the side of the coarsest patch of [`PAST`].
pub const SIDE: usize = 8;
/// Rows of the learned vectors of kinds of tokens: of the clip, of the reference, of the past.
pub(super) const KINDS: usize = 3;

/// The patches that the past is cut into, the newest frames finest: (first frame, frames, patch in time; its side is twice that).
pub(super) const PACKS: [(usize, usize, usize); 3] = [(18, 1, 1), (16, 2, 2), (0, 16, 4)];

/// Where injections follow in the published model.
const PUBLISHED: [usize; 12] = [0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39];

/// The sizes of S2V's parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Speech {
    /// Width of the speech encoder's states.
    pub audio_width: usize,
    /// States of it: before its first layer and behind each.
    pub states: usize,
    /// The main blocks that injections follow, ascending.
    pub after: Vec<usize>,
}

impl Speech {
    /// The parts of the weights whose shapes `shape_of` gives by official name, of a model of `layers` main blocks; `after` is where
    /// its config says that injections follow. `None` for other models.
    ///
    /// # Errors
    /// Injections that nothing places, and places that do not fit them.
    pub fn read(
        shape_of: impl Fn(&str) -> Option<Vec<usize>>,
        layers: usize,
        after: Option<Vec<usize>>,
    ) -> Result<Option<Self>> {
        let axis = |name: &str, axis: usize| shape_of(name).and_then(|shape| shape.get(axis).copied());
        let Some(audio_width) = axis("casual_audio_encoder.encoder.conv1_local.conv.weight", 1) else {
            return Ok(None);
        };
        let is_there = |n: usize| shape_of(&format!("{}.q.weight", LayerId::injection(n))).is_some();
        let count = (0..).take_while(|n| is_there(*n)).count();
        let is_published = (count, layers) == (PUBLISHED.len(), PUBLISHED[PUBLISHED.len() - 1] + 1);
        let Some(after) = after.or_else(|| is_published.then(|| PUBLISHED.to_vec())) else {
            return Err(Error::Mismatch(format!(
                "only its config.json says which of {layers} blocks its {count} audio injectors follow; put it beside the \
                 weights, or name it with model.dit_config"
            )));
        };
        let is_ascending = after.windows(2).all(|pair| pair[0] < pair[1]);
        if after.len() != count || !is_ascending || after.last().is_none_or(|last| *last >= layers) {
            return Err(Error::Mismatch(format!(
                "its {count} audio injectors do not fit audio_inject_layers {after:?} of {layers} blocks"
            )));
        }
        let states = axis("casual_audio_encoder.weights", 1).unwrap_or(0);
        Ok(Some(Self { audio_width, states, after }))
    }

    /// The sizes of the published model.
    pub fn published() -> Self {
        Self { audio_width: 1024, states: 25, after: PUBLISHED.to_vec() }
    }

    /// The injection that follows the main block `n`, if any.
    pub fn following(&self, n: usize) -> Option<LayerId> {
        self.after.iter().position(|&block| block == n).map(LayerId::injection)
    }

    /// Tensors whose number depends on the sizes, of a model of width `dim`, by official name.
    pub(super) fn tensors(&self, dim: usize) -> Vec<TensorSpec> {
        let compute = |name: String, shape: Vec<usize>| TensorSpec::new(name, shape);
        let adain = |n: usize| {
            let name = adain(n);
            [
                compute(format!("{name}.weight"), vec![2 * dim, dim]),
                compute(format!("{name}.bias"), vec![2 * dim]),
            ]
        };
        let weights = TensorSpec::new(STATE_WEIGHTS, vec![1, self.states, 1, 1]).of(TensorClass::Full);
        (0..self.after.len()).flat_map(adain).chain([weights]).collect()
    }
}

/// The weights of the speech encoder's states.
pub(super) const STATE_WEIGHTS: &str = "casual_audio_encoder.weights";

/// The linear layer of an injection's norm.
pub(super) fn adain(injection: usize) -> String {
    format!("audio_injector.injector_adain_layers.{injection}.linear")
}

/// Tokens of a reference picture at this size of latents.
fn of_reference(height: usize, width: usize) -> usize {
    (height / PATCH) * (width / PATCH)
}

/// Tokens of each pack of the past.
fn of_pack((_, frames, patch): (usize, usize, usize), height: usize, width: usize) -> usize {
    (frames / patch) * (height / (2 * patch)) * (width / (2 * patch))
}

/// Tokens behind those of the clip at this size of latents: the reference's, and the past's where there is one.
pub(super) fn tokens_behind(height: usize, width: usize, has_past: bool) -> usize {
    let past: usize = PACKS.into_iter().map(|pack| of_pack(pack, height, width)).sum();
    of_reference(height, width) + if has_past { past } else { 0 }
}
