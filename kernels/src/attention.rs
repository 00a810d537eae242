//! Global attention, softmax(q k^T / sqrt(h)) v, in chunks of queries: exact, and never a whole score matrix.
//!
//! The forward keeps the log-sum-exp of every row, so that the backward needs neither the scores nor a second
//! softmax (Dao et al. 2022, FlashAttention, arXiv 2205.14135, algorithms 1 and 4).

use crate::Result;
use crate::device::Repeatability;
use crate::gpu::Gpu;
use crate::profile::{self, Class};
use crate::softmax::softmax;
use crate::{Device, ShadowAttention, ShadowGpu, Tensor};
use candle_core::{D, DType};

/// The largest score block that is made at once, in elements (f32: 64 MiB).
pub const MAX_SCORES: usize = 16 << 20;

/// The most bytes of workspace that one call of cuDNN's backward takes where it has several heads; a single head takes what
/// it needs.
pub const WORKSPACE: usize = 512 << 20;
/// The same of the deterministic one.
pub const DETERMINISTIC_WORKSPACE: usize = 1 << 30;

/// How cuDNN's backward is cut into calls, so that its workspace is bounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Calls {
    /// Samples of a call: all, or one.
    pub samples: usize,
    /// Heads of a call, as even as can be.
    pub heads: usize,
    /// Bytes that the largest call takes.
    pub workspace: usize,
}

impl Calls {
    /// The calls for `queries` and `keys` of `heads` heads of `size`, in a batch of `samples`.
    ///
    /// A head of a sample takes sums of the queries' gradient in f32 and two numbers a row, or bit for bit a matrix of scores in
    /// bf16. Measured on an H200 with cuDNN 9.19: 0.4 GiB at 20,280 tokens of 40 heads, 1.5 GiB at 75,600; bit for bit
    /// 7.7 GiB for 10 heads at 20,280.
    pub fn of(
        [samples, heads, size]: [usize; 3],
        [queries, keys]: [usize; 2],
        repeatability: Repeatability,
    ) -> Self {
        let (of_head, limit) = match repeatability {
            Repeatability::Fast => (queries * (4 * size + 8), WORKSPACE),
            Repeatability::BitForBit => (queries * keys * 2, DETERMINISTIC_WORKSPACE),
        };
        if samples * heads * of_head <= limit {
            return Self { samples, heads, workspace: samples * heads * of_head };
        }
        let most = (limit / of_head.max(1)).clamp(1, heads.max(1));
        let heads = heads.div_ceil(heads.div_ceil(most).max(1));
        Self { samples: 1, heads, workspace: heads * of_head }
    }
}

/// The first cuDNN whose backward needs no hidden mask for key lengths that are no multiples of 128, as Wan's are.
pub(crate) const OLDEST_CUDNN: (u32, u32) = (9, 18);

/// Whether cuDNN's attention takes heads of `head_size` numbers in `dtype`; other heads go in chunks.
pub fn is_for_cudnn(dtype: DType, head_size: usize) -> bool {
    dtype == DType::BF16 && head_size.is_multiple_of(8) && head_size <= 128
}

/// The version of cuDNN, (major, minor), that serves attention on this machine's GPUs, or why none does. Asked for without
/// opening a GPU: a plan and the run that it is for must get the same answer.
pub fn cudnn() -> std::result::Result<(u32, u32), String> {
    if !cfg!(cudnn_headers) {
        return Err("this program was built without the headers of cuDNN".to_owned());
    }
    let library = crate::inventory::libraries().into_iter().find(|library| library.name == "cuDNN");
    let version =
        library.map_or_else(|| Err("it is not looked for".to_owned()), |library| library.version)?;
    let mut numbers = version.split('.').map_while(|part| part.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) >= OLDEST_CUDNN => Ok((major, minor)),
        _ => {
            let (major, minor) = OLDEST_CUDNN;
            Err(format!("cuDNN {version} is installed, and {major}.{minor} or later is needed"))
        }
    }
}

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

/// Shapes that cuDNN refused on `device` since the last call, a line each. They run in chunks, several times slower.
pub fn refusals(device: &Device) -> Vec<String> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = device.card() {
        return gpu.refused_attention();
    }
    let _ = device;
    Vec::new()
}

/// The output of attention and what its backward needs of the softmax.
#[derive(Debug, Clone)]
pub struct Output {
    /// [b, lq, n, h], in the dtype of q.
    pub o: Tensor,
    /// Natural-log log-sum-exp of each row of scaled scores, [b, n, lq, 1], f32.
    pub lse: Tensor,
}

/// The gradients of attention, each in the shape and dtype of what it belongs to.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// [b, lq, n, h].
    pub dq: Tensor,
    /// [b, lk, n, h].
    pub dk: Tensor,
    /// [b, lk, n, h].
    pub dv: Tensor,
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

/// The sizes of an attention over heads side by side in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Heads {
    pub batch: usize,
    pub heads: usize,
    pub size: usize,
    pub queries: usize,
    pub keys: usize,
}

impl Heads {
    /// Of `q` [b, lq, n, h] and `k` [b, lk, n, h], where cuDNN's kernels take them.
    fn for_cudnn(q: &Tensor, k: &Tensor) -> Result<Option<Self>> {
        let (batch, queries, heads, size) = q.dims4()?;
        let keys = k.dim(1)?;
        let is_fit = is_for_cudnn(q.dtype(), size) && k.dtype() == q.dtype();
        // cuDNN refuses the backward of a single query over a single key.
        let is_fit = is_fit && queries > 1 && keys > 1;
        Ok(is_fit.then_some(Self { batch, heads, size, queries, keys }))
    }
}

impl Gpu {
    /// Attention through cuDNN; nothing where it is absent or has no engine for these shapes.
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

    /// The gradients through cuDNN; nothing where it is absent or has no engine for these shapes.
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
