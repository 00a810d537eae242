//! Types that attention shares with its cuDNN implementation: supported heads, the split into calls, results.

use candle_core::{DType, Result};

use crate::Tensor;
use crate::settings::Repeatability;

/// The most bytes of workspace that one call of cuDNN's backward takes where it has several heads; a single head takes what
/// it needs.
pub const WORKSPACE: usize = 512 << 20;
/// The same of the deterministic one.
pub const DETERMINISTIC_WORKSPACE: usize = 1 << 30;

/// How cuDNN's backward is split into calls, which bounds its workspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Calls {
    /// Samples of a call: all, or one.
    pub samples: usize,
    /// Heads of a call, distributed as evenly as possible.
    pub heads: usize,
    /// Bytes of workspace of the largest call.
    pub workspace: usize,
}

impl Calls {
    /// The calls for `queries` and `keys` of `heads` heads of `size`, in a batch of `samples`.
    ///
    /// A head of a sample needs sums of the queries' gradient in f32 and two numbers a row; the deterministic backward needs a
    /// matrix of scores in bf16. Measured on an H200 with cuDNN 9.19: 0.4 GiB at 20,280 tokens of 40 heads, 1.5 GiB at 75,600;
    /// deterministic 7.7 GiB for 10 heads at 20,280.
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

/// The first cuDNN whose backward needs no hidden mask for key lengths that are not multiples of 128, as Wan's are.
const OLDEST_CUDNN: (u32, u32) = (9, 18);

/// Whether cuDNN's attention supports heads of size `head_size` in `dtype`; others are computed in chunks.
pub fn is_for_cudnn(dtype: DType, head_size: usize) -> bool {
    dtype == DType::BF16 && head_size.is_multiple_of(8) && head_size <= 128
}

/// The version of cuDNN, (major, minor), that computes attention on this machine's GPUs, or why none can. Does not open a
/// GPU: a plan and its run must get the same answer.
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

/// The sizes of an attention whose heads are contiguous in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Samples.
    pub batch: usize,
    /// Heads of a sample.
    pub heads: usize,
    /// Numbers of a head.
    pub size: usize,
    /// Rows of queries.
    pub queries: usize,
    /// Rows of keys and values.
    pub keys: usize,
}

impl Heads {
    /// Of `q` [b, lq, n, h] and `k` [b, lk, n, h], where cuDNN's kernels take them.
    pub(super) fn for_cudnn(q: &Tensor, k: &Tensor) -> Result<Option<Self>> {
        let (batch, queries, heads, size) = q.dims4()?;
        let keys = k.dim(1)?;
        let found = Self { batch, heads, size, queries, keys };
        Ok(Some(found).filter(|found| found.is_for_cudnn(q.dtype()) && k.dtype() == q.dtype()))
    }

    /// Whether cuDNN's kernels take them in `dtype`. It refuses the backward of a single query over a single key.
    pub(super) fn is_for_cudnn(&self, dtype: DType) -> bool {
        is_for_cudnn(dtype, self.size) && self.queries > 1 && self.keys > 1
    }
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
