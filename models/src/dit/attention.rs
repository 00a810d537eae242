//! The two attentions of a block, each with its forward and its backward.

use candle_core::{DType, Device, Tensor};
use kernels::{attention, norm, norm_rope};

use super::linear::Linear;
use super::pass::{Conditioning, Gradients, Pass};
use crate::Result;
use crate::weights::Weights;

/// The projections and norms that both attentions have.
#[derive(Debug)]
pub struct Projections {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    norm_q: Tensor,
    norm_k: Tensor,
    heads: usize,
    eps: f64,
}

/// What the backward of an attention reuses of its forward. Heads are split: [b, l, n, h].
#[derive(Debug)]
pub struct Saved {
    q_raw: Tensor,
    k_raw: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: attention::Output,
}

impl Projections {
    /// Reads `<prefix>.q` and its fellows.
    pub fn load(
        weights: &Weights,
        prefix: &str,
        heads: usize,
        eps: f64,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let linear = |name: &str| Linear::load(weights, format!("{prefix}.{name}"), dtype, device);
        let gain = |name: &str| weights.tensor(&format!("{prefix}.{name}.weight"), DType::F32, device);
        Ok(Self {
            q: linear("q")?,
            k: linear("k")?,
            v: linear("v")?,
            o: linear("o")?,
            norm_q: gain("norm_q")?,
            norm_k: gain("norm_k")?,
            heads,
            eps,
        })
    }

    /// [b, l, d] -> [b, l, n, h].
    fn split(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, width) = x.dims3()?;
        Ok(x.reshape((batch, tokens, self.heads, width / self.heads))?)
    }

    /// [b, l, n, h] -> [b, l, d].
    fn join(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, heads, size) = x.dims4()?;
        Ok(x.reshape((batch, tokens, heads * size))?)
    }

    /// o(attention) of the split heads, with all that the backward reuses.
    fn attend(
        &self,
        [q_raw, k_raw]: [Tensor; 2],
        [q, k, v]: [Tensor; 3],
        pass: &Pass,
    ) -> Result<(Tensor, Saved)> {
        let out = attention::forward(&q, &k, &v)?;
        let y = self.o.forward(&self.join(&out.o)?, pass)?;
        Ok((y, Saved { q_raw, k_raw, q, k, v, out }))
    }

    /// The gradients of q, k, v, through `o` and the attention.
    fn attend_backward(
        &self,
        saved: &Saved,
        dy: &Tensor,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<attention::Gradients> {
        let d_out = self.o.backward(&self.join(&saved.out.o)?, dy, pass, gradients)?;
        Ok(attention::backward(&saved.q, &saved.k, &saved.v, &saved.out, &self.split(&d_out)?)?)
    }
}

/// Attention of the tokens over themselves, with rotary positions.
#[derive(Debug)]
pub struct SelfAttention(pub Projections);

impl SelfAttention {
    /// `x` [b, l, d] -> [b, l, d].
    pub fn forward(&self, x: &Tensor, cond: &Conditioning, pass: &Pass) -> Result<(Tensor, Saved)> {
        let p = &self.0;
        let (q_raw, k_raw) = (p.q.forward(x, pass)?, p.k.forward(x, pass)?);
        let v = p.split(&p.v.forward(x, pass)?)?;
        let q = norm_rope::forward(&q_raw, &p.norm_q, &cond.cos_lp, &cond.sin_lp, p.heads, p.eps)?;
        let k = norm_rope::forward(&k_raw, &p.norm_k, &cond.cos_lp, &cond.sin_lp, p.heads, p.eps)?;
        p.attend([q_raw, k_raw], [q, k, v], pass)
    }

    /// The gradient of `x`, which the forward saw.
    pub fn backward(
        &self,
        x: &Tensor,
        saved: &Saved,
        dy: &Tensor,
        cond: &Conditioning,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let p = &self.0;
        let d = p.attend_backward(saved, dy, pass, gradients)?;
        let dq = norm_rope::backward(&saved.q_raw, &d.dq, &p.norm_q, &cond.cos_lp, &cond.sin_lp, p.eps)?;
        let dk = norm_rope::backward(&saved.k_raw, &d.dk, &p.norm_k, &cond.cos_lp, &cond.sin_lp, p.eps)?;
        let dx = p.q.backward(x, &dq, pass, gradients)?;
        let dx = (dx + p.k.backward(x, &dk, pass, gradients)?)?;
        Ok((dx + p.v.backward(x, &p.join(&d.dv)?, pass, gradients)?)?)
    }
}

/// Attention of the tokens over the text: no positions, no mask (padding rows are attended to, as in the original).
#[derive(Debug)]
pub struct CrossAttention(pub Projections);

impl CrossAttention {
    /// `x` [b, l, d] -> [b, l, d].
    pub fn forward(&self, x: &Tensor, cond: &Conditioning, pass: &Pass) -> Result<(Tensor, Saved)> {
        let p = &self.0;
        let text = &cond.text_bsd;
        let (q_raw, k_raw) = (p.q.forward(x, pass)?, p.k.forward(text, pass)?);
        let v = p.split(&p.v.forward(text, pass)?)?;
        let q = p.split(&norm::rms_norm(&q_raw, &p.norm_q, p.eps, v.dtype())?)?;
        let k = p.split(&norm::rms_norm(&k_raw, &p.norm_k, p.eps, v.dtype())?)?;
        p.attend([q_raw, k_raw], [q, k, v], pass)
    }

    /// The gradient of `x`; the text is frozen, so its projections pass gradients to their adapters only.
    pub fn backward(
        &self,
        x: &Tensor,
        saved: &Saved,
        dy: &Tensor,
        cond: &Conditioning,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let p = &self.0;
        let d = p.attend_backward(saved, dy, pass, gradients)?;
        let dq = norm::rms_norm_backward(&saved.q_raw, &p.join(&d.dq)?, &p.norm_q, p.eps)?;
        let dk = norm::rms_norm_backward(&saved.k_raw, &p.join(&d.dk)?, &p.norm_k, p.eps)?;
        p.k.backward_adapters(&cond.text_bsd, &dk, pass, gradients)?;
        p.v.backward_adapters(&cond.text_bsd, &p.join(&d.dv)?, pass, gradients)?;
        p.q.backward(x, &dq, pass, gradients)
    }
}
