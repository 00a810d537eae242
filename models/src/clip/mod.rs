//! The picture tower of OpenCLIP's XLM-Roberta-Large ViT-H/14, by which Wan 2.1's image-to-video models see a picture.
//! Frozen: forward only. What they look at are the states before the last layer.
//!
//! Source: Wan-Video/Wan2.1 `wan/modules/clip.py`.

mod names;

use std::path::Path;

use kernels::weight::Weight;
use kernels::{DType, Device, Tensor, attention, linear, norm};
use serde::Deserialize;

pub use names::{ClipSizes, Naming};

use crate::picture::resize_bicubic;
use crate::weights::{Checkpoint, Weights};
use crate::{Error, Movable, Result};

/// The epsilon of every norm.
const EPSILON: f64 = 1e-5;
/// Mean and deviation of the pixels, red green blue, that CLIP was trained with.
const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const DEVIATION: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// The tower with its weights on one device.
#[derive(Debug)]
pub struct Clip {
    sizes: ClipSizes,
    image: usize,
    dtype: DType,
    patch: Weight,
    class: Tensor,
    positions: Tensor,
    pre_norm: Norm,
    layers: Vec<Layer>,
    fingerprint: String,
}

type Norm = (Tensor, Tensor);

#[derive(Debug)]
struct Layer {
    norm_1: Norm,
    qkv: (Weight, Tensor),
    out: (Weight, Tensor),
    norm_2: Norm,
    up: (Weight, Tensor),
    down: (Weight, Tensor),
}

/// The keys of a diffusers `image_encoder`'s `config.json` that tensors do not show.
#[derive(Deserialize)]
struct ConfigFile {
    num_attention_heads: Option<usize>,
}

impl Clip {
    /// Loads the tower from the official `.pth`, a `.safetensors` file or a diffusers `image_encoder` folder, with
    /// official or HF names, to be computed in `dtype`; norms run in f32.
    ///
    /// Heads are in no tensor: `config`, or the `config.json` beside the weights, tells them; without either they are 80
    /// wide, as the published ones.
    ///
    /// # Errors
    /// Anything that [`Weights::open`] refuses, and files that hold no such tower.
    pub fn load(path: &Path, config: Option<&Path>, dtype: DType, device: &Device) -> Result<Self> {
        let (checkpoint, sizes, naming) = Self::open(path, config)?;
        let to_file = |name: &str| Some(names::in_file(name, naming));
        let weights =
            Weights::from_checkpoint(checkpoint, &sizes.tensors(naming), to_file, names::is_unused)?;
        Self::build(&weights, sizes, naming, dtype, device)
    }

    /// The sizes of the tower at `path`, from the shapes of its tensors, without loading it.
    ///
    /// # Errors
    /// If the file cannot be opened, or has no such tower.
    pub fn sizes_at(path: &Path, config: Option<&Path>) -> Result<ClipSizes> {
        Ok(Self::open(path, config)?.1)
    }

    fn open(path: &Path, config: Option<&Path>) -> Result<(Checkpoint, ClipSizes, Naming)> {
        let checkpoint = Checkpoint::open(path)?;
        let beside = path.join("config.json");
        let config = config.or_else(|| beside.is_file().then_some(&beside));
        let heads = config.map(heads_of).transpose()?.flatten();
        let (sizes, naming) = ClipSizes::detect(&checkpoint, heads)?;
        Ok((checkpoint, sizes, naming))
    }

    /// A tower of these sizes with weights made from `seed`, for measuring speed and memory.
    ///
    /// # Errors
    /// If the sizes do not give a square picture.
    pub fn seeded(sizes: ClipSizes, seed: u64, dtype: DType, device: &Device) -> Result<Self> {
        let naming = Naming::Official;
        Self::build(&Weights::seeded(sizes.tensors(naming), seed), sizes, naming, dtype, device)
    }

    fn build(
        weights: &Weights,
        sizes: ClipSizes,
        naming: Naming,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let image = sizes
            .image()
            .ok_or_else(|| Error::Mismatch(format!("{sizes:?}: the patches make no square picture")))?;
        let get = |name: &str, dtype| weights.tensor(name, dtype, device);
        let norm = |name: &str| -> Result<Norm> {
            Ok((get(&format!("{name}.weight"), DType::F32)?, get(&format!("{name}.bias"), DType::F32)?))
        };
        let stacked = |parts: &[&str], suffix: &str| -> Result<Tensor> {
            let parts: Vec<Tensor> =
                parts.iter().map(|part| get(&format!("{part}.{suffix}"), dtype)).collect::<Result<_>>()?;
            Ok(Tensor::cat(&parts, 0)?)
        };
        let linear = |parts: &[&str]| -> Result<(Weight, Tensor)> {
            Ok((Weight::Dense(stacked(parts, "weight")?), stacked(parts, "bias")?))
        };
        let layer = |n: usize| {
            let name = |tail: &str| format!("transformer.{n}.{tail}");
            let qkv = match naming {
                Naming::Official => linear(&[&name("attn.to_qkv")])?,
                Naming::Hf => linear(&[&name("attn.q"), &name("attn.k"), &name("attn.v")])?,
            };
            Ok(Layer {
                norm_1: norm(&name("norm1"))?,
                qkv,
                out: linear(&[&name("attn.proj")])?,
                norm_2: norm(&name("norm2"))?,
                up: linear(&[&name("mlp.0")])?,
                down: linear(&[&name("mlp.2")])?,
            })
        };
        Ok(Self {
            patch: Weight::Dense(get("patch_embedding.weight", dtype)?.flatten_from(1)?),
            class: get("cls_embedding", DType::F32)?.reshape((1, 1, sizes.width))?,
            positions: get("pos_embedding", DType::F32)?.reshape((1, sizes.rows, sizes.width))?,
            pre_norm: norm("pre_norm")?,
            // The output of the last layer is not used.
            layers: (0..sizes.layers - 1).map(layer).collect::<Result<_>>()?,
            fingerprint: weights.fingerprint()?,
            image,
            sizes,
            dtype,
        })
    }

    /// The sizes of this tower.
    pub fn sizes(&self) -> &ClipSizes {
        &self.sizes
    }

    /// Height and width in pixels of the picture that it sees.
    pub fn image(&self) -> usize {
        self.image
    }

    /// The device of the weights.
    pub fn device(&self) -> &Device {
        self.class.device()
    }

    /// A text that identifies the weights, for the keys of caches.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The pixels [b, 3, side, side] that the tower takes, of pictures [b, 3, h, w] in -1..1 of any size: the whole
    /// picture squeezed into a square, bicubic without antialiasing, centred and scaled. f32.
    pub fn pixels(&self, picture_b3hw: &Tensor) -> Result<Tensor> {
        let square = resize_bicubic(picture_b3hw, (self.image, self.image))?;
        normalised(&square.affine(0.5, 0.5)?)
    }

    /// The states [b, rows, width] f32 of `pixels` [b, 3, side, side] before the last layer, the class first.
    ///
    /// # Errors
    /// Pixels of another size.
    pub fn encode(&self, pixels_b3hw: &Tensor) -> Result<Tensor> {
        let (patch, side) = (self.sizes.patch, self.image / self.sizes.patch);
        let (batch, channels, height, width) = pixels_b3hw.dims4()?;
        if (channels, height, width) != (3, self.image, self.image) {
            return Err(Error::Mismatch(format!(
                "CLIP takes pixels [b, 3, {0}, {0}], not {1:?}",
                self.image,
                pixels_b3hw.dims()
            )));
        }
        let patches = pixels_b3hw
            .to_device(self.device())?
            .to_dtype(self.dtype)?
            .reshape(&[batch, 3, side, patch, side, patch][..])?
            .permute([0, 2, 4, 1, 3, 5])?
            .contiguous()?
            .reshape((batch, side * side, 3 * patch * patch))?;
        let tokens = linear::forward(&patches, &self.patch, None, None)?.to_dtype(DType::F32)?;
        let class = self.class.broadcast_as((batch, 1, self.sizes.width))?.contiguous()?;
        let x = Tensor::cat(&[&class, &tokens], 1)?.broadcast_add(&self.positions)?;
        let (gain, shift) = &self.pre_norm;
        let x = norm::affine_layer_norm(&x, gain, shift, EPSILON, DType::F32)?;
        self.layers.iter().try_fold(x, |x, layer| layer.forward(&x, self.sizes.heads, self.dtype))
    }
}

impl Movable for Clip {
    fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let Self { patch, class, positions, pre_norm, layers, .. } = self;
        let ends = [class, positions, &mut pre_norm.0, &mut pre_norm.1].into_iter();
        ends.chain(patch.tensors_mut()).chain(layers.iter_mut().flat_map(Layer::tensors_mut)).collect()
    }
}

/// Pixels [b, 3, h, w] in 0..1 as CLIP was trained on them: centred and scaled, channel by channel.
pub fn normalised(pixels_b3hw: &Tensor) -> Result<Tensor> {
    let column = |values: [f32; 3]| Tensor::new(&values, pixels_b3hw.device())?.reshape((1, 3, 1, 1));
    Ok(pixels_b3hw.broadcast_sub(&column(MEAN)?)?.broadcast_div(&column(DEVIATION)?)?)
}

impl Layer {
    fn tensors_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        let Self { norm_1, qkv, out, norm_2, up, down } = self;
        let norms = [norm_1, norm_2].into_iter().flat_map(|(gain, shift)| [gain, shift]);
        let linears = [qkv, out, up, down].into_iter();
        norms.chain(linears.flat_map(|(weight, bias)| std::iter::once(bias).chain(weight.tensors_mut())))
    }

    /// The stream `x` [b, l, w] f32 after the layer; products in `dtype`.
    fn forward(&self, x: &Tensor, heads: usize, dtype: DType) -> Result<Tensor> {
        let (batch, rows, width) = x.dims3()?;
        let normed =
            |x: &Tensor, (gain, shift): &Norm| norm::affine_layer_norm(x, gain, shift, EPSILON, dtype);
        let through =
            |x: &Tensor, (weight, bias): &(Weight, Tensor)| linear::forward(x, weight, Some(bias), None);
        let qkv = through(&normed(x, &self.norm_1)?, &self.qkv)?;
        let part = |i: usize| {
            qkv.narrow(2, i * width, width)?.contiguous()?.reshape((batch, rows, heads, width / heads))
        };
        let attended = attention::forward(&part(0)?, &part(1)?, &part(2)?)?.o.flatten_from(2)?;
        let x = (x + through(&attended, &self.out)?.to_dtype(DType::F32)?)?;
        let inner = through(&normed(&x, &self.norm_2)?, &self.up)?.gelu_erf()?;
        Ok((&x + through(&inner, &self.down)?.to_dtype(DType::F32)?)?)
    }
}

fn heads_of(config: &Path) -> Result<Option<usize>> {
    let refuse = |why: String| Error::Mismatch(format!("{}: {why}", config.display()));
    let text = std::fs::read(config).map_err(|error| refuse(error.to_string()))?;
    let config: ConfigFile =
        serde_json::from_slice(&text).map_err(|error| refuse(format!("no CLIP config: {error}")))?;
    Ok(config.num_attention_heads)
}
