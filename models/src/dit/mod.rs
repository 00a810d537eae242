//! The Wan diffusion transformer: embeddings, layers over streams, head. The same forward trains and samples.
//!
//! A [`Dit`] is the whole model or the part of it on one device. There is no autograd: the backward goes through the layers
//! in reverse and recomputes what was not kept. An [`Architecture`] defines the layers.

pub mod animate;
pub mod architecture;
pub mod attention;
pub mod base;
pub mod block;
mod bytes;
mod camera;
mod causal;
pub mod conditioning;
pub mod config;
pub mod control;
pub mod cross;
pub mod embed;
pub mod ffn;
mod frame_attention;
pub mod head;
pub mod input;
pub mod keep;
pub mod layer;
pub mod layer_id;
pub mod linear;
pub mod modules;
pub mod pass;
mod patches;
pub mod plan;
pub mod reader;
pub mod role;
pub mod rope;
pub mod sequence;
mod side_chain;
pub mod speech;
mod streaming;
pub mod streams;

use std::ops::Range;
use std::sync::Arc;

use kernels::{Device, Tensor};

pub use animate::Animate;
pub use architecture::Architecture;
pub use base::Base;
pub use block::Block;
pub use conditioning::{Conditioning, Embedded, Raw};
pub use config::{DitConfig, ImageBranch, Pictures};
pub use control::{CameraSizes, Control, SideChain};
pub use embed::{Embed, Embedder};
pub use head::Head;
pub use input::{Boundary, Context, NetworkInput, Positions};
pub use keep::{Keeping, Kept};
pub use layer::{Layer, Saved};
pub use layer_id::LayerId;
pub use linear::Linear;
pub use pass::{Dropout, Gradients, LayerWatch, Pass};
pub use plan::{BlockPlan, Keep, KeepPlace, Plans};
pub use role::Role;
pub use speech::Speech;
pub use streaming::Streamed;
pub use streams::Streams;

use crate::weights::Weights;
use crate::{Error, Result};
use streaming::{Streaming, There, Toward, load_layers};

/// A DiT, or the consecutive part of one that a stage holds: the first part embeds, the last has the head.
#[derive(Debug)]
pub struct Dit {
    /// Sizes of the whole model.
    pub config: DitConfig,
    /// Which main blocks are here.
    pub range: Range<usize>,
    /// Embeddings; the first part only.
    pub embedder: Option<Box<dyn Embed>>,
    /// The blocks of `range`, each with the layers that follow it, in the order in which they run.
    pub layers: Vec<Box<dyn Layer>>,
    /// Head; the last part only.
    pub head: Option<Head>,
    architecture: Arc<dyn Architecture>,
    /// Where matrices of layers stay in host memory.
    streaming: Option<Streaming>,
}

impl Dit {
    /// Loads the blocks of `range` and the layers that follow them, the embeddings if it starts at the first block, the
    /// head if it ends at the last.
    ///
    /// The dtypes and the storage of weights are those of `base`.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn load(
        weights: &Weights,
        architecture: impl Into<Arc<dyn Architecture>>,
        range: Range<usize>,
        base: Base,
        device: &Device,
    ) -> Result<Self> {
        let architecture = architecture.into();
        let config = architecture.config().clone();
        let ids: Vec<LayerId> = range.clone().flat_map(|n| architecture.layers(n)).collect();
        let (layers, streaming) = load_layers(architecture.as_ref(), &ids, weights, base, device)?;
        let embedder = match range.start {
            0 => Some(architecture.load_embedding(weights, base, device)?),
            _ => None,
        };
        let head = match range.end == config.layers {
            true => Some(Head::load(weights, &config, device)?),
            false => None,
        };
        Ok(Self { config, range, embedder, layers, head, architecture, streaming })
    }

    /// Consecutive parts of a model as one part on `device`. Every tensor goes through `place`, which may copy it to another device and
    /// otherwise gives the same one back: then both are on the same memory.
    ///
    /// # Errors
    /// Those of `place`, and parts that do not follow each other.
    pub fn joined(
        parts: &[&Self],
        device: &Device,
        place: &mut dyn FnMut(usize, &Tensor) -> kernels::Result<Tensor>,
    ) -> Result<Self> {
        let follows = |pair: &[&Self]| pair[0].range.end == pair[1].range.start;
        let ([first, ..], [.., last], true) = (parts, parts, parts.windows(2).all(follows)) else {
            return Err(Error::Mismatch("the parts of a network do not follow each other".into()));
        };
        let mut place_all = |part: usize, tensors: Vec<&mut Tensor>| -> Result<()> {
            for tensor in tensors {
                *tensor = place(part, tensor)?;
            }
            Ok(())
        };
        let mut embedder = first.embedder.as_ref().map(|embedder| embedder.share());
        if let Some(embedder) = &mut embedder {
            place_all(0, embedder.tensors_mut())?;
        }
        let mut layers = Vec::new();
        for (index, part) in parts.iter().enumerate() {
            for layer in &part.layers {
                let mut layer = layer.share();
                place_all(index, layer.tensors_mut())?;
                layers.push(layer);
            }
        }
        let mut head = last.head.clone();
        if let Some(head) = &mut head {
            place_all(parts.len() - 1, head.tensors_mut())?;
        }
        let streamed: Vec<_> =
            parts.iter().map(|part| (part.streaming.as_ref(), part.layers.len())).collect();
        let streaming = Streaming::joined(&streamed, device)?;
        let (config, architecture) = (first.config.clone(), first.architecture.clone());
        let range = first.range.start..last.range.end;
        Ok(Self { config, range, embedder, layers, head, architecture, streaming })
    }

    /// The structure of the model.
    pub fn architecture(&self) -> &dyn Architecture {
        self.architecture.as_ref()
    }

    /// The layer `index` with its matrices, which may be in host memory otherwise.
    ///
    /// # Errors
    /// When the device has too little memory.
    pub fn with_layer<T>(&self, index: usize, work: impl FnOnce(&dyn Layer) -> Result<T>) -> Result<T> {
        let done = work(&*self.there(index, Toward::Calls)?);
        self.release();
        done
    }

    /// Gives up copies of weights that are on their way from host memory, at the end of a step or of calls.
    pub fn release(&self) {
        if let Some(streaming) = &self.streaming {
            streaming.release();
        }
    }

    /// The linear layer of the official name `module` with its matrix; none where it is on another device.
    ///
    /// # Errors
    /// Those of `work`, and a device with too little memory.
    pub fn with_linear<T>(&self, module: &str, work: impl FnOnce(Option<&Linear>) -> Result<T>) -> Result<T> {
        let has = |layer: &dyn Layer| layer.linears().iter().any(|linear| linear.name() == module);
        match self.layers.iter().position(|layer| has(layer.as_ref())) {
            None => work(None),
            Some(index) => self.with_layer(index, |layer| {
                work(layer.linears().into_iter().find(|linear| linear.name() == module))
            }),
        }
    }

    fn there(&self, index: usize, toward: Toward) -> Result<There<'_>> {
        match &self.streaming {
            None => Ok(There::Resident(self.layers[index].as_ref())),
            Some(streaming) => streaming.bring(&self.layers, index, toward),
        }
    }

    /// The linear layers, whose matrices may be quantised. Those that stay in host memory have a single zero in their place.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.layers.iter().flat_map(|layer| layer.linears())
    }

    /// Reloads from `weights` every tensor that `changed` has patches for: `weights` may be `changed` itself, or the same without
    /// them. The embeddings and the head are reloaded as a whole, each dropped before it is loaded.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn reload(
        &mut self,
        weights: &Weights,
        changed: &Weights,
        base: Base,
        device: &Device,
    ) -> Result<()> {
        let is_touched = |at: &dyn Fn(&str) -> bool| changed.patched_names().any(at);
        let is_head = |name: &str| name.starts_with("head.");
        if is_touched(&is_head) && self.head.take().is_some() {
            self.head = Some(Head::load(weights, &self.config, device)?);
        }
        let outside = self.architecture.outside_tensors();
        let is_embedding = |name: &str| !is_head(name) && outside.iter().any(|spec| spec.name == name);
        if is_touched(&is_embedding) && self.embedder.take().is_some() {
            self.embedder = Some(self.architecture.load_embedding(weights, base, device)?);
        }
        for index in 0..self.layers.len() {
            let id = self.layers[index].id();
            if !is_touched(&|name| id.local(name).is_some()) {
                continue;
            }
            let is_away = self.streaming.as_ref().is_some_and(|streaming| streaming.has(index));
            if !is_away {
                self.layers[index].reload(weights, changed, base.frozen)?;
                continue;
            }
            if let There::Brought(mut layer) = self.there(index, Toward::Calls)? {
                layer.reload(weights, changed, base.frozen)?;
                if let Some(streaming) = &mut self.streaming {
                    streaming.park(index, layer.as_mut())?;
                }
                self.layers[index] = layer;
            }
        }
        Ok(())
    }

    /// The context of the layers and the head for `input`, whose tensors may be on the host.
    ///
    /// # Errors
    /// If the shapes of the input do not fit the model.
    pub fn context(
        &self,
        cond: Conditioning<Embedded>,
        input: &NetworkInput,
        device: &Device,
    ) -> Result<Context> {
        Ok(Context { cond, positions: self.architecture.positions(input, device)?, exchange: None })
    }

    /// The streams through the layers, forward only.
    ///
    /// # Errors
    /// Those of [`Layer::forward`].
    pub fn through(&self, streams: Streams, context: &Context, pass: &Pass) -> Result<Streams> {
        let mut streams = streams;
        for index in 0..self.layers.len() {
            let layer = self.there(index, Toward::Calls)?;
            (streams, _) = layer.forward(streams, context, pass, Keep::Input)?;
        }
        Ok(streams)
    }

    /// [`Dit::through`] that keeps activations for [`Dit::backward`].
    ///
    /// # Errors
    /// Those of [`Layer::forward`], and a layer without a plan.
    pub fn through_keeping(
        &self,
        streams: Streams,
        context: &Context,
        pass: &Pass,
        keeping: &Keeping,
    ) -> Result<(Streams, Kept)> {
        let (mut streams, mut kept) = (streams, Kept::default());
        for index in 0..self.layers.len() {
            let layer = self.there(index, Toward::End)?;
            let BlockPlan { keep, place } = keeping.plans.of(layer.id())?;
            let (behind, saved) = layer.forward(streams, context, pass, keep)?;
            kept.push(saved, place, keeping.store)?;
            streams = behind;
        }
        Ok((streams, kept))
    }

    /// The gradients of the streams at the first layer of this part, from `d_streams` at its end, whose main stream is
    /// overwritten and must not be shared.
    ///
    /// Kept activations are freed layer by layer.
    ///
    /// # Errors
    /// Those of [`Layer::backward`], and a backward without its forward.
    pub fn backward(
        &self,
        mut kept: Kept,
        d_streams: Streams,
        context: &Context,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<Streams> {
        let mut d_streams = d_streams;
        for index in (0..self.layers.len()).rev() {
            let layer = self.there(index, Toward::Start)?;
            let Some(saved) = kept.pop()? else {
                return Err(Error::Mismatch("a backward without its forward: nothing was kept".into()));
            };
            d_streams = layer.backward(saved, d_streams, context, pass, gradients)?;
        }
        Ok(d_streams)
    }
}
