//! A face block: the tokens of each latent frame attend to the face tokens of that frame, and the result is added to them.
//!
//! x += linear2(Attn(q, k, v)) with q = RMS(linear1_q(LN(x))), (k, v) = linear1_kv(LN(face tokens)), k normalised like q. Norms
//! of queries and keys are over single heads; there are no positions and no gate. Source: Wan-Video/Wan2.2
//! wan/modules/animate/face_blocks.py `FaceBlock`.

use kernels::{DType, Device, Tensor, attention, norm};

use super::super::base::Base;
use super::super::causal::{no_modulation, plain_norm};
use super::super::config::DitConfig;
use super::super::frame_attention::{FrameAttention, FrameKeys, NormOver};
use super::super::input::Context;
use super::super::layer::{Layer, Saved};
use super::super::layer_id::LayerId;
use super::super::linear::{Linear, backward_adapters};
use super::super::pass::{Gradients, Pass};
use super::super::plan::Keep;
use super::super::streams::Streams;
use super::FACES;
use crate::weights::{Frozen, Weights};
use crate::{Error, Result};

/// The epsilon of its norms.
const EPS: f64 = 1e-6;

/// A frozen face block.
#[derive(Debug, Clone)]
pub struct FaceBlock {
    id: LayerId,
    q: Linear,
    kv: Linear,
    out: Linear,
    attention: FrameAttention,
}

/// What the products and the attention of a forward gave: queries before their norm [b, l, d], the attention's output, frames in
/// the batch, and its log-sum-exp.
struct Inner {
    q: Tensor,
    out: attention::Output,
}

/// The face tokens of all frames behind their norm, [b, 5 t, d], and what they are as keys and values.
struct Faces {
    normed: Tensor,
    keys: FrameKeys,
}

impl FaceBlock {
    /// Loads the face block `id`.
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
            q: linear("linear1_q")?,
            kv: linear("linear1_kv")?,
            out: linear("linear2")?,
            attention: FrameAttention {
                norm_q: gain("q_norm")?,
                norm_k: gain("k_norm")?,
                heads: config.heads,
                over: NormOver::Head,
                eps: EPS,
            },
        })
    }

    fn faces(&self, context: &Context, pass: &Pass) -> Result<Faces> {
        let (batch, frames, tokens, width) = context.cond.require(FACES)?.dims4()?;
        if context.exchange.is_some() {
            return Err(Error::Mismatch("the tokens of a face block are not dealt out to devices".into()));
        }
        let rows = context.cond.require(FACES)?.reshape((batch, frames * tokens, width))?;
        let normed = plain_norm(&rows, EPS, self.kv.weight().dtype())?;
        let kv = self.kv.forward(&normed, pass)?;
        let half = |start: usize| kv.narrow(2, start, width)?.contiguous();
        Ok(Faces { keys: FrameKeys { k: half(0)?, v: half(width)?, frames }, normed })
    }

    fn attend(&self, x: &Tensor, faces: &Faces, pass: &Pass) -> Result<Inner> {
        let q = self.q.forward(&plain_norm(x, EPS, self.q.weight().dtype())?, pass)?;
        let out = self.attention.forward(&q, &faces.keys)?;
        Ok(Inner { q, out })
    }
}

impl Layer for FaceBlock {
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
        let Inner { q, out } = self.attend(&x, &self.faces(context, pass)?, pass)?;
        let added = self.out.forward(&FrameAttention::joined(&out, &x)?, pass)?;
        streams.main = (&x + added.to_dtype(x.dtype())?)?;
        let tensors = match keep {
            Keep::Input => vec![x],
            Keep::Attention | Keep::All => vec![x, q, out.o, out.lse],
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
        let x = tensors.next().ok_or_else(missing)?;
        let faces = self.faces(context, pass)?;
        let Inner { q, out } = match (tensors.next(), tensors.next(), tensors.next()) {
            (Some(q), Some(o), Some(lse)) => Inner { q, out: attention::Output { o, lse } },
            _ => self.attend(&x, &faces, pass)?,
        };
        let d_out = d_streams.main.to_dtype(self.out.weight().dtype())?;
        let d_o = self.out.backward(&FrameAttention::joined(&out, &x)?, &d_out, pass, gradients)?;
        drop(d_out);
        let [dq, dk, dv] = self.attention.backward(&q, &faces.keys, out, d_o)?;
        let d_kv = Tensor::cat(&[dk, dv], 2)?;
        // Faces are frozen: only adapters get a gradient.
        backward_adapters([&self.kv], &faces.normed, &[d_kv], pass, gradients)?;
        let d_in = self.q.backward(&plain_norm(&x, EPS, q.dtype())?, &dq, pass, gradients)?;
        let onto = d_streams.main;
        d_streams.main = norm::modulated_layer_norm_backward(&x, &d_in, &no_modulation(&x)?, EPS, &onto)?;
        Ok(d_streams)
    }

    fn linears(&self) -> Vec<&Linear> {
        vec![&self.q, &self.kv, &self.out]
    }

    fn matrices_mut(&mut self) -> Vec<&mut Tensor> {
        let Self { q, kv, out, .. } = self;
        [q, kv, out].into_iter().map(|linear| linear.weight_mut().stored_mut()).collect()
    }

    fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let Self { q, kv, out, attention: FrameAttention { norm_q, norm_k, .. }, .. } = self;
        let linears = [q, kv, out].into_iter().flat_map(Linear::tensors_mut);
        linears.chain([norm_q, norm_k]).collect()
    }

    fn share(&self) -> Box<dyn Layer> {
        Box::new(self.clone())
    }

    fn reload(&mut self, weights: &Weights, changed: &Weights, frozen: Frozen) -> Result<()> {
        for linear in [&mut self.q, &mut self.kv, &mut self.out] {
            linear.reload(weights, changed, frozen)?;
        }
        for (name, gain) in [("q_norm", &mut self.attention.norm_q), ("k_norm", &mut self.attention.norm_k)] {
            weights.reload(&format!("{}.{name}.weight", self.id), changed, gain)?;
        }
        Ok(())
    }
}
