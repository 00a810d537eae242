//! A control model for the proofs, of the parts that published ones have and the plain Wan DiT has not: a chain of side
//! blocks whose outputs are added to the main stream, cross-attention to sound injected behind some blocks, and a token
//! of a reference in front of the sequence. No such model is in the product.

use std::collections::BTreeMap;
use std::sync::Arc;

use kernels::weight::Weight;
use kernels::{DType, Device, Tensor, attention};
use models::adapter::Adapters;
use models::dit::linear::{backward_adapters, forward_all};
use models::dit::{
    Architecture, Base, Block, Boundary, Conditioning, Context, DitConfig, Embed, Embedder, Gradients, Keep,
    Layer, LayerId, Linear, NetworkInput, Pass, Positions, Raw, Role, Saved, Streams,
};
use models::weights::{Frozen, TensorClass, TensorSpec, Weights};
use models::{Error, Result};

use crate::small;

/// Latents [b, c, t, h, w] that the side chain begins from.
pub const CONTROL: Role = Role::new("control", "control latents");
/// Rows [b, s, SOUND_DIM] that the injections attend to.
pub const SOUND: Role = Role::new("sound", "sound").padded();
/// [b, REFERENCE_DIM]: what the token in front is made from.
pub const REFERENCE: Role = Role::new("reference", "a reference");
/// Width of a row of sound.
pub const SOUND_DIM: usize = 6;
/// The most rows of sound.
pub const SOUND_ROWS: usize = 7;
/// Numbers of a reference.
pub const REFERENCE_DIM: usize = 5;
/// What a side block's output is multiplied by before it is added.
pub const HINT_SCALE: f64 = 0.7;

/// The side stream's name, and the chain of the blocks on it.
pub const SIDE: &str = "side_blocks";
/// The chain of the injections.
pub const INJECTOR: &str = "injector.layers";

/// The control model: which main blocks side blocks and injections follow.
#[derive(Debug, Clone)]
pub struct ControlModel {
    pub config: DitConfig,
    pub hints: Vec<usize>,
    pub injections: Vec<usize>,
}

impl ControlModel {
    /// Four main blocks, two side blocks, two injections.
    pub fn small() -> Self {
        Self { config: small::config(4, 24), hints: vec![0, 2], injections: vec![1, 2] }
    }

    /// The model as the product takes it.
    pub fn shared(&self) -> Arc<dyn Architecture> {
        Arc::new(self.clone())
    }

    /// Random weights.
    pub fn weights(&self) -> BTreeMap<String, Tensor> {
        small::random(&self.tensors())
    }

    fn linear_tensors(&self, module: String, input: usize, class: TensorClass) -> [TensorSpec; 2] {
        let weight = TensorSpec::new(format!("{module}.weight"), [self.config.dim, input]).of(class);
        [weight, TensorSpec::new(format!("{module}.bias"), [self.config.dim])]
    }

    /// Trainable adapters on every linear layer, side chain and injections included.
    pub fn adapters(&self, rank: usize, scale: f64) -> Adapters {
        small::adapters_on(self.adaptable_modules(), rank, scale)
    }
}

impl Architecture for ControlModel {
    fn config(&self) -> &DitConfig {
        &self.config
    }

    fn layers(&self, n: usize) -> Vec<LayerId> {
        let follows = |chain: &'static str, after: &[usize]| {
            after.iter().position(|&block| block == n).map(|index| LayerId::new(chain, index))
        };
        let rest = [follows(SIDE, &self.hints), follows(INJECTOR, &self.injections)];
        [LayerId::block(n)].into_iter().chain(rest.into_iter().flatten()).collect()
    }

    fn outside_tensors(&self) -> Vec<TensorSpec> {
        let embeddings = [
            ("side_before", self.config.dim),
            ("sound_embedding", SOUND_DIM),
            ("reference_embedding", REFERENCE_DIM),
        ];
        let own = embeddings
            .into_iter()
            .flat_map(|(module, input)| self.linear_tensors(module.to_owned(), input, TensorClass::Compute));
        self.config.outside_tensors().into_iter().chain(own).collect()
    }

    fn layer_tensors(&self, id: LayerId) -> Vec<TensorSpec> {
        let matrices = |parts: &[&str]| -> Vec<TensorSpec> {
            let tensors =
                |part| self.linear_tensors(format!("{id}.{part}"), self.config.dim, TensorClass::Matrix);
            parts.iter().flat_map(tensors).collect()
        };
        match id.chain() {
            INJECTOR => matrices(&["q", "k", "v", "o"]),
            SIDE => self.config.block_tensors(id).into_iter().chain(matrices(&["after"])).collect(),
            _ => self.config.block_tensors(id),
        }
    }

    fn load_layer(
        &self,
        id: LayerId,
        weights: &Weights,
        base: Base,
        device: &Device,
    ) -> Result<Box<dyn Layer>> {
        let linear = |part: &str| Linear::load(weights, format!("{id}.{part}"), base.frozen, device);
        match id.chain() {
            SIDE => Ok(Box::new(SideBlock {
                block: Block::load(weights, &self.config, id, base.frozen, device)?,
                after: linear("after")?,
                is_last: id.index() + 1 == self.hints.len(),
            })),
            INJECTOR => Ok(Box::new(Injection {
                id,
                layers: [linear("q")?, linear("k")?, linear("v")?, linear("o")?],
                heads: self.config.heads,
            })),
            _ => self.config.load_layer(id, weights, base, device),
        }
    }

    fn load_embedding(&self, weights: &Weights, base: Base, device: &Device) -> Result<Box<dyn Embed>> {
        let linear = |module: &str| -> Result<(Weight, Tensor)> {
            let tensor = |end: &str| weights.tensor(&format!("{module}.{end}"), DType::F32, device);
            Ok((Weight::Dense(tensor("weight")?), tensor("bias")?))
        };
        Ok(Box::new(ControlEmbedding {
            plain: Embedder::load(weights, &self.config, base, device)?,
            before: linear("side_before")?,
            sound: linear("sound_embedding")?,
            reference: linear("reference_embedding")?,
        }))
    }

    fn conditioning(&self, latents: (usize, usize, usize)) -> Conditioning<Raw, Vec<usize>> {
        let (frames, height, width) = latents;
        let control = vec![self.config.in_channels, frames, height, width];
        let plain = self.config.conditioning(latents).with(CONTROL, control);
        plain.with(SOUND, vec![SOUND_ROWS, SOUND_DIM]).with(REFERENCE, vec![REFERENCE_DIM])
    }

    fn positions(&self, input: &NetworkInput, device: &Device) -> Result<Positions> {
        let Positions { grid, cos_lp, sin_lp, .. } = self.config.positions(input, device)?;
        // The reference is at the origin.
        let origin = [Tensor::ones((1, cos_lp.dim(1)?), DType::F32, device)?, sin_lp.narrow(0, 0, 1)?];
        let [cos, sin] = [(&origin[0], &cos_lp), (&origin[1].zeros_like()?, &sin_lp)]
            .map(|(first, rest)| Tensor::cat(&[first, rest], 0));
        Ok(Positions { grid, in_front: 1, cos_lp: cos?, sin_lp: sin? })
    }
}

#[derive(Debug, Clone)]
struct ControlEmbedding {
    plain: Embedder,
    before: (Weight, Tensor),
    sound: (Weight, Tensor),
    reference: (Weight, Tensor),
}

impl Embed for ControlEmbedding {
    fn embed(&self, input: &NetworkInput) -> Result<Boundary> {
        let mut cond = input.cond.clone();
        let mut own = |role: Role| cond.take(role).ok_or(Error::RoleMissing { role });
        let (control, sound, reference) = (own(CONTROL)?, own(SOUND)?, own(REFERENCE)?);
        let linear = |x: &Tensor, (weight, bias): &(Weight, Tensor)| {
            kernels::linear::forward(x, weight, Some(bias), None)
        };
        let reference = linear(&reference.unsqueeze(1)?, &self.reference)?;
        let main = Tensor::cat(&[reference, self.plain.tokens(&input.x_bcthw)?], 1)?;
        let control = linear(&self.plain.tokens(&control)?, &self.before)?;
        let side = (control.pad_with_zeros(1, 1, 0)? + &main)?;
        let cond = self.plain.conditioning(&cond, input.grid()?)?;
        let streams = Streams::new(main).with(SIDE, side);
        Ok(Boundary { streams, cond: cond.with(SOUND, linear(&sound, &self.sound)?) })
    }

    fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let Self { plain, before, sound, reference } = self;
        let own = [before, sound, reference]
            .into_iter()
            .flat_map(|(weight, bias)| weight.tensors_mut().into_iter().chain([bias]));
        plain.tensors_mut().into_iter().chain(own).collect()
    }

    fn share(&self) -> Box<dyn Embed> {
        Box::new(self.clone())
    }
}

/// C = Block(C); X += scale after(C).
#[derive(Debug, Clone)]
struct SideBlock {
    block: Block,
    after: Linear,
    is_last: bool,
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
        let side = streams.take(SIDE).ok_or_else(|| Error::Mismatch("no side stream".into()))?;
        let (side, saved) = self.block.forward(side, context, pass, keep)?;
        streams.main = (streams.main + (self.after.forward(&side, pass)? * HINT_SCALE)?)?;
        if !self.is_last {
            streams.put(SIDE, side.clone());
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
        let side = saved.tensors.remove(0);
        let d_hint = (&d_streams.main * HINT_SCALE)?;
        let mut d_side = self.after.backward(&side, &d_hint, pass, gradients)?.to_dtype(DType::F32)?;
        drop((side, d_hint));
        if let Some(d_behind) = d_streams.take(SIDE) {
            d_side = (d_side + d_behind)?;
        }
        let d_side = self.block.backward(saved.into_block()?, d_side, context, pass, gradients)?;
        d_streams.put(SIDE, d_side);
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

/// X += o(attention(q(X), k(sound), v(sound))).
#[derive(Debug, Clone)]
struct Injection {
    id: LayerId,
    /// q, k, v, o.
    layers: [Linear; 4],
    heads: usize,
}

/// q, k, v, the attention's output and its log-sum-exp.
type Attended = [Tensor; 5];

impl Injection {
    fn split(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, width) = x.dims3()?;
        Ok(x.reshape((batch, tokens, self.heads, width / self.heads))?)
    }

    fn attend(&self, x: &Tensor, context: &Context, pass: &Pass) -> Result<Attended> {
        let [q, k, v, _] = &self.layers;
        let [k, v] = forward_all([k, v], context.cond.require(SOUND)?, pass)?;
        let [q, k, v] = [self.split(&q.forward(x, pass)?)?, self.split(&k)?, self.split(&v)?];
        let attention::Output { o, lse } = attention::forward(&q, &k, &v)?;
        Ok([q, k, v, o, lse])
    }
}

impl Layer for Injection {
    fn id(&self) -> LayerId {
        self.id
    }

    fn forward(
        &self,
        mut streams: Streams,
        context: &Context,
        pass: &Pass,
        keep: Keep,
    ) -> Result<(Streams, Saved)> {
        let x = streams.main;
        let attended = self.attend(&x, context, pass)?;
        streams.main = (&x + self.layers[3].forward(&attended[3].flatten_from(2)?, pass)?)?;
        let mut tensors = vec![x];
        if keep == Keep::All {
            tensors.extend(attended);
        }
        Ok((streams, Saved { block: None, tensors }))
    }

    fn backward(
        &self,
        saved: Saved,
        mut d_streams: Streams,
        context: &Context,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<Streams> {
        let mut tensors = saved.tensors.into_iter();
        let x = tensors.next().ok_or_else(|| Error::Mismatch("the injection kept nothing".into()))?;
        let [q, k, v, o, lse] = match Attended::try_from(tensors.collect::<Vec<_>>()) {
            Ok(attended) => attended,
            Err(_) => self.attend(&x, context, pass)?,
        };
        let joined = |x: &Tensor| x.flatten_from(2);
        let [to_q, to_k, to_v, to_o] = &self.layers;
        let d_o = self.split(&to_o.backward(&joined(&o)?, &d_streams.main, pass, gradients)?)?;
        let d = attention::backward(&q, &k, &v, &attention::Output { o, lse }, &d_o)?;
        let d_sound = [joined(&d.dk)?, joined(&d.dv)?];
        backward_adapters([to_k, to_v], context.cond.require(SOUND)?, &d_sound, pass, gradients)?;
        let dx = to_q.backward(&x, &joined(&d.dq)?, pass, gradients)?;
        d_streams.main = (d_streams.main + dx.to_dtype(DType::F32)?)?;
        Ok(d_streams)
    }

    fn linears(&self) -> Vec<&Linear> {
        self.layers.iter().collect()
    }

    fn matrices_mut(&mut self) -> Vec<&mut Tensor> {
        self.layers.iter_mut().map(|linear| linear.weight_mut().stored_mut()).collect()
    }

    fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        self.layers.iter_mut().flat_map(Linear::tensors_mut).collect()
    }

    fn share(&self) -> Box<dyn Layer> {
        Box::new(self.clone())
    }

    fn reload(&mut self, weights: &Weights, changed: &Weights, frozen: Frozen) -> Result<()> {
        self.layers.iter_mut().try_for_each(|linear| linear.reload(weights, changed, frozen))
    }
}
