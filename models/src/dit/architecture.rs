//! The structure of a model: its layers in the order in which they run, its embeddings, and the positions of its tokens.

use std::fmt;
use std::sync::Arc;

use kernels::Device;

use super::animate::{FACES, FaceBlock, POSE, face_frames};
use super::base::Base;
use super::block::Block;
use super::conditioning::{Conditioning, Raw};
use super::config::{DitConfig, PATCH};
use super::control::{CAMERA, CAMERA_CHANNELS, CONTEXT, CameraSizes, Control, REFERENCE};
use super::embed::{Embed, Embedder};
use super::input::{NetworkInput, Positions};
use super::layer::Layer;
use super::layer_id::LayerId;
use super::rope;
use super::side_chain::SideBlock;
use super::speech::{self, AUDIO, COLUMNS_PER_LATENT, Injector, PAST, PAST_FRAMES, Speech};
use crate::weights::{TensorSpec, Weights};
use crate::{Error, Result};

/// A kind of model: the main blocks of a Wan DiT, possibly with side chains, injections between blocks, or extra tokens in
/// front of the latents'.
///
/// A model is split between main blocks. Every other layer follows one of them: it runs after it and before the next, and is
/// on the same stage. A side chain's block follows the main block that its output is added to.
pub trait Architecture: fmt::Debug + Send + Sync {
    /// Sizes of the main blocks, the embeddings and the head.
    fn config(&self) -> &DitConfig;

    /// The layers from main block `n` to the next, in the order in which they run; block `n` is the first.
    fn layers(&self, n: usize) -> Vec<LayerId>;

    /// The tensors outside the layers, by official name. The names of the head's begin with `head.`.
    fn outside_tensors(&self) -> Vec<TensorSpec>;

    /// The tensors of the layer `id`, by official name: `id`, a dot, and their names in the layer.
    fn layer_tensors(&self, id: LayerId) -> Vec<TensorSpec>;

    /// Loads the layer `id` onto `device`, in the dtypes of `base`.
    ///
    /// # Errors
    /// A layer that the model does not have, and weights that cannot be read.
    fn load_layer(
        &self,
        id: LayerId,
        weights: &Weights,
        base: Base,
        device: &Device,
    ) -> Result<Box<dyn Layer>>;

    /// Loads the embeddings onto `device`, in the dtypes of `base`.
    ///
    /// # Errors
    /// Weights that cannot be read.
    fn load_embedding(&self, weights: &Weights, base: Base, device: &Device) -> Result<Box<dyn Embed>>;

    /// The positions of the main stream's tokens for `input`, on `device`. Every stage computes them itself, so they may depend
    /// only on the shapes of `input`, which may be on the host.
    ///
    /// # Errors
    /// If the shapes of the input do not fit the model.
    fn positions(&self, input: &NetworkInput, device: &Device) -> Result<Positions>;

    /// What the embeddings read of one sample besides its latents and its timestep: the largest shape of each role, without the
    /// batch's axis, where the latents are (frames, height, width).
    fn conditioning(&self, latents: (usize, usize, usize)) -> Conditioning<Raw, Vec<usize>> {
        let _ = latents;
        self.config().conditioning_shapes().map(|shape| shape.to_vec())
    }

    /// What the embeddings read besides [`Self::conditioning`] of a clip that continues another.
    fn continuing(&self, latents: (usize, usize, usize)) -> Conditioning<Raw, Vec<usize>> {
        let _ = latents;
        Conditioning::new()
    }

    /// All layers, in the order in which they run.
    fn all_layers(&self) -> Vec<LayerId> {
        (0..self.config().layers).flat_map(|n| self.layers(n)).collect()
    }

    /// Every tensor of the model, by official name.
    fn tensors(&self) -> Vec<TensorSpec> {
        let layers = self.all_layers().into_iter().flat_map(|id| self.layer_tensors(id));
        self.outside_tensors().into_iter().chain(layers).collect()
    }

    /// The linear layers that adapters may attach to: (official module name, out, in).
    fn adaptable_modules(&self) -> Vec<(String, usize, usize)> {
        let tensors = self.all_layers().into_iter().flat_map(|id| self.layer_tensors(id));
        tensors.filter_map(|spec| spec.adaptable()).collect()
    }
}

/// The Wan DiT: main blocks, and what a published control model has besides.
impl Architecture for DitConfig {
    fn config(&self) -> &DitConfig {
        self
    }

    fn layers(&self, n: usize) -> Vec<LayerId> {
        let side = self.control.side_chain.as_ref().and_then(|chain| chain.following(n));
        let face = self.control.animate.as_ref().and_then(|animate| animate.following(n));
        let injection = self.control.speech.as_ref().and_then(|speech| speech.following(n));
        [LayerId::block(n)].into_iter().chain(side).chain(face).chain(injection).collect()
    }

    fn outside_tensors(&self) -> Vec<TensorSpec> {
        DitConfig::outside_tensors(self)
    }

    fn layer_tensors(&self, id: LayerId) -> Vec<TensorSpec> {
        match id.chain() {
            LayerId::SIDE_BLOCKS => self.side_block_tensors(id),
            LayerId::FACE_BLOCKS => self.face_block_tensors(id),
            LayerId::INJECTIONS => self.injection_tensors(id),
            _ => self.block_tensors(id),
        }
    }

    fn load_layer(
        &self,
        id: LayerId,
        weights: &Weights,
        base: Base,
        device: &Device,
    ) -> Result<Box<dyn Layer>> {
        match (id.chain(), &self.control.side_chain) {
            (LayerId::BLOCKS, _) => Ok(Box::new(Block::load(weights, self, id, base.frozen, device)?)),
            (LayerId::SIDE_BLOCKS, Some(chain)) => {
                Ok(Box::new(SideBlock::load(weights, (self, chain), id, base, device)?))
            }
            (LayerId::FACE_BLOCKS, _) => Ok(Box::new(FaceBlock::load(weights, self, id, base, device)?)),
            (LayerId::INJECTIONS, _) => Ok(Box::new(Injector::load(weights, self, id, base, device)?)),
            _ => Err(Error::Mismatch(format!("the model has no layer {id}"))),
        }
    }

    fn load_embedding(&self, weights: &Weights, base: Base, device: &Device) -> Result<Box<dyn Embed>> {
        Ok(Box::new(Embedder::load(weights, self, base, device)?))
    }

    fn positions(&self, input: &NetworkInput, device: &Device) -> Result<Positions> {
        let grid = input.grid()?;
        if self.control.speech.is_some() {
            let has_past = input.cond.get(PAST).is_some();
            let (cos_lp, sin_lp) = speech::table(self.head_size(), grid, has_past, device)?;
            return Ok(Positions { grid, in_front: 0, cos_lp, sin_lp });
        }
        // The tokens of a reference picture are those of a frame before the first.
        let in_front = self.control.tokens_in_front(grid.1, grid.2);
        let frames = grid.0 + usize::from(in_front > 0);
        let tokens = (frames, grid.1 / PATCH, grid.2 / PATCH);
        let (cos_lp, sin_lp) = rope::table(self.head_size(), tokens, device)?;
        Ok(Positions { grid, in_front, cos_lp, sin_lp })
    }

    fn conditioning(&self, latents: (usize, usize, usize)) -> Conditioning<Raw, Vec<usize>> {
        let (frames, height, width) = latents;
        let Control { reference, camera, side_chain, animate, speech } = &self.control;
        let poses = |frames: usize| vec![self.out_channels, frames, height, width];
        let audio = |own: &Speech| vec![own.states, own.audio_width, COLUMNS_PER_LATENT * frames];
        let reference = reference.or(speech.as_ref().map(|_| self.out_channels));
        let rays =
            |sizes: &CameraSizes| vec![CAMERA_CHANNELS, frames, height * sizes.stride, width * sizes.stride];
        self.conditioning_shapes()
            .map(|shape| shape.to_vec())
            .with_optional(REFERENCE, reference.map(|channels| vec![channels, height, width]))
            .with_optional(CAMERA, camera.as_ref().map(rays))
            .with_optional(POSE, animate.as_ref().map(|_| poses(frames.saturating_sub(1))))
            .with_optional(POSE, speech.as_ref().map(|_| poses(frames)))
            .with_optional(AUDIO, speech.as_ref().map(audio))
            .with_optional(FACES, animate.as_ref().map(|own| vec![face_frames(frames), own.motion.width]))
            .with_optional(
                CONTEXT,
                side_chain.as_ref().map(|chain| vec![chain.channels, frames, height, width]),
            )
    }

    fn continuing(&self, (_, height, width): (usize, usize, usize)) -> Conditioning<Raw, Vec<usize>> {
        let past = |_: &Speech| vec![self.out_channels, PAST_FRAMES, height, width];
        Conditioning::new().with_optional(PAST, self.control.speech.as_ref().map(past))
    }
}

/// Methods that every model has, so that callers with a plain DiT need not import the trait.
impl DitConfig {
    /// [`Architecture::tensors`].
    pub fn tensors(&self) -> Vec<TensorSpec> {
        Architecture::tensors(self)
    }

    /// [`Architecture::adaptable_modules`].
    pub fn adaptable_modules(&self) -> Vec<(String, usize, usize)> {
        Architecture::adaptable_modules(self)
    }
}

impl From<&DitConfig> for Arc<dyn Architecture> {
    fn from(config: &DitConfig) -> Self {
        Arc::new(config.clone())
    }
}
