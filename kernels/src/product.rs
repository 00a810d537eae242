//! The matrix product of linear layers and adapters, with its fused epilogue.

use crate::Tensor;
use candle_core::DType;

use crate::Result;
use crate::gpu::{Gpu, suffix};

/// The epilogue of a product: what is applied to it before it is written.
#[derive(Clone, Copy)]
pub(crate) struct End<'a> {
    /// What it is multiplied by.
    pub scale: f64,
    /// `[n]`, added to every row; of the result's dtype.
    pub bias: Option<&'a Tensor>,
    /// [m, n], added; of the result's dtype.
    pub onto: Option<&'a Tensor>,
    /// The activation, applied last.
    pub then: Then,
    /// The result's dtype.
    pub dtype: DType,
}

/// The activation of an epilogue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Then {
    /// Nothing.
    Stay,
    /// GELU (tanh).
    Gelu,
}

impl End<'_> {
    /// The product alone, in `dtype`.
    pub(crate) fn plain(dtype: DType) -> Self {
        Self { scale: 1.0, bias: None, onto: None, then: Then::Stay, dtype }
    }
}

/// scale * a b (+ bias) (+ onto): `a` [m, k], `b` [k, n] of one dtype -> [m, n].
///
/// Sums are f32. On a GPU the result is rounded once; here the product is rounded before anything is added.
pub(crate) fn product(a: &Tensor, b: &Tensor, end: End) -> Result<Tensor> {
    let ((m, k), (rows, n)) = (a.dims2()?, b.dims2()?);
    let misfit = |op, other: &Tensor| {
        let (lhs, rhs) = (candle_core::Shape::from((m, n)), other.shape().clone());
        Err(candle_core::Error::ShapeMismatchBinaryOp { lhs, rhs, op }.bt())
    };
    match (end.bias, end.onto) {
        _ if k != rows => {
            let (lhs, rhs) = (a.shape().clone(), b.shape().clone());
            return Err(candle_core::Error::ShapeMismatchBinaryOp { lhs, rhs, op: "matmul" }.bt());
        }
        (Some(bias), _) if bias.dims() != [n] => return misfit("bias of a matmul", bias),
        (_, Some(onto)) if onto.dims() != [m, n] => return misfit("sum with a matmul", onto),
        _ => {}
    }
    on_gpu!(a, |gpu| gpu.product(a, b, end)?);
    let y = gemm_ready(a)?.matmul(&gemm_ready(b)?)?.to_dtype(end.dtype)?;
    let y = if end.scale == 1.0 { y } else { (y * end.scale)? };
    let y = match end.bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    };
    let y = match end.onto {
        Some(onto) => (onto + y)?,
        None => y,
    };
    match end.then {
        Then::Stay => Ok(y),
        Then::Gelu => y.gelu(),
    }
}

/// How the rows or columns of a matrix are in memory, as cuBLAS can read them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lines {
    /// Whether they are columns.
    pub turned: bool,
    /// Numbers from one line to the next.
    pub stride: usize,
}

impl Lines {
    /// Of `x` [rows, columns]; `None` if neither rows nor columns are contiguous, or cuBLAS does not support the dtype.
    fn of(x: &Tensor) -> Result<Option<Self>> {
        let (rows, columns) = x.dims2()?;
        let &[down, right] = x.stride() else { return Ok(None) };
        Ok(match () {
            () if suffix(x.dtype()).is_none() => None,
            () if right == 1 || columns == 1 => Some(Self { turned: false, stride: down.max(columns) }),
            () if down == 1 || rows == 1 => Some(Self { turned: true, stride: right.max(rows) }),
            () => None,
        })
    }
}

impl Gpu {
    /// See [`product`]. `None` if cuBLASLt has no algorithm for these matrices.
    fn product(&self, a: &Tensor, b: &Tensor, end: End) -> Result<Option<Tensor>> {
        let ((m, k), (_, n)) = (a.dims2()?, b.dims2()?);
        let (Some(of_a), Some(of_b)) = (Lines::of(a)?, Lines::of(b)?) else { return Ok(None) };
        if suffix(end.dtype).is_none() || m * n * k == 0 {
            return Ok(None);
        }
        let y = self.empty((m, n), end.dtype)?;
        match self {
            #[cfg(feature = "cuda")]
            Self::Card(card) => Ok(card.product((a, of_a), (b, of_b), end, &y)?.then_some(y)),
            Self::Shadow(..) => {
                let _ = (of_a, of_b);
                Ok(Some(y))
            }
        }
    }
}

/// `x` as candle's product takes it: with contiguous rows or columns.
fn gemm_ready(x: &Tensor) -> Result<Tensor> {
    if x.is_contiguous() || x.t()?.is_contiguous() { Ok(x.clone()) } else { x.contiguous() }
}
