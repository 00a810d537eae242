//! The Wan diffusion transformer: embeddings, blocks, head. The same forward trains and samples.
//!
//! A [`Dit`] is the whole model or the part of it that one device holds. There is no autograd: the backward goes
//! through the blocks in reverse, replaying each from its input.

pub mod attention;
pub mod base;
pub mod block;
pub mod conditioning;
pub mod config;
pub mod cross;
pub mod embed;
pub mod ffn;
pub mod head;
pub mod input;
pub mod keep;
pub mod linear;
pub mod pass;
pub mod rope;

use std::ops::Range;
use std::path::Path;

use candle_core::{Device, Tensor};

pub use base::Base;
pub use block::Block;
pub use conditioning::{Conditioning, Embedded, Raw, Role};
pub use config::{DitConfig, ImageBranch, Pictures};
pub use embed::Embedder;
pub use head::Head;
pub use input::{Boundary, Context, NetworkInput};
pub use keep::{BlockPlan, Keep, Keeping, Kept, Place};
pub use linear::Linear;
pub use pass::{Dropout, Gradients, Pass};

use crate::published::Facts;
use crate::weights::{Checkpoint, Weights};
use crate::{Contents, Error, Result, names, published};

/// A Wan DiT, or the consecutive part of one that a stage holds: the first part embeds, the last has the head.
#[derive(Debug)]
pub struct Dit {
    /// Sizes of the whole model.
    pub config: DitConfig,
    /// Which blocks are here.
    pub range: Range<usize>,
    /// Embeddings; the first part only.
    pub embedder: Option<Embedder>,
    /// The blocks of `range`.
    pub blocks: Vec<Block>,
    /// Head; the last part only.
    pub head: Option<Head>,
}

impl Dit {
    /// Reads the blocks of `range`, the embeddings if it starts at the first block, the head if it ends at the last.
    ///
    /// Weights are held as `base` says.
    pub fn load(
        weights: &Weights,
        config: &DitConfig,
        range: Range<usize>,
        base: Base,
        device: &Device,
    ) -> Result<Self> {
        let blocks = range
            .clone()
            .map(|n| Block::load(weights, config, n, base.frozen, device))
            .collect::<Result<_>>()?;
        let embedder = match range.start {
            0 => Some(Embedder::load(weights, config, base, device)?),
            _ => None,
        };
        let head = match range.end == config.layers {
            true => Some(Head::load(weights, config, device)?),
            false => None,
        };
        Ok(Self { config: config.clone(), range, embedder, blocks, head })
    }

    /// The linear layers of the blocks, whose matrices may be coded.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.blocks.iter().flat_map(Block::linears)
    }

    /// Reads again, out of `weights`, every tensor that `changed` has patches for: `weights` may be `changed` itself, or the
    /// same without them. The embeddings and the head are read as a whole, each dropped before it is there again.
    pub fn reload(
        &mut self,
        weights: &Weights,
        changed: &Weights,
        base: Base,
        device: &Device,
    ) -> Result<()> {
        let is_touched = |at: fn(&str) -> bool| changed.patched_names().any(at);
        if is_touched(|name| name.starts_with("head.")) && self.head.take().is_some() {
            self.head = Some(Head::load(weights, &self.config, device)?);
        }
        let is_embedding = |name: &str| !name.starts_with("head.") && !name.starts_with("blocks.");
        if is_touched(is_embedding) && self.embedder.take().is_some() {
            self.embedder = Some(Embedder::load(weights, &self.config, base, device)?);
        }
        for (n, block) in self.range.clone().zip(&mut self.blocks) {
            block.reload(weights, changed, n, base.frozen)?;
        }
        Ok(())
    }

    /// The stream [b, l, d] through the blocks, forward only.
    pub fn through(&self, x: Tensor, context: &Context, pass: &Pass) -> Result<Tensor> {
        self.blocks.iter().try_fold(x, |x, block| Ok(block.forward(x, context, pass, Keep::Input)?.0))
    }

    /// [`Dit::through`], keeping what [`Dit::backward`] wants.
    ///
    /// # Errors
    /// When a block has no plan.
    pub fn through_keeping(
        &self,
        x: Tensor,
        context: &Context,
        pass: &Pass,
        keeping: &Keeping,
    ) -> Result<(Tensor, Kept)> {
        let (mut x, mut kept) = (x, Kept::default());
        for (block, plan) in self.blocks.iter().zip(keeping.of(&self.range)?) {
            let (y, saved) = block.forward(x, context, pass, plan.keep)?;
            kept.push(saved, plan.place, keeping.store)?;
            x = y;
        }
        Ok((x, kept))
    }

    /// The gradient of the stream at the first block of this part, from `dy` at its end, which is written over: nobody else
    /// may hold it.
    ///
    /// What was kept is freed block by block.
    pub fn backward(
        &self,
        mut kept: Kept,
        dy: Tensor,
        context: &Context,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let mut dy = dy;
        for block in self.blocks.iter().rev() {
            let Some(saved) = kept.pop()? else {
                return Err(Error::Mismatch("a backward without its forward: nothing was kept".into()));
            };
            dy = block.backward(saved, dy, context, pass, gradients)?;
        }
        Ok(dy)
    }
}

/// Opens the weights at `path` (a file, or a folder of shards), in either naming, and checks every tensor's name and
/// shape. `config_json` is the text of their `config.json`; without it the sizes are those that the tensors tell, and
/// heads are of 128, as in every published model.
///
/// # Errors
/// When the config does not fit, or any tensor is missing, unexpected or misshapen; all of them are listed.
pub fn open(path: &Path, config_json: Option<&str>) -> Result<(DitConfig, Weights)> {
    let checkpoint = Checkpoint::open(path)?.without_model_prefix()?;
    let is_diffusers = checkpoint.contains("condition_embedder.time_proj.weight");
    let to_file = |official: &str| if is_diffusers { names::tensor_to_diffusers(official) } else { None };
    let shape_of = |official: &str| {
        let name = to_file(official).unwrap_or_else(|| official.to_owned());
        checkpoint.shape(&name).map(<[usize]>::to_vec)
    };
    if shape_of("patch_embedding.weight").is_none() {
        return Err(Contents::Dit.refusal(&checkpoint, "patch_embedding.weight"));
    }
    let by_channels = || Facts::read(shape_of).refused();
    if let Some(kind) = published::refused(&checkpoint).or_else(by_channels) {
        return Err(Error::Mismatch(format!(
            "{}: this is {kind}, which Tandem does not train; its adapters are often made on the plain text-to-video or \
             image-to-video model of the same size",
            path.display()
        )));
    }
    let told = match config_json {
        Some(text) => text.to_owned(),
        None => published_config(path, shape_of("patch_embedding.weight"))?,
    };
    let config = DitConfig::from_parts(&told, shape_of).map_err(|error| match error {
        Error::Mismatch(why) => Error::Mismatch(format!("{}: {why}", path.display())),
        other => other,
    })?;
    // Some files of diffusers carry a norm of queries that no code reads.
    let ignored = |name: &str| name.ends_with(".attn2.norm_added_q.weight");
    let weights = Weights::from_checkpoint(checkpoint, &config.tensors(), to_file, ignored)?;
    Ok((config, weights))
}

/// Width of a head in every published model.
const PUBLISHED_HEAD: usize = 128;

/// What a `config.json` would say that tensors do not, from the shape of the patch embedding.
fn published_config(path: &Path, patch: Option<Vec<usize>>) -> Result<String> {
    match patch.and_then(|shape| shape.first().copied()) {
        Some(dim) if !dim.is_multiple_of(PUBLISHED_HEAD) => Err(Error::Mismatch(format!(
            "{}: a DiT of width {dim} is no published model, so only its config.json tells the number of heads; put it \
             beside the weights, or name it with model.dit_config",
            path.display()
        ))),
        // What is no DiT at all is told by the tensors that it lacks.
        dim => Ok(format!(r#"{{"num_heads":{}}}"#, dim.unwrap_or(PUBLISHED_HEAD) / PUBLISHED_HEAD)),
    }
}
