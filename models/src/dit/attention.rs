//! What both attentions of a block share, and the self-attention with its forward and its backward.
//!
//! Both run in three parts, so that a block can keep what is expensive and recompute the rest: project (products), attend,
//! and the output product. Norms and positions are between the first two and are never kept.

use kernels::{Tensor, attention, norm_rope};

use super::config::DitConfig;
use super::input::Context;
use super::linear::{Linear, backward_all, forward_all};
use super::pass::{Gradients, Pass};
use super::reader::Reader;
use crate::weights::{Frozen, Weights};
use crate::{Error, Result};

/// The projections and norms of an attention.
#[derive(Debug, Clone)]
pub struct Projections {
    pub(super) q: Linear,
    pub(super) k: Linear,
    pub(super) v: Linear,
    o: Linear,
    pub(super) norm_q: Tensor,
    pub(super) norm_k: Tensor,
    heads: usize,
    pub(super) eps: f64,
}

/// The outputs of the projections, or their gradients: [b, l, d] each, before norms and positions.
#[derive(Debug, Clone)]
pub struct Projected<T = Tensor> {
    /// Queries.
    pub q: T,
    /// Keys.
    pub k: T,
    /// Values.
    pub v: T,
}

/// The output of an attention.
#[derive(Debug, Clone)]
pub struct Attended<T = Tensor> {
    /// Output of the heads, [b, l, n, h].
    pub o: T,
    /// Log-sum-exp of each row of scores, [b, n, l, 1] f32.
    pub lse: T,
}

impl<T> Projected<T> {
    /// The same structure with every value mapped by `f`.
    pub fn map<U>(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<Projected<U>> {
        Ok(Projected { q: f(self.q)?, k: f(self.k)?, v: f(self.v)? })
    }
}

impl<T> Attended<T> {
    /// The same structure with every value mapped by `f`.
    pub fn map<U>(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<Attended<U>> {
        Ok(Attended { o: f(self.o)?, lse: f(self.lse)? })
    }
}

impl Projections {
    /// Loads the attention `name` of a block.
    pub fn load(read: &Reader, name: &str, config: &DitConfig) -> Result<Self> {
        let linear = |part: &str| read.linear(&format!("{name}.{part}"));
        let gain = |part: &str| read.tensor(&format!("{name}.{part}"), ".weight");
        Ok(Self {
            q: linear("q")?,
            k: linear("k")?,
            v: linear("v")?,
            o: linear("o")?,
            norm_q: gain("norm_q")?,
            norm_k: gain("norm_k")?,
            heads: config.heads,
            eps: config.eps,
        })
    }

    /// Every tensor of the attention.
    pub(super) fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let Self { q, k, v, o, norm_q, norm_k, .. } = self;
        let linears = [q, k, v, o].into_iter().flat_map(Linear::tensors_mut);
        linears.chain([norm_q, norm_k]).collect()
    }

    /// Reloads from `weights` the tensors that `changed` has patches for.
    pub(super) fn reload(
        &mut self,
        weights: &Weights,
        changed: &Weights,
        prefix: &str,
        frozen: Frozen,
    ) -> Result<()> {
        for linear in [&mut self.q, &mut self.k, &mut self.v, &mut self.o] {
            linear.reload(weights, changed, frozen)?;
        }
        for (name, gain) in [("norm_q", &mut self.norm_q), ("norm_k", &mut self.norm_k)] {
            weights.reload(&format!("{prefix}.{name}.weight"), changed, gain)?;
        }
        Ok(())
    }

    /// The output projection of the attention's output [b, l, n, h]: [b, l, d].
    pub fn output(&self, o_blnh: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.o.forward(&joined(o_blnh)?, pass)
    }

    /// The gradient of the attention's output [b, l, n, h], through the output projection.
    pub(super) fn output_backward(
        &self,
        o_blnh: &Tensor,
        dy: Tensor,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        self.split(&self.o.backward(&joined(o_blnh)?, &dy, pass, gradients)?)
    }

    /// q, k, v, o.
    pub fn linears(&self) -> [&Linear; 4] {
        [&self.q, &self.k, &self.v, &self.o]
    }

    /// [`Self::linears`], to change.
    pub(super) fn linears_mut(&mut self) -> [&mut Linear; 4] {
        [&mut self.q, &mut self.k, &mut self.v, &mut self.o]
    }

    /// [b, l, d] -> [b, l, n, h].
    pub(super) fn split(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, width) = x.dims3()?;
        Ok(x.reshape((batch, tokens, self.heads, width / self.heads))?)
    }
}

/// [b, l, n, h] -> [b, l, d].
pub(super) fn joined(x: &Tensor) -> Result<Tensor> {
    Ok(x.flatten_from(2)?)
}

/// Attention of the tokens over themselves, with rotary positions.
#[derive(Debug, Clone)]
pub struct SelfAttention(pub Projections);

impl SelfAttention {
    /// Queries, keys and values of `x` [b, l, d].
    pub fn project(&self, x: &Tensor, pass: &Pass) -> Result<Projected> {
        let [q, k, v] = forward_all([&self.0.q, &self.0.k, &self.0.v], x, pass)?;
        Ok(Projected { q, k, v })
    }

    /// The attention itself.
    pub fn attend(&self, projected: &Projected, context: &Context) -> Result<Attended> {
        let [q, k] = self.queries_and_keys(projected, context)?;
        let v = self.0.split(&projected.v)?;
        let Some(exchange) = &context.exchange else {
            let attention::Output { o, lse } = attention::forward(&q, &k, &v)?;
            return Ok(Attended { o, lse });
        };
        let [q, k, v] = [q, k, v].map(|own| exchange.to_heads(&own));
        let attention::Output { o, lse } = attention::forward(&q?, &k?, &v?)?;
        Ok(Attended { o: exchange.to_tokens(&o)?, lse })
    }

    /// The gradients of the projections, from the gradient `dy` [b, l, d] of [`Projections::output`].
    pub fn attend_backward(
        &self,
        projected: Projected,
        attended: Attended,
        dy: Tensor,
        context: &Context,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<Projected> {
        if context.exchange.is_some() {
            return Err(Error::Mismatch("there is no backward where devices share tokens".into()));
        }
        let p = &self.0;
        let d_out = p.output_backward(&attended.o, dy, pass, gradients)?;
        let [q, k] = self.queries_and_keys(&projected, context)?;
        let out = attention::Output { o: attended.o, lse: attended.lse };
        let d = attention::backward(&q, &k, &p.split(&projected.v)?, &out, &d_out)?;
        drop((q, k, out, d_out));
        let (cos, sin) = (&context.positions.cos_lp, &context.positions.sin_lp);
        Ok(Projected {
            q: norm_rope::backward(&projected.q, &d.dq, &p.norm_q, cos, sin, p.eps)?,
            k: norm_rope::backward(&projected.k, &d.dk, &p.norm_k, cos, sin, p.eps)?,
            v: joined(&d.dv)?,
        })
    }

    /// The gradient of `x`, the input of [`SelfAttention::project`].
    pub fn project_backward(
        &self,
        x: &Tensor,
        d: Projected,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let p = &self.0;
        backward_all([&p.q, &p.k, &p.v], x, &[d.q, d.k, d.v], pass, gradients)
    }

    fn queries_and_keys(&self, projected: &Projected, context: &Context) -> Result<[Tensor; 2]> {
        let p = &self.0;
        let (cos, sin) = (&context.positions.cos_lp, &context.positions.sin_lp);
        let turned = |x: &Tensor, gain: &Tensor| norm_rope::forward(x, gain, cos, sin, p.heads, p.eps);
        Ok([turned(&projected.q, &p.norm_q)?, turned(&projected.k, &p.norm_k)?])
    }
}
