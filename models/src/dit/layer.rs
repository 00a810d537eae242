//! A layer of a model: reads and writes the streams, forward and backward.

use std::fmt;

use kernels::Tensor;

use super::block::{self, Block};
use super::input::Context;
use super::layer_id::LayerId;
use super::linear::Linear;
use super::pass::{Gradients, Pass};
use super::plan::Keep;
use super::streams::Streams;
use crate::weights::{Frozen, Weights};
use crate::{Error, Result};

/// A frozen layer: a main block, a block of a side chain with its contribution to the main stream, or an injection into the
/// main stream between two blocks.
pub trait Layer: fmt::Debug + Send + Sync {
    /// Which layer it is.
    fn id(&self) -> LayerId;

    /// The streams after the layer, and what is kept for [`Layer::backward`]: the layer's input, and the activations that `keep`
    /// selects.
    ///
    /// # Errors
    /// If a stream or a role that it reads is missing, or a kernel fails.
    fn forward(
        &self,
        streams: Streams,
        context: &Context,
        pass: &Pass,
        keep: Keep,
    ) -> Result<(Streams, Saved)>;

    /// The gradients of the streams before the layer, from those after it. A side stream that no later layer read has no
    /// gradient. The main stream's gradient may be overwritten: it must not be shared.
    ///
    /// # Errors
    /// As [`Layer::forward`].
    fn backward(
        &self,
        saved: Saved,
        d_streams: Streams,
        context: &Context,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<Streams>;

    /// Its linear layers, in the order of the forward; adapters attach to them by name.
    fn linears(&self) -> Vec<&Linear>;

    /// The matrices of [`Self::linears`]: nearly all of its bytes.
    fn matrices_mut(&mut self) -> Vec<&mut Tensor>;

    /// Every tensor of it.
    fn tensors_mut(&mut self) -> Vec<&mut Tensor>;

    /// The same layer, on the same memory.
    fn share(&self) -> Box<dyn Layer>;

    /// Reloads from `weights` every tensor that `changed` has patches for.
    ///
    /// # Errors
    /// Weights that cannot be read.
    fn reload(&mut self, weights: &Weights, changed: &Weights, frozen: Frozen) -> Result<()>;
}

/// The activations that are kept of a layer's forward.
#[derive(Debug, Clone)]
pub struct Saved<T = Tensor> {
    /// Of a transformer block in it.
    pub block: Option<block::Saved<T>>,
    /// Other tensors, in an order defined by the layer.
    pub tensors: Vec<T>,
}

impl<T> Saved<T> {
    /// The kept activations of its block.
    ///
    /// # Errors
    /// If the layer kept nothing of a block.
    pub fn into_block(self) -> Result<block::Saved<T>> {
        self.block
            .ok_or_else(|| Error::Mismatch("a block's backward got no activations of its forward".into()))
    }

    /// Every tensor through `f`.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn map<U>(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<Saved<U>> {
        let block = self.block.map(|block| block.map(f)).transpose()?;
        Ok(Saved { block, tensors: self.tensors.into_iter().map(f).collect::<Result<_>>()? })
    }
}

/// A block of the main chain: it changes the main stream and leaves side streams alone.
impl Layer for Block {
    fn id(&self) -> LayerId {
        Block::id(self)
    }

    fn forward(
        &self,
        mut streams: Streams,
        context: &Context,
        pass: &Pass,
        keep: Keep,
    ) -> Result<(Streams, Saved)> {
        let (y, saved) = Block::forward(self, streams.main, context, pass, keep)?;
        streams.main = y;
        Ok((streams, Saved { block: Some(saved), tensors: Vec::new() }))
    }

    fn backward(
        &self,
        saved: Saved,
        mut d_streams: Streams,
        context: &Context,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<Streams> {
        d_streams.main =
            Block::backward(self, saved.into_block()?, d_streams.main, context, pass, gradients)?;
        Ok(d_streams)
    }

    fn linears(&self) -> Vec<&Linear> {
        Block::linears(self).collect()
    }

    fn matrices_mut(&mut self) -> Vec<&mut Tensor> {
        Block::matrices_mut(self).collect()
    }

    fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        Block::tensors_mut(self)
    }

    fn share(&self) -> Box<dyn Layer> {
        Box::new(self.clone())
    }

    fn reload(&mut self, weights: &Weights, changed: &Weights, frozen: Frozen) -> Result<()> {
        Block::reload(self, weights, changed, frozen)
    }
}
