//! One block of the DiT: modulated self-attention, cross-attention, modulated feed-forward, each added to the stream.
//!
//! Source of the formula: Wan-Video/Wan2.1 wan/modules/model.py `WanAttentionBlock.forward`.
//!
//! The backward works on the outputs of products and attentions, kept or recomputed. Norms, positions and sums are always
//! recomputed: they cost little time and much memory. The feed-forward part works on single tokens and runs in chunks.

use kernels::residual::{self, Stream};
use kernels::tokens::{Destination, run, unwritten};
use kernels::{DType, Device, Tensor, norm};

use super::attention::{Attended, Projected, Projections, SelfAttention};
use super::config::DitConfig;
use super::cross::{CrossAttended, CrossAttention, CrossProjected};
use super::ffn::{Chunk, FeedForward, chunks};
use super::input::Context;
use super::layer_id::LayerId;
use super::linear::Linear;
use super::pass::{Gradients, Pass};
use super::plan::Keep;
use super::reader::Reader;
use super::role::Role;
use crate::Result;
use crate::weights::{Frozen, Weights};

/// A frozen block.
#[derive(Debug, Clone)]
pub struct Block {
    id: LayerId,
    modulation: Tensor,
    self_attention: SelfAttention,
    norm3_weight: Tensor,
    norm3_bias: Tensor,
    cross_attention: CrossAttention,
    ffn: FeedForward,
    dtype: DType,
    eps: f64,
}

/// The activations that are kept of a block's forward: its input, and those that [`Keep`] selects.
#[derive(Debug, Clone)]
pub struct Saved<T = Tensor> {
    x: T,
    attended: Option<Attended<T>>,
    inner: Option<Inner<T>>,
}

/// The outputs of products and attentions before the feed-forward part, without the self-attention's own output.
#[derive(Debug, Clone)]
struct Inner<T = Tensor> {
    projected: Projected<T>,
    self_output: T,
    cross_projected: CrossProjected<T>,
    cross_attended: CrossAttended<T>,
    cross_output: T,
}

/// The six modulation rows of a block, each [b, g, 1, d] f32.
struct Modulation {
    shift_self: Tensor,
    scale_self: Tensor,
    gate_self: Tensor,
    ffn: FfnModulation,
}

/// The rows of the feed-forward part.
struct FfnModulation {
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
}

impl<T> Saved<T> {
    /// The same structure with every value mapped by `f`.
    pub(super) fn map<U>(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<Saved<U>> {
        let x = f(self.x)?;
        let attended = self.attended.map(|attended| attended.map(f)).transpose()?;
        let inner = self.inner.map(|inner| inner.map(f)).transpose()?;
        Ok(Saved { x, attended, inner })
    }
}

impl<T> Inner<T> {
    fn map<U>(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<Inner<U>> {
        Ok(Inner {
            projected: self.projected.map(f)?,
            self_output: f(self.self_output)?,
            cross_projected: self.cross_projected.map(f)?,
            cross_attended: self.cross_attended.map(f)?,
            cross_output: f(self.cross_output)?,
        })
    }
}

impl Block {
    /// Loads the block whose tensors' names begin with `id`: its linear layers stored as `frozen` says, norms and modulation in
    /// f32.
    pub fn load(
        weights: &Weights,
        config: &DitConfig,
        id: LayerId,
        frozen: Frozen,
        device: &Device,
    ) -> Result<Self> {
        let read = Reader::block(weights, id, frozen, device);
        Ok(Self {
            id,
            modulation: read.tensor("modulation", "")?,
            self_attention: SelfAttention(Projections::load(&read, "self_attn", config)?),
            norm3_weight: read.tensor("norm3", ".weight")?,
            norm3_bias: read.tensor("norm3", ".bias")?,
            cross_attention: CrossAttention::load(&read, config)?,
            ffn: FeedForward::load(&read)?,
            dtype: frozen.compute,
            eps: config.eps,
        })
    }

    /// Which layer of its model it is.
    pub fn id(&self) -> LayerId {
        self.id
    }

    /// Reloads from `weights` the tensors that `changed` has patches for.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn reload(&mut self, weights: &Weights, changed: &Weights, frozen: Frozen) -> Result<()> {
        let id = self.id;
        let name = |part: &str| format!("{id}.{part}");
        weights.reload(&name("modulation"), changed, &mut self.modulation)?;
        weights.reload(&name("norm3.weight"), changed, &mut self.norm3_weight)?;
        weights.reload(&name("norm3.bias"), changed, &mut self.norm3_bias)?;
        self.self_attention.0.reload(weights, changed, &name("self_attn"), frozen)?;
        self.cross_attention.reload(weights, changed, &name("cross_attn"), frozen)?;
        self.ffn.reload(weights, changed, frozen)
    }

    /// `x` [b, l, d] -> [b, l, d], and what [`Block::backward`] needs.
    pub fn forward(&self, x: Tensor, context: &Context, pass: &Pass, keep: Keep) -> Result<(Tensor, Saved)> {
        let m = self.modulation(context)?;
        let (attended, inner) = self.attend(&x, None, &m, context, pass)?;
        let after_cross = Stream::from(&x).gated(&inner.self_output, &m.gate_self).plus(&inner.cross_output);
        let saved = Saved {
            x,
            attended: (keep != Keep::Input).then_some(attended),
            inner: (keep == Keep::All).then_some(inner),
        };
        Ok((self.feed_forward(&after_cross, &m.ffn, pass)?, saved))
    }

    /// The gradient of the input of [`Block::forward`], in the dtype of `dy` [b, l, d], which is overwritten and must not be
    /// shared.
    ///
    /// Saved activations are dropped as soon as they are no longer needed.
    pub fn backward(
        &self,
        saved: Saved,
        dy: Tensor,
        context: &Context,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let m = self.modulation(context)?;
        let x = saved.x;
        let (attended, inner) = match (saved.attended, saved.inner) {
            (Some(attended), Some(inner)) => (attended, inner),
            (attended, _) => self.attend(&x, attended, &m, context, pass)?,
        };
        let Inner { projected, self_output, cross_projected, cross_attended, cross_output } = inner;
        let after_self = Stream::from(&x).gated(&self_output, &m.gate_self);
        let after_cross = after_self.clone().plus(&cross_output);
        let past = self.feed_forward_backward(&after_cross, dy, &m.ffn, pass, gradients)?;
        drop((self_output, cross_output, after_cross));

        let d_attended = past.to_dtype(self.dtype)?;
        let cross = &self.cross_attention;
        let dq =
            cross.attend_backward(cross_projected, cross_attended, d_attended, context, pass, gradients)?;
        let d_in = cross.project_backward(&self.cross_in(&after_self)?, &dq, pass, gradients)?;
        let dx = norm::affine_layer_norm_backward(&after_self, &d_in, &self.norm3_weight, self.eps, &past)?;
        drop((after_self, past, dq, d_in));

        let d_attended = residual::backward(&dx, &m.gate_self, self.dtype)?;
        let own = &self.self_attention;
        let d = own.attend_backward(projected, attended, d_attended, context, pass, gradients)?;
        let d_in = own.project_backward(&self.self_in(&x, &m)?, d, pass, gradients)?;
        Ok(norm::modulated_layer_norm_backward(&x, &d_in, &m.scale_self, self.eps, &dx)?)
    }

    /// The outputs of both attentions of the stream `x`; the self-attention itself is computed only if its output is not
    /// `known`.
    fn attend(
        &self,
        x: &Tensor,
        known: Option<Attended>,
        m: &Modulation,
        context: &Context,
        pass: &Pass,
    ) -> Result<(Attended, Inner)> {
        let projected = self.self_attention.project(&self.self_in(x, m)?, pass)?;
        let attended = match known {
            Some(attended) => attended,
            None => self.self_attention.attend(&projected, context)?,
        };
        let self_output = self.self_attention.0.output(&attended.o, pass)?;

        let after_self = Stream::from(x).gated(&self_output, &m.gate_self);
        let cross_projected = self.cross_attention.project(&self.cross_in(&after_self)?, context, pass)?;
        let cross_attended = self.cross_attention.attend(&cross_projected)?;
        let cross_output = self.cross_attention.output(&cross_attended, pass)?;
        Ok((attended, Inner { projected, self_output, cross_projected, cross_attended, cross_output }))
    }

    /// The input of the self-attention: the modulated norm of the stream.
    fn self_in(&self, x: &Tensor, m: &Modulation) -> Result<Tensor> {
        Ok(norm::modulated_layer_norm(x, &m.shift_self, &m.scale_self, self.eps, self.dtype)?)
    }

    /// The input of the cross-attention: the norm of the stream after the self-attention.
    fn cross_in(&self, after_self: &Stream) -> Result<Tensor> {
        let (weight, bias) = (&self.norm3_weight, &self.norm3_bias);
        Ok(norm::affine_layer_norm(after_self, weight, bias, self.eps, self.dtype)?)
    }

    /// The stream after the feed-forward part, from the one before it.
    fn feed_forward(&self, x: &Stream, m: &FfnModulation, pass: &Pass) -> Result<Tensor> {
        let (ffn, y) = (self.ffn.decoded()?, unwritten(x.first())?);
        for chunk in chunks_of(&y, m, pass)? {
            let (x, m, to) = (chunk.of_stream(x)?, chunk.of_rows(m)?, chunk.destination(&y));
            let ffn_in = norm::modulated_layer_norm(&x, &m.shift, &m.scale, self.eps, self.dtype)?;
            let fed = ffn.forward(&ffn_in, &pass.starting_at(chunk.tokens.start))?;
            residual::forward_at(to, &x, &fed, &m.gate)?;
        }
        Ok(y)
    }

    /// The gradient of the stream `x` before the feed-forward part, from the one after it, in whose memory it is written: at
    /// video lengths one more stream would not fit.
    fn feed_forward_backward(
        &self,
        x: &Stream,
        dy: Tensor,
        m: &FfnModulation,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let ffn = self.ffn.decoded()?;
        for chunk in chunks_of(&dy, m, pass)? {
            let (x, m, to) = (chunk.of_stream(x)?, chunk.of_rows(m)?, chunk.destination(&dy));
            let (dy, pass) = (chunk.of_tensor(&dy)?, &pass.starting_at(chunk.tokens.start));
            let ffn_in = norm::modulated_layer_norm(&x, &m.shift, &m.scale, self.eps, self.dtype)?;
            let d_fed = residual::backward(&dy, &m.gate, self.dtype)?;
            let d_in = ffn.backward(&ffn_in, &d_fed, pass, gradients)?;
            norm::modulated_layer_norm_backward_at(to, &x, &d_in, &m.scale, self.eps, &dy)?;
        }
        Ok(dy)
    }

    /// The linear layers, in the order of the forward.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        let own = self.self_attention.0.linears().into_iter();
        own.chain(self.cross_attention.linears()).chain(self.ffn.linears())
    }

    /// The matrices of [`Self::linears`]: nearly all of the block's bytes.
    pub fn matrices_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        let own = self.self_attention.0.linears_mut().into_iter();
        let all = own.chain(self.cross_attention.linears_mut()).chain(self.ffn.linears_mut());
        all.map(|linear| linear.weight_mut().stored_mut())
    }

    /// Every tensor of the block.
    pub fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let Self { modulation, self_attention, norm3_weight, norm3_bias, cross_attention, ffn, .. } = self;
        let linears = ffn.linears_mut().into_iter().flat_map(Linear::tensors_mut);
        let own = [modulation, norm3_weight, norm3_bias].into_iter().chain(linears);
        own.chain(self_attention.0.tensors_mut()).chain(cross_attention.tensors_mut()).collect()
    }

    /// The block's own modulation plus the projected time embedding, in its six rows.
    fn modulation(&self, context: &Context) -> Result<Modulation> {
        let rows = context.cond.require(Role::MODULATION)?.broadcast_add(&self.modulation.unsqueeze(1)?)?;
        let row = |i: usize| rows.narrow(2, i, 1)?.contiguous();
        Ok(Modulation {
            shift_self: row(0)?,
            scale_self: row(1)?,
            gate_self: row(2)?,
            ffn: FfnModulation { shift: row(3)?, scale: row(4)?, gate: row(5)? },
        })
    }
}

/// The chunks of tokens that go through the feed-forward part together.
fn chunks_of(stream: &Tensor, m: &FfnModulation, pass: &Pass) -> Result<Vec<Chunk>> {
    Ok(chunks(stream.dim(1)?, m.gate.dim(1)?, pass.ffn_tokens))
}

impl Chunk {
    fn destination<'a>(&self, whole: &'a Tensor) -> Destination<'a> {
        Destination { whole, start: self.tokens.start }
    }

    fn of_tensor(&self, x: &Tensor) -> Result<Tensor> {
        Ok(run(x, &self.tokens)?)
    }

    fn of_stream(&self, x: &Stream) -> Result<Stream> {
        Ok(x.part(&self.tokens, &self.groups)?)
    }

    fn of_rows(&self, m: &FfnModulation) -> Result<FfnModulation> {
        let of = |rows: &Tensor| run(rows, &self.groups);
        Ok(FfnModulation { shift: of(&m.shift)?, scale: of(&m.scale)?, gate: of(&m.gate)? })
    }
}
