//! VACE's side chain: transformer blocks over a control clip, each of whose outputs is added to the main stream.
//!
//! Source: Wan-Video/Wan2.1 wan/modules/vace_model.py `VaceWanAttentionBlock`, `BaseWanAttentionBlock`. There all side blocks
//! run before the main ones; here each runs after the main block that it adds to, which gives the same numbers, since the
//! side stream does not read the main one.

use kernels::{DType, Device, Tensor};

use super::base::Base;
use super::block::Block;
use super::config::DitConfig;
use super::control::{HINT_SCALE, SideChain};
use super::input::Context;
use super::layer::{Layer, Saved};
use super::layer_id::LayerId;
use super::linear::Linear;
use super::pass::{Gradients, Pass};
use super::plan::Keep;
use super::streams::Streams;
use crate::weights::{Frozen, Weights};
use crate::{Error, Result};

/// The name of the side stream.
pub(super) const STREAM: &str = LayerId::SIDE_BLOCKS;

/// C = Block(C); X += scale * after(C), with a factor of the model and one of each sample.
#[derive(Debug, Clone)]
pub(super) struct SideBlock {
    block: Block,
    after: Linear,
    scale: f64,
    /// The last one's stream is not read again.
    is_last: bool,
}

impl SideBlock {
    pub fn load(
        weights: &Weights,
        (config, chain): (&DitConfig, &SideChain),
        id: LayerId,
        base: Base,
        device: &Device,
    ) -> Result<Self> {
        Ok(Self {
            block: Block::load(weights, config, id, base.frozen, device)?,
            after: Linear::load(weights, format!("{id}.after_proj"), base.frozen, device)?,
            scale: chain.scale,
            is_last: id.index() + 1 == chain.after.len(),
        })
    }

    /// A hint, or its gradient, by the model's factor and by each sample's own, where it has one.
    fn scaled(&self, x: Tensor, context: &Context) -> Result<Tensor> {
        let x = if self.scale == 1.0 { x } else { (x * self.scale)? };
        match context.cond.get(HINT_SCALE) {
            Some(own) => Ok(x.broadcast_mul(&own.to_dtype(x.dtype())?)?),
            None => Ok(x),
        }
    }
}

impl Layer for SideBlock {
    fn id(&self) -> LayerId {
        self.block.id()
    }

    fn forward(
        &self,
        mut streams: Streams,
        context: &Context,
        pass: &Pass,
        keep: Keep,
    ) -> Result<(Streams, Saved)> {
        let side = streams.take(STREAM).ok_or_else(|| missing(self.id()))?;
        let (side, saved) = self.block.forward(side, context, pass, keep)?;
        let hint = self.after.forward(&side, pass)?.to_dtype(streams.main.dtype())?;
        streams.main = (&streams.main + self.scaled(hint, context)?)?;
        if !self.is_last {
            streams.put(STREAM, side.clone());
        }
        Ok((streams, Saved { block: Some(saved), tensors: vec![side] }))
    }

    fn backward(
        &self,
        mut saved: Saved,
        mut d_streams: Streams,
        context: &Context,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<Streams> {
        let side = saved.tensors.pop().ok_or_else(|| missing(self.id()))?;
        let d_hint = self.scaled(d_streams.main.to_dtype(self.after.weight().dtype())?, context)?;
        let d_side = self.after.backward(&side, &d_hint, pass, gradients)?;
        drop((side, d_hint));
        let d_side = match (d_streams.take(STREAM), d_side.to_dtype(DType::F32)?) {
            (Some(behind), own) => (behind + own)?,
            (None, own) => own,
        };
        let d_side = self.block.backward(saved.into_block()?, d_side, context, pass, gradients)?;
        d_streams.put(STREAM, d_side);
        Ok(d_streams)
    }

    fn linears(&self) -> Vec<&Linear> {
        self.block.linears().chain([&self.after]).collect()
    }

    fn matrices_mut(&mut self) -> Vec<&mut Tensor> {
        let after = self.after.weight_mut().stored_mut();
        self.block.matrices_mut().chain([after]).collect()
    }

    fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        self.block.tensors_mut().into_iter().chain(self.after.tensors_mut()).collect()
    }

    fn share(&self) -> Box<dyn Layer> {
        Box::new(self.clone())
    }

    fn reload(&mut self, weights: &Weights, changed: &Weights, frozen: Frozen) -> Result<()> {
        self.block.reload(weights, changed, frozen)?;
        self.after.reload(weights, changed, frozen)
    }
}

fn missing(id: LayerId) -> Error {
    Error::Mismatch(format!("the layer {id} has no side stream to read"))
}
