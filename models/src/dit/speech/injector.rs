//! An injection of audio: the tokens of each latent frame of the clip attend to the audio tokens of that frame.
//!
//! x += o(Attn(RMS(q(u)), RMS(k(a)), v(a))) with u the LayerNorm of x, shifted and scaled by the frame's audio; the tokens behind
//! the clip's are unchanged. Source: Wan-Video/Wan2.2 wan/modules/s2v/model_s2v.py `after_transformer_block`.

use kernels::{DType, Device, Tensor, attention, norm};

use super::super::base::Base;
use super::super::config::{DitConfig, PATCH};
use super::super::frame_attention::{FrameAttention, FrameKeys, NormOver};
use super::super::input::Context;
use super::super::layer::{Layer, Saved};
use super::super::layer_id::LayerId;
use super::super::linear::{Linear, backward_adapters, forward_all};
use super::super::pass::{Gradients, Pass};
use super::super::plan::Keep;
use super::super::streams::Streams;
use super::{AUDIO, INJECTED};
use crate::weights::{Frozen, Weights};
use crate::{Error, Result};

/// The epsilon of its norm; those of queries and keys have the model's.
const EPS: f64 = 1e-5;

/// A frozen injection.
#[derive(Debug, Clone)]
pub struct Injector {
    id: LayerId,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    attention: FrameAttention,
}

/// Queries before their norm [b, l, d], and the attention's output, frames in the batch.
struct Inner {
    q: Tensor,
    out: attention::Output,
}

/// Audio tokens of all frames [b, 5 t, d], what they are as keys and values, and shift and scale [b, t, 1, d].
struct Audio {
    tokens: Tensor,
    keys: FrameKeys,
    shift: Tensor,
    scale: Tensor,
}

impl Injector {
    /// Loads the injection `id`.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn load(
        weights: &Weights,
        config: &DitConfig,
        id: LayerId,
        base: Base,
        device: &Device,
    ) -> Result<Self> {
        let linear = |name: &str| Linear::load(weights, format!("{id}.{name}"), base.frozen, device);
        let gain = |name: &str| weights.tensor(&format!("{id}.{name}.weight"), DType::F32, device);
        Ok(Self {
            id,
            q: linear("q")?,
            k: linear("k")?,
            v: linear("v")?,
            o: linear("o")?,
            attention: FrameAttention {
                norm_q: gain("norm_q")?,
                norm_k: gain("norm_k")?,
                heads: config.heads,
                over: NormOver::Width,
                eps: config.eps,
            },
        })
    }

    fn audio(&self, context: &Context, pass: &Pass) -> Result<Audio> {
        if context.exchange.is_some() {
            return Err(Error::Mismatch(
                "the tokens of an audio injection are not dealt out to devices".into(),
            ));
        }
        let (batch, frames, count, width) = context.cond.require(AUDIO)?.dims4()?;
        let tokens = context.cond.require(AUDIO)?.reshape((batch, frames * count, width))?;
        let [k, v] = forward_all([&self.k, &self.v], &tokens, pass)?;
        let own = context.cond.require(INJECTED)?.narrow(1, self.id.index(), 1)?.squeeze(1)?.unsqueeze(2)?;
        let half = |start: usize| own.narrow(3, start, width)?.contiguous();
        Ok(Audio { tokens, keys: FrameKeys { k, v, frames }, shift: half(0)?, scale: half(width)? })
    }

    fn norm(&self, clip: &Tensor, audio: &Audio) -> Result<Tensor> {
        let dtype = self.q.weight().dtype();
        Ok(norm::modulated_layer_norm(clip, &audio.shift, &audio.scale, EPS, dtype)?)
    }

    fn attend(&self, clip: &Tensor, audio: &Audio, pass: &Pass) -> Result<Inner> {
        let q = self.q.forward(&self.norm(clip, audio)?, pass)?;
        let out = self.attention.forward(&q, &audio.keys)?;
        Ok(Inner { q, out })
    }
}

/// The tokens of the clip of `x` [b, l, d], and those behind, if there are any.
fn apart(x: &Tensor, context: &Context) -> Result<(Tensor, Option<Tensor>)> {
    let (frames, height, width) = context.positions.grid;
    let (count, all) = (frames * (height / PATCH) * (width / PATCH), x.dim(1)?);
    match all - count {
        0 => Ok((x.clone(), None)),
        rest => Ok((x.narrow(1, 0, count)?.contiguous()?, Some(x.narrow(1, count, rest)?.contiguous()?))),
    }
}

/// The inverse of [`apart`].
fn together(clip: Tensor, rest: Option<Tensor>) -> Result<Tensor> {
    match rest {
        Some(rest) => Ok(Tensor::cat(&[clip, rest], 1)?),
        None => Ok(clip),
    }
}

impl Layer for Injector {
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
        let (clip, rest) = apart(&streams.main, context)?;
        let Inner { q, out } = self.attend(&clip, &self.audio(context, pass)?, pass)?;
        let added = self.o.forward(&FrameAttention::joined(&out, &clip)?, pass)?;
        streams.main = together((&clip + added.to_dtype(clip.dtype())?)?, rest)?;
        let tensors = match keep {
            Keep::Input => vec![clip],
            Keep::Attention | Keep::All => vec![clip, q, out.o, out.lse],
        };
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
        let missing = || Error::Mismatch(format!("a backward of {} got nothing of its forward", self.id));
        let clip = tensors.next().ok_or_else(missing)?;
        let audio = self.audio(context, pass)?;
        let Inner { q, out } = match (tensors.next(), tensors.next(), tensors.next()) {
            (Some(q), Some(o), Some(lse)) => Inner { q, out: attention::Output { o, lse } },
            _ => self.attend(&clip, &audio, pass)?,
        };
        let (d_clip, d_rest) = apart(&d_streams.main, context)?;
        let d_out = d_clip.to_dtype(self.o.weight().dtype())?;
        let d_o = self.o.backward(&FrameAttention::joined(&out, &clip)?, &d_out, pass, gradients)?;
        drop(d_out);
        let [dq, dk, dv] = self.attention.backward(&q, &audio.keys, out, d_o)?;
        // Audio is frozen: only adapters get a gradient.
        backward_adapters([&self.k, &self.v], &audio.tokens, &[dk, dv], pass, gradients)?;
        let d_in = self.q.backward(&self.norm(&clip, &audio)?, &dq, pass, gradients)?;
        let d_clip = norm::modulated_layer_norm_backward(&clip, &d_in, &audio.scale, EPS, &d_clip)?;
        d_streams.main = together(d_clip, d_rest)?;
        Ok(d_streams)
    }

    fn linears(&self) -> Vec<&Linear> {
        vec![&self.q, &self.k, &self.v, &self.o]
    }

    fn matrices_mut(&mut self) -> Vec<&mut Tensor> {
        let Self { q, k, v, o, .. } = self;
        [q, k, v, o].into_iter().map(|linear| linear.weight_mut().stored_mut()).collect()
    }

    fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let Self { q, k, v, o, attention: FrameAttention { norm_q, norm_k, .. }, .. } = self;
        let linears = [q, k, v, o].into_iter().flat_map(Linear::tensors_mut);
        linears.chain([norm_q, norm_k]).collect()
    }

    fn share(&self) -> Box<dyn Layer> {
        Box::new(self.clone())
    }

    fn reload(&mut self, weights: &Weights, changed: &Weights, frozen: Frozen) -> Result<()> {
        for linear in [&mut self.q, &mut self.k, &mut self.v, &mut self.o] {
            linear.reload(weights, changed, frozen)?;
        }
        for (name, gain) in [("norm_q", &mut self.attention.norm_q), ("norm_k", &mut self.attention.norm_k)] {
            weights.reload(&format!("{}.{name}.weight", self.id), changed, gain)?;
        }
        Ok(())
    }
}
