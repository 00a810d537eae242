//! Global attention, softmax(q k^T / sqrt(h)) v, in chunks of queries: exact, and never a whole score matrix.
//!
//! The forward keeps the log-sum-exp of every row, so that the backward needs neither the scores nor a second
//! softmax (Dao et al. 2022, FlashAttention, arXiv 2205.14135, algorithms 1 and 4).

use crate::Result;
use crate::gpu::Gpu;
use crate::profile::{self, Class};
use crate::softmax::softmax;
use crate::{Device, ShadowAttention, ShadowGpu, Tensor};
use candle_core::{D, DType};
pub(crate) mod cudnn;

pub use cudnn::{Calls, DETERMINISTIC_WORKSPACE, Gradients, Heads, Output, WORKSPACE, cudnn, is_for_cudnn};

/// The largest block of scores that is computed at once, in elements (f32: 64 MiB).
pub const MAX_SCORES: usize = 16 << 20;

/// What attention runs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Engine {
    /// A short name: `chunked`, `cudnn`.
    pub name: &'static str,
    /// Why this one, in words for the user.
    pub why: String,
}

/// The engine of attention on `device` for heads of `head_size` numbers in `dtype`.
pub fn engine(device: &Device, dtype: DType, head_size: usize) -> Engine {
    let chunked = |why: String| Engine { name: "chunked", why };
    if !device.is_cuda() {
        return chunked("in chunks of queries, by matrix products: exact, on every device".into());
    }
    if !is_for_cudnn(dtype, head_size) {
        let heads = format!("cuDNN takes no heads of {head_size} numbers in {}", dtype.as_str());
        return chunked(format!("several times slower than cuDNN's: {heads}"));
    }
    match opened(device) {
        Ok((major, minor)) => Engine { name: "cudnn", why: format!("cuDNN {major}.{minor}") },
        Err(why) => chunked(format!("without cuDNN, several times slower: {why}")),
    }
}

/// [`cudnn`], and whether it opens on this GPU.
fn opened(device: &Device) -> std::result::Result<(u32, u32), String> {
    let version = cudnn()?;
    #[cfg(feature = "cuda")]
    if let Some(gpu) = device.card() {
        gpu.cudnn()?;
    }
    let _ = device;
    Ok(version)
}

/// Which calls of attention there will be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passes {
    /// Forwards.
    Forward,
    /// Forwards and their backwards.
    Both,
}

/// Opens cuDNN and lets it plan attention over `heads` in `dtype` on `device`, which the first call would do and wait for. It is all on
/// the host, so it can be done while something else uses the device; what attention computes is the same.
pub fn prepare(device: &Device, heads: Heads, dtype: DType, passes: Passes) {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = device.card().filter(|_| heads.is_for_cudnn(dtype)) {
        gpu.prepare_attention(heads, passes);
    }
    let _ = (device, heads, dtype, passes);
}

/// Shapes that cuDNN refused on `device` since the last call, a line each. They run in chunks, several times slower.
pub fn refusals(device: &Device) -> Vec<String> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = device.card() {
        return gpu.refused_attention();
    }
    let _ = device;
    Vec::new()
}

/// Attention of `q` [b, lq, n, h] over `k`, `v` [b, lk, n, h]; no mask.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Output> {
    let _noted = profile::scope(Class::Attention, q.device());
    on_gpu!(q, |gpu| gpu.attention([q, k, v])?);
    let scale = 1.0 / (q.dim(3)? as f64).sqrt();
    let (q_bnlh, k_bnlh, v_bnlh) = (heads_first(q)?, heads_first(k)?, heads_first(v)?);
    let k_bnhl = k_bnlh.t()?;
    let (mut outs, mut lses) = (Vec::new(), Vec::new());
    for (start, rows) in chunks(&q_bnlh, &k_bnlh)? {
        let scores = q_bnlh.narrow(2, start, rows)?.contiguous()?.matmul(&k_bnhl)?;
        let (weights, lse) = softmax(&scores, scale)?;
        outs.push(weights.matmul(&v_bnlh)?);
        lses.push(lse);
    }
    Ok(Output { o: heads_last(&Tensor::cat(&outs, 2)?)?, lse: Tensor::cat(&lses, 2)? })
}

/// The gradients of [`forward`] for `d_out` [b, lq, n, h], given its inputs and its output.
///
/// Per chunk of rows: p = exp(s - lse), dv += p^T do, dp = do v^T, ds = p (dp - sum(o do)), dq = ds k, dk += ds^T q.
pub fn backward(q: &Tensor, k: &Tensor, v: &Tensor, out: &Output, d_out: &Tensor) -> Result<Gradients> {
    let _noted = profile::scope(Class::Attention, q.device());
    on_gpu!(q, |gpu| gpu.attention_backward([q, k, v], out, d_out)?);
    let (dtype, scale) = (q.dtype(), 1.0 / (q.dim(3)? as f64).sqrt());
    let (q_bnlh, k_bnlh, v_bnlh) = (heads_first(q)?, heads_first(k)?, heads_first(v)?);
    let do_bnlh = heads_first(&d_out.to_dtype(dtype)?)?;
    let o_do = (heads_first(&out.o)?.to_dtype(DType::F32)? * do_bnlh.to_dtype(DType::F32)?)?;
    let row_dots = o_do.sum_keepdim(D::Minus1)?;
    let mut dqs = Vec::new();
    let (mut dk, mut dv) =
        (k_bnlh.zeros_like()?.to_dtype(DType::F32)?, v_bnlh.zeros_like()?.to_dtype(DType::F32)?);
    for (start, rows) in chunks(&q_bnlh, &k_bnlh)? {
        let q_rows = q_bnlh.narrow(2, start, rows)?.contiguous()?;
        let do_rows = do_bnlh.narrow(2, start, rows)?.contiguous()?;
        let scores = (q_rows.matmul(&k_bnlh.t()?)?.to_dtype(DType::F32)? * scale)?;
        let p = scores.broadcast_sub(&out.lse.narrow(2, start, rows)?)?.exp()?;
        let dp = do_rows.matmul(&v_bnlh.t()?)?.to_dtype(DType::F32)?;
        let ds = (&p * dp.broadcast_sub(&row_dots.narrow(2, start, rows)?)?)?;
        let ds = (ds * scale)?.to_dtype(dtype)?;
        dv = (dv + p.to_dtype(dtype)?.t()?.matmul(&do_rows)?.to_dtype(DType::F32)?)?;
        dk = (dk + ds.t()?.matmul(&q_rows)?.to_dtype(DType::F32)?)?;
        dqs.push(ds.matmul(&k_bnlh)?);
    }
    Ok(Gradients {
        dq: heads_last(&Tensor::cat(&dqs, 2)?)?,
        dk: heads_last(&dk.to_dtype(dtype)?)?,
        dv: heads_last(&dv.to_dtype(dtype)?)?,
    })
}

impl Gpu {
    /// Attention through cuDNN; `None` if it is missing or has no engine for these shapes.
    fn attention(&self, [q, k, v]: [&Tensor; 3]) -> Result<Option<Output>> {
        let Some(heads) = Heads::for_cudnn(q, k)? else { return Ok(None) };
        let qkv = [&q.contiguous()?, &k.contiguous()?, &v.contiguous()?];
        let o = self.empty(q.shape(), DType::BF16)?;
        let out = Output { o, lse: self.empty((heads.batch, heads.heads, heads.queries, 1), DType::F32)? };
        let is_done = match self {
            #[cfg(feature = "cuda")]
            Self::Card(card) => card.attention(heads, qkv, &out)?,
            Self::Shadow(gpu, _) => {
                let _ = qkv;
                gpu.attention != ShadowAttention::Chunked
            }
        };
        Ok(is_done.then_some(out))
    }

    /// The gradients through cuDNN; `None` if it is missing or has no engine for these shapes.
    fn attention_backward(
        &self,
        [q, k, v]: [&Tensor; 3],
        out: &Output,
        d_out: &Tensor,
    ) -> Result<Option<Gradients>> {
        let Some(heads) = Heads::for_cudnn(q, k)? else { return Ok(None) };
        let (qkv, d_out) = ([&q.contiguous()?, &k.contiguous()?, &v.contiguous()?], &d_out.contiguous()?);
        let empty = |x: &Tensor| self.empty(x.shape(), DType::BF16);
        let gradients = Gradients { dq: empty(q)?, dk: empty(k)?, dv: empty(v)? };
        let is_done = match self {
            #[cfg(feature = "cuda")]
            Self::Card(card) => card.attention_backward(heads, qkv, out, d_out, &gradients)?,
            Self::Shadow(ShadowGpu { attention: ShadowAttention::Cudnn(repeatability), .. }, _) => {
                let _ = (qkv, out, d_out);
                let Heads { batch, heads, size, queries, keys } = heads;
                let calls = Calls::of([batch, heads, size], [queries, keys], *repeatability);
                self.empty(calls.workspace, DType::U8)?.relabel("workspace");
                true
            }
            Self::Shadow(..) => false,
        };
        Ok(is_done.then_some(gradients))
    }
}

/// (start, rows) of each chunk of queries, so that a score block stays under [`MAX_SCORES`].
fn chunks(q_bnlh: &Tensor, k_bnlh: &Tensor) -> Result<Vec<(usize, usize)>> {
    let (batch, heads, queries, _) = q_bnlh.dims4()?;
    let rows = (MAX_SCORES / (batch * heads * k_bnlh.dim(2)?).max(1)).clamp(1, queries.max(1));
    Ok((0..queries).step_by(rows).map(|start| (start, rows.min(queries - start))).collect())
}

/// [b, l, n, h] -> [b, n, l, h], contiguous.
fn heads_first(x: &Tensor) -> Result<Tensor> {
    x.transpose(1, 2)?.contiguous()
}

/// [b, n, l, h] -> [b, l, n, h], contiguous.
fn heads_last(x: &Tensor) -> Result<Tensor> {
    x.transpose(1, 2)?.contiguous()
}
