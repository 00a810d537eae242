//! The network's input, and what crosses the boundary between two stages.

use std::sync::Arc;

use kernels::{Device, Tensor};

use super::conditioning::{Conditioning, Embedded, Raw};
use super::role::Role;
use super::sequence::Exchange;
use super::streams::Streams;
use crate::Result;

/// One call of the network: noisy latents and what they are conditioned on.
#[derive(Debug, Clone)]
pub struct NetworkInput {
    /// Noisy latents [b, c, t, h, w], followed by the channels of a picture in models that take it so.
    pub x_bcthw: Tensor,
    /// Timestep, text, and other roles that the model reads.
    pub cond: Conditioning<Raw>,
}

/// What crosses the boundary between two stages: the streams before the next layer, and the conditioning. Tables that a stage
/// computes faster than it could receive them are not part of it.
#[derive(Debug, Clone)]
pub struct Boundary<T = Tensor> {
    /// The streams before the next layer.
    pub streams: Streams<T>,
    /// The conditioning that the layers read.
    pub cond: Conditioning<Embedded, T>,
}

/// The positions of the main stream's tokens.
#[derive(Debug, Clone)]
pub struct Positions {
    /// (frames, height, width) of the latents.
    pub grid: (usize, usize, usize),
    /// Extra tokens in front of the latents'; the head drops them.
    pub in_front: usize,
    /// Cosines of the rotary angles of all tokens, [l, h/2] f32.
    pub cos_lp: Tensor,
    /// Sines of the rotary angles of all tokens, [l, h/2] f32.
    pub sin_lp: Tensor,
}

/// What the layers and the head of one stage read besides the streams, the same for every layer.
#[derive(Debug, Clone)]
pub struct Context {
    /// Time, text, and other roles that the model reads, embedded.
    pub cond: Conditioning<Embedded>,
    /// The positions of the tokens.
    pub positions: Positions,
    /// Where the tokens are a part of the call's, the exchange with the devices that have the others.
    pub exchange: Option<Arc<dyn Exchange>>,
}

impl NetworkInput {
    /// Latents [b, c, t, h, w] at `timestep` (1000 * sigma, `[b]` or `[b, tokens]`, on the host), with states
    /// [b, s, text_dim] of the text.
    pub fn new(x_bcthw: Tensor, timestep: Tensor, text_bsd: Tensor) -> Self {
        let cond = Conditioning::new().with(Role::TIMESTEP, timestep).with(Role::TEXT, text_bsd);
        Self { x_bcthw, cond }
    }

    /// The same, also conditioned on `tensor` as `role`.
    pub fn with(self, role: Role, tensor: Tensor) -> Self {
        Self { cond: self.cond.with(role, tensor), ..self }
    }

    /// (frames, height, width) of the latents.
    pub fn grid(&self) -> Result<(usize, usize, usize)> {
        let (_, _, frames, height, width) = self.x_bcthw.dims5()?;
        Ok((frames, height, width))
    }

    /// The same on `device`; see [`Conditioning::to_device`].
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self { x_bcthw: self.x_bcthw.to_device(device)?, cond: self.cond.to_device(device)? })
    }
}

impl<T> Boundary<T> {
    /// Every tensor through `f`.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn try_map<U, E>(self, mut f: impl FnMut(T) -> Result<U, E>) -> Result<Boundary<U>, E> {
        Ok(Boundary {
            streams: self.streams.try_map(&mut f)?,
            cond: self.cond.try_map(|_, tensor| f(tensor))?,
        })
    }
}
