//! Attention of the tokens of each latent frame to a few tokens of that frame alone: what Animate's face blocks and S2V's audio injections
//! have in common.

use kernels::{Tensor, attention, norm};

use crate::{Error, Result};

/// What the norms of queries and keys are over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NormOver {
    /// Single heads.
    Head,
    /// The whole width.
    Width,
}

/// The norms of queries and keys, and how heads are cut.
#[derive(Debug, Clone)]
pub(super) struct FrameAttention {
    /// Gain of the queries' norm.
    pub norm_q: Tensor,
    /// Gain of the keys' norm.
    pub norm_k: Tensor,
    pub heads: usize,
    pub over: NormOver,
    pub eps: f64,
}

/// Keys and values [b, r t, d] before norms, r rows for each of `frames` latent frames.
pub(super) struct FrameKeys {
    pub k: Tensor,
    pub v: Tensor,
    pub frames: usize,
}

impl FrameAttention {
    /// Of queries [b, l, d] before their norm; frames are in the batch of what comes out.
    ///
    /// # Errors
    /// Queries that are no whole number for each frame.
    pub fn forward(&self, q: &Tensor, keys: &FrameKeys) -> Result<attention::Output> {
        let [queries, keys, values] = self.heads_of(q, keys)?;
        Ok(attention::forward(&queries, &keys, &values)?)
    }

    /// The gradients of queries, keys and values before norms, from that of what [`Self::forward`] gave joined, [b, l, d].
    ///
    /// # Errors
    /// As there.
    pub fn backward(
        &self,
        q: &Tensor,
        rows: &FrameKeys,
        out: attention::Output,
        d_o: Tensor,
    ) -> Result<[Tensor; 3]> {
        let [queries, keys, values] = self.heads_of(q, rows)?;
        let d_o = self.by_frame(&d_o, rows.frames)?;
        let d = attention::backward(&queries, &keys, &values, &out, &d_o)?;
        drop((queries, keys, values, out, d_o));
        let dk = self.norm_backward(&rows.k, &d.dk, &self.norm_k)?;
        let dv = d.dv.contiguous()?.reshape(rows.v.shape())?;
        Ok([self.norm_backward(q, &d.dq, &self.norm_q)?, dk, dv])
    }

    /// What [`Self::forward`] gave, as [b, l, d], like `x`.
    ///
    /// # Errors
    /// Another number of tokens.
    pub fn joined(out: &attention::Output, x: &Tensor) -> Result<Tensor> {
        Ok(out.o.contiguous()?.reshape(x.shape())?)
    }

    /// Normalised queries and keys, and values, as heads with the frames in the batch.
    fn heads_of(&self, q: &Tensor, FrameKeys { k, v, frames }: &FrameKeys) -> Result<[Tensor; 3]> {
        let tokens = q.dim(1)?;
        if !tokens.is_multiple_of(*frames) {
            let why = format!("{tokens} tokens and the rows of {frames} frames do not fit");
            return Err(Error::Mismatch(why));
        }
        let normed = |x: &Tensor, gain: &Tensor| {
            self.by_frame(&norm::rms_norm(&self.cut(x)?, gain, self.eps, x.dtype())?, *frames)
        };
        Ok([normed(q, &self.norm_q)?, normed(k, &self.norm_k)?, self.by_frame(v, *frames)?])
    }

    /// The gradient of `x` [b, l, d] before its norm, from that of its heads.
    fn norm_backward(&self, x: &Tensor, d: &Tensor, gain: &Tensor) -> Result<Tensor> {
        let cut = self.cut(x)?;
        let d = d.contiguous()?.reshape(cut.shape())?;
        Ok(norm::rms_norm_backward(&cut, &d, gain, self.eps)?.reshape(x.shape())?)
    }

    /// `x` [b, l, d] as its norm reads it: heads apart, or not.
    fn cut(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, width) = x.dims3()?;
        match self.over {
            NormOver::Head => Ok(x.reshape((batch, tokens, self.heads, width / self.heads))?),
            NormOver::Width => Ok(x.clone()),
        }
    }

    /// `x` [b, l, d], heads apart or not, with the frames in the batch: [b t, l / t, n, h].
    fn by_frame(&self, x: &Tensor, frames: usize) -> Result<Tensor> {
        let (batch, tokens) = (x.dim(0)?, x.dim(1)?);
        let size = x.elem_count() / (batch * tokens * self.heads);
        Ok(x.contiguous()?.reshape((batch * frames, tokens / frames, self.heads, size))?)
    }
}
