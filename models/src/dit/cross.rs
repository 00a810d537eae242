//! The cross-attention of a block: over the text, and in Wan 2.1's image-to-video models over a picture too.
//!
//! Both share the queries and each has a softmax of its own; their outputs are added before the output product.
//! Source: Wan-Video/Wan2.1 wan/modules/model.py `WanT2VCrossAttention`, `WanI2VCrossAttention`.

use kernels::{Tensor, attention, norm};

use super::attention::{Attended, Projected, Projections, joined};
use super::config::DitConfig;
use super::input::Context;
use super::linear::{Linear, backward_adapters, forward_all};
use super::pass::{Gradients, Pass};
use super::reader::Reader;
use super::role::Role;
use crate::Result;
use crate::weights::{Frozen, Weights};

/// Attention of the tokens over the text, and over a picture in models that see one: no positions, no mask
/// (padding rows are attended to, as in the original).
#[derive(Debug, Clone)]
pub struct CrossAttention {
    text: Projections,
    picture: Option<PictureProjections>,
}

/// Keys and values of the picture.
#[derive(Debug, Clone)]
struct PictureProjections {
    k: Linear,
    v: Linear,
    norm_k: Tensor,
}

/// The outputs of the projections, before norms.
#[derive(Debug, Clone)]
pub struct CrossProjected<T = Tensor> {
    /// Queries [b, l, d], keys and values of the text [b, s, d].
    pub text: Projected<T>,
    /// Keys and values of the picture, [b, s, d] each.
    pub picture: Option<(T, T)>,
}

/// The outputs of the attentions.
#[derive(Debug, Clone)]
pub struct CrossAttended<T = Tensor> {
    /// Over the text.
    pub text: Attended<T>,
    /// Over the picture.
    pub picture: Option<Attended<T>>,
}

impl<T> CrossProjected<T> {
    /// The same structure with every value mapped by `f`.
    pub fn map<U>(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<CrossProjected<U>> {
        let picture = match self.picture {
            Some((k, v)) => Some((f(k)?, f(v)?)),
            None => None,
        };
        Ok(CrossProjected { text: self.text.map(f)?, picture })
    }
}

impl<T> CrossAttended<T> {
    /// The same structure with every value mapped by `f`.
    pub fn map<U>(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<CrossAttended<U>> {
        let picture = self.picture.map(|picture| picture.map(f)).transpose()?;
        Ok(CrossAttended { text: self.text.map(f)?, picture })
    }
}

impl CrossAttended {
    /// The output of the heads, [b, l, n, h].
    fn o(&self) -> Result<Tensor> {
        match &self.picture {
            Some(picture) => Ok((&self.text.o + &picture.o)?),
            None => Ok(self.text.o.clone()),
        }
    }
}

impl CrossAttention {
    /// Loads the cross-attention of a block.
    pub fn load(read: &Reader, config: &DitConfig) -> Result<Self> {
        let text = Projections::load(read, "cross_attn", config)?;
        let picture = match config.image {
            Some(_) => Some(PictureProjections {
                k: read.linear("cross_attn.k_img")?,
                v: read.linear("cross_attn.v_img")?,
                norm_k: read.tensor("cross_attn.norm_k_img", ".weight")?,
            }),
            None => None,
        };
        Ok(Self { text, picture })
    }

    /// Reloads from `weights` the tensors that `changed` has patches for.
    pub(super) fn reload(
        &mut self,
        weights: &Weights,
        changed: &Weights,
        prefix: &str,
        frozen: Frozen,
    ) -> Result<()> {
        self.text.reload(weights, changed, prefix, frozen)?;
        if let Some(PictureProjections { k, v, norm_k }) = &mut self.picture {
            k.reload(weights, changed, frozen)?;
            v.reload(weights, changed, frozen)?;
            weights.reload(&format!("{prefix}.norm_k_img.weight"), changed, norm_k)?;
        }
        Ok(())
    }

    /// q, k, v, o; then the picture's k and v.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.text.linears().into_iter().chain(self.picture.iter().flat_map(|p| [&p.k, &p.v]))
    }

    /// [`Self::linears`], to change.
    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let of_picture = self.picture.iter_mut().flat_map(|p| [&mut p.k, &mut p.v]);
        self.text.linears_mut().into_iter().chain(of_picture)
    }

    /// Every tensor of it.
    pub(super) fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let of_picture = self.picture.iter_mut().flat_map(|PictureProjections { k, v, norm_k }| {
            [k, v].into_iter().flat_map(Linear::tensors_mut).chain([norm_k])
        });
        self.text.tensors_mut().into_iter().chain(of_picture).collect()
    }

    /// Queries of `x` [b, l, d], keys and values of text and picture.
    pub fn project(&self, x: &Tensor, context: &Context, pass: &Pass) -> Result<CrossProjected> {
        let p = &self.text;
        let [k, v] = forward_all([&p.k, &p.v], context.cond.require(Role::TEXT)?, pass)?;
        let picture = match &self.picture {
            Some(own) => {
                let [k, v] = forward_all([&own.k, &own.v], context.cond.require(Role::PICTURE)?, pass)?;
                Some((k, v))
            }
            None => None,
        };
        Ok(CrossProjected { text: Projected { q: p.q.forward(x, pass)?, k, v }, picture })
    }

    /// The attentions themselves.
    pub fn attend(&self, projected: &CrossProjected) -> Result<CrossAttended> {
        let q = self.queries(projected)?;
        let over = |k: Tensor, v: &Tensor| -> Result<Attended> {
            let attention::Output { o, lse } = attention::forward(&q, &k, &self.text.split(v)?)?;
            Ok(Attended { o, lse })
        };
        let text = over(self.normed(&projected.text.k, &self.text.norm_k)?, &projected.text.v)?;
        let picture = match (&self.picture, &projected.picture) {
            (Some(own), Some((k, v))) => Some(over(self.normed(k, &own.norm_k)?, v)?),
            _ => None,
        };
        Ok(CrossAttended { text, picture })
    }

    /// The output projection of the attentions: [b, l, d].
    pub fn output(&self, attended: &CrossAttended, pass: &Pass) -> Result<Tensor> {
        self.text.output(&attended.o()?, pass)
    }

    /// The gradient of the projected queries, from the gradient `dy` [b, l, d] of [`CrossAttention::output`].
    ///
    /// Text and picture are frozen, so their projections pass gradients to their adapters only.
    pub fn attend_backward(
        &self,
        projected: CrossProjected,
        attended: CrossAttended,
        dy: Tensor,
        context: &Context,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let p = &self.text;
        let d_out = p.output_backward(&attended.o()?, dy, pass, gradients)?;
        let q = self.queries(&projected)?;
        let over =
            |k: &Tensor, gain: &Tensor, v: &Tensor, attended: Attended| -> Result<(Tensor, [Tensor; 2])> {
                let out = attention::Output { o: attended.o, lse: attended.lse };
                let d = attention::backward(&q, &self.normed(k, gain)?, &p.split(v)?, &out, &d_out)?;
                let dk = norm::rms_norm_backward(k, &joined(&d.dk)?, gain, p.eps)?;
                Ok((joined(&d.dq)?, [dk, joined(&d.dv)?]))
            };
        let (mut dq, d_text) = over(&projected.text.k, &p.norm_k, &projected.text.v, attended.text)?;
        backward_adapters([&p.k, &p.v], context.cond.require(Role::TEXT)?, &d_text, pass, gradients)?;
        if let (Some(own), Some((k, v)), Some(attended)) =
            (&self.picture, &projected.picture, attended.picture)
        {
            let (past, d_picture) = over(k, &own.norm_k, v, attended)?;
            backward_adapters(
                [&own.k, &own.v],
                context.cond.require(Role::PICTURE)?,
                &d_picture,
                pass,
                gradients,
            )?;
            dq = (dq + past)?;
        }
        drop((q, d_out));
        Ok(norm::rms_norm_backward(&projected.text.q, &dq, &p.norm_q, p.eps)?)
    }

    /// The gradient of `x`, the input of [`CrossAttention::project`].
    pub fn project_backward(
        &self,
        x: &Tensor,
        dq: &Tensor,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        self.text.q.backward(x, dq, pass, gradients)
    }

    fn queries(&self, projected: &CrossProjected) -> Result<Tensor> {
        self.normed(&projected.text.q, &self.text.norm_q)
    }

    /// Normalised and split into heads, in its own dtype.
    fn normed(&self, x: &Tensor, gain: &Tensor) -> Result<Tensor> {
        self.text.split(&norm::rms_norm(x, gain, self.text.eps, x.dtype())?)
    }
}
