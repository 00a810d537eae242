//! UMT5, the text encoder of all Wan models. Frozen: forward only.
//!
//! A T5 encoder whose every layer has its own table of relative positions. Sequences run alone, without padding:
//! masked padding does not influence real tokens, so the result is the same.
//! Source: Wan-Video/Wan2.1 `wan/modules/t5.py`.

mod names;
mod position;

use std::path::Path;

use kernels::weight::Weight;
use kernels::{DType, Device, Tensor, gelu, norm};

use crate::weights::side_by_side::{AtOnce, beside, loaded};
use crate::weights::{Checkpoint, Frozen, Weights};
use crate::{Error, Movable, Result};

pub use names::Umt5Sizes;
pub use position::bucket;

/// The tensor of single-file text encoders that holds the bytes of `spiece.model`.
pub const SPIECE_TENSOR: &str = "spiece_model";

/// Added to the mean square before its root.
const EPSILON: f64 = 1e-6;

/// The encoder with its weights on one device.
#[derive(Debug)]
pub struct Umt5 {
    sizes: Umt5Sizes,
    frozen: Frozen,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    fingerprint: String,
}

#[derive(Debug)]
struct Layer {
    norm_1: Tensor,
    q: Weight,
    k: Weight,
    v: Weight,
    o: Weight,
    /// [buckets, heads]
    positions: Tensor,
    norm_2: Tensor,
    gate: Weight,
    up: Weight,
    down: Weight,
}

impl Umt5 {
    /// Loads the encoder from the official `.pth`, a `.safetensors` file or a folder with shards, with official or HF
    /// names. Sizes are read from the tensors. The linear layers are in the form of `frozen`, all else in its compute
    /// dtype.
    ///
    /// # Errors
    /// Anything that [`Weights::open`] refuses, and files that hold no UMT5.
    pub fn load(path: &Path, frozen: Frozen, device: &Device) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let spelling = names::Spelling::of(&checkpoint);
        let sizes = Self::sizes_in(&checkpoint, spelling)?;
        // ComfyUI files carry the tokenizer's model along; a tied embedding may be spelled twice.
        let ignored =
            |name: &str| name == SPIECE_TENSOR || (spelling.has_shared && name == names::TIED_EMBEDDING);
        let to_file = |name: &str| spelling.in_file(name);
        let weights = Weights::from_checkpoint(checkpoint, &sizes.tensors(), to_file, ignored)?;
        Self::build(&weights, sizes, frozen, device)
    }

    /// The sizes of the encoder at `path`, from the shapes of its tensors, without loading it.
    ///
    /// # Errors
    /// If the file cannot be opened, or has no UMT5.
    pub fn sizes_at(path: &Path) -> Result<Umt5Sizes> {
        let checkpoint = Checkpoint::open(path)?;
        Self::sizes_in(&checkpoint, names::Spelling::of(&checkpoint))
    }

    fn sizes_in(checkpoint: &Checkpoint, spelling: names::Spelling) -> Result<Umt5Sizes> {
        let in_file = |name: &str| spelling.in_file(name).unwrap_or_else(|| name.to_owned());
        let sizes = Umt5Sizes::detect(checkpoint, in_file)?;
        if sizes.inner % sizes.heads != 0 || sizes.buckets < 4 {
            let path = checkpoint.path().display();
            return Err(Error::Mismatch(format!(
                "{path}: {sizes:?} is not a UMT5: heads or buckets do not divide"
            )));
        }
        Ok(sizes)
    }

    /// An encoder of these sizes with weights made from `seed`, for measuring speed and memory.
    pub fn seeded(sizes: Umt5Sizes, seed: u64, frozen: Frozen, device: &Device) -> Result<Self> {
        Self::build(&Weights::seeded(sizes.tensors(), seed), sizes, frozen, device)
    }

    fn build(weights: &Weights, sizes: Umt5Sizes, frozen: Frozen, device: &Device) -> Result<Self> {
        let dtype = frozen.compute;
        let layer = |n: usize, _: &()| {
            let name = |tail: &str| format!("blocks.{n}.{tail}.weight");
            let tensor = |tail: &str| weights.tensor(&name(tail), dtype, device);
            // Rounded as all else, stored in f32 for the norm's kernel.
            let gain = |tail: &str| Ok::<_, Error>(tensor(tail)?.to_dtype(DType::F32)?);
            let matrix = |tail: &str| weights.matrix(&name(tail), frozen, device);
            Ok(Layer {
                norm_1: gain("norm1")?,
                q: matrix("attn.q")?,
                k: matrix("attn.k")?,
                v: matrix("attn.v")?,
                o: matrix("attn.o")?,
                positions: tensor("pos_embedding.embedding")?,
                norm_2: gain("norm2")?,
                gate: matrix("ffn.gate.0")?,
                up: matrix("ffn.fc1")?,
                down: matrix("ffn.fc2")?,
            })
        };
        let embedding = weights.tensor("token_embedding.weight", dtype, device)?;
        let _beside = beside(sizes.tensors().into_iter(), frozen, device, AtOnce::RESIDENT)?;
        Ok(Self {
            embedding,
            layers: loaded(&vec![(); sizes.layers], device, AtOnce::RESIDENT, layer)?,
            norm: weights.tensor("norm.weight", dtype, device)?.to_dtype(DType::F32)?,
            fingerprint: weights.fingerprint()?,
            frozen,
            sizes,
        })
    }

    /// The sizes of this encoder.
    pub fn sizes(&self) -> &Umt5Sizes {
        &self.sizes
    }

    /// The dtypes and the storage of the weights.
    pub fn frozen(&self) -> Frozen {
        self.frozen
    }

    /// Their device.
    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// A text that identifies the weights, for the keys of caches.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The states of a sequence of tokens: [length, width].
    ///
    /// # Errors
    /// If there are no tokens, or one is outside the vocabulary.
    pub fn encode(&self, ids: &[u32]) -> Result<Tensor> {
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.sizes.vocabulary) {
            return Err(Error::Mismatch(format!(
                "token {id} is outside the text encoder's vocabulary of {}: the tokenizer belongs to another model",
                self.sizes.vocabulary
            )));
        }
        if ids.is_empty() {
            return Err(Error::Mismatch("the text encoder needs at least one token, </s>".to_owned()));
        }
        let device = self.embedding.device();
        let grid = position::bucket_grid(ids.len(), self.sizes.buckets, device)?;
        let mut x = self.embedding.index_select(&Tensor::new(ids, device)?, 0)?;
        for layer in &self.layers {
            x = layer.forward(&x, &position::bias(&layer.positions, &grid, ids.len())?)?;
        }
        rms_norm(&x, &self.norm)
    }

    /// The biases of relative positions of a layer: [heads, length, length].
    ///
    /// # Errors
    /// If there is no such layer.
    pub fn position_bias(&self, layer: usize, length: usize) -> Result<Tensor> {
        let layers = self.layers.len();
        let layer = self
            .layers
            .get(layer)
            .ok_or_else(|| Error::Mismatch(format!("no layer {layer} of {layers} in UMT5")))?;
        let grid = position::bucket_grid(length, self.sizes.buckets, layer.positions.device())?;
        position::bias(&layer.positions, &grid, length)
    }
}

impl Movable for Umt5 {
    fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let Self { embedding, layers, norm, .. } = self;
        [embedding, norm].into_iter().chain(layers.iter_mut().flat_map(Layer::tensors_mut)).collect()
    }
}

impl Layer {
    fn tensors_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        let Self { norm_1, q, k, v, o, positions, norm_2, gate, up, down } = self;
        let matrices = [q, k, v, o, gate, up, down].into_iter().flat_map(Weight::tensors_mut);
        [norm_1, positions, norm_2].into_iter().chain(matrices)
    }

    /// One layer on `x` [length, width], with its biases [heads, length, length].
    fn forward(&self, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let x = (x + self.attend(&rms_norm(x, &self.norm_1)?, bias)?)?;
        let h = rms_norm(&x, &self.norm_2)?;
        let gated = (gelu::forward(&linear(&h, &self.gate)?)? * linear(&h, &self.up)?)?;
        Ok((x + linear(&gated, &self.down)?)?)
    }

    fn attend(&self, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let (heads, length, _) = bias.dims3()?;
        let split = |weight: &Weight| -> Result<Tensor> {
            Ok(linear(x, weight)?.reshape((length, heads, ()))?.transpose(0, 1)?.contiguous()?)
        };
        let (q, k, v) = (split(&self.q)?, split(&self.k)?, split(&self.v)?);
        // T5 does not divide by the root of the head's width.
        let scores = (q.matmul(&k.transpose(1, 2)?)? + bias)?.to_dtype(DType::F32)?;
        let weights = kernels::softmax::rows(&scores)?.to_dtype(v.dtype())?;
        let joined = weights.matmul(&v)?.transpose(0, 1)?.contiguous()?.flatten_from(1)?;
        linear(&joined, &self.o)
    }
}

/// `x W^T`.
fn linear(x: &Tensor, weight: &Weight) -> Result<Tensor> {
    Ok(kernels::linear::forward(x, weight, None, None)?)
}

/// `x / sqrt(mean(x^2) + 1e-6) weight`, the mean in f32.
fn rms_norm(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    Ok(norm::rms_norm(x, weight, EPSILON, x.dtype())?)
}
