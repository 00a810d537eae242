//! Low-rank factors of a change: of the difference of two weights, or of an adapter of another rank.
//!
//! By singular value decomposition in f64. A product of low-rank factors is decomposed without computing it. A full matrix
//! above [`SMALL`] is decomposed by a random sketch with power iterations: at 5120 x 13824 and rank 64 that is 11 products
//! with 80 columns, 0.12 TFLOP; the full decomposition needs about a hundred times as many, and slower ones. Source: Halko,
//! Martinsson, Tropp 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1.

use faer::{Mat, MatRef};
use kernels::random::Key;
use kernels::{DType, Device, Tensor};

use crate::delta::{Change, LoraPair};
use crate::{Error, Result};

/// The shorter side up to which a matrix is decomposed in full.
const SMALL: usize = 384;
/// Columns of the sketch beyond the rank, and the number of power iterations: with these the result is within a thousandth of
/// the optimum, also for slowly decaying spectra.
const BEYOND: usize = 16;
const ITERATIONS: usize = 5;

/// The rank of the factors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rank {
    /// This rank, or the matrix's own if that is lower.
    Fixed(usize),
    /// The smallest rank that keeps this fraction of the energy (the sum of squares), at most the given one.
    Energy(f64, usize),
}

/// A change as low-rank factors.
#[derive(Debug, Clone)]
pub struct Reduced {
    /// The factors, alpha = rank, each with the root of the singular values.
    pub pair: LoraPair,
    /// The fraction of the change's energy that they keep, 0 to 1.
    pub energy: f64,
}

impl Rank {
    /// The upper limit.
    fn most(self) -> usize {
        match self {
            Self::Fixed(rank) | Self::Energy(_, rank) => rank,
        }
    }

    /// The rank for these singular values, in descending order, of a change of the energy `total`.
    fn of(self, values: &[f64], total: f64) -> usize {
        let most = values.len().min(self.most()).max(1);
        match self {
            Self::Fixed(_) => most,
            Self::Energy(share, _) => {
                let mut kept = 0.0;
                let is_enough = |value: &f64| {
                    kept += value * value;
                    kept >= share * total
                };
                values.iter().position(is_enough).map_or(most, |i| (i + 1).min(most))
            }
        }
    }
}

/// U, the singular values, V.
struct Decomposed {
    u: Mat<f64>,
    values: Vec<f64>,
    v: Mat<f64>,
}

/// Low-rank factors of `delta` [out, in], f32 on the CPU. The sketch of a large one is a function of `seed`.
///
/// # Errors
/// If a number is not finite.
pub fn extract(delta: &Tensor, rank: Rank, seed: u64) -> Result<Reduced> {
    let (out, input) = delta.dims2()?;
    let total = delta.sqr()?.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
    let wanted = (rank.most() + BEYOND).min(out.min(input));
    let decomposed = match out.min(input) <= SMALL || wanted * 2 >= out.min(input) {
        true => decompose(matrix(delta)?.as_ref())?,
        false => sketched(delta, wanted, seed)?,
    };
    reduced(decomposed, rank, total)
}

/// `change` as a LoRA of another rank.
///
/// # Errors
/// If it is a DoRA, whose decomposition depends on the base weight.
pub fn resize(change: &Change, rank: Rank, seed: u64) -> Result<Reduced> {
    match change {
        Change::Lora(pair) => {
            // B A = Qb (Rb Ra^T) Qa^T: only the matrix in the middle, of the rank's size, is decomposed.
            let (b, a) = (matrix(&pair.b)?, matrix(&pair.a)?);
            let (b, a) = (b.qr(), a.transpose().to_owned().qr());
            let scale = pair.scale();
            let middle = b.thin_R() * a.thin_R().transpose();
            let middle = Mat::from_fn(middle.nrows(), middle.ncols(), |i, j| middle[(i, j)] * scale);
            let Decomposed { u, values, v } = decompose(middle.as_ref())?;
            let total = values.iter().map(|value| value * value).sum();
            let whole = Decomposed { u: b.compute_thin_Q() * u, values, v: a.compute_thin_Q() * v };
            reduced(whole, rank, total)
        }
        Change::Dora(_) => Err(Error::Mismatch(
            "a DoRA has no thin factors of its own: merge it into its base with `tandem merge`, then `tandem extract`"
                .into(),
        )),
        other => match other.delta()? {
            Some(delta) => extract(&delta, rank, seed),
            None => Err(Error::Mismatch(format!("a {} cannot be resized", other.kind().name()))),
        },
    }
}

fn reduced(Decomposed { u, values, v }: Decomposed, rank: Rank, total: f64) -> Result<Reduced> {
    let rank = rank.of(&values, total);
    let root = |i: usize| values[i].max(0.0).sqrt();
    let b = Mat::from_fn(u.nrows(), rank, |i, j| u[(i, j)] * root(j));
    let a = Mat::from_fn(rank, v.nrows(), |i, j| v[(j, i)] * root(i));
    let kept: f64 = values[..rank].iter().map(|value| value * value).sum();
    // Of a zero change all energy is kept.
    let energy = if total > 0.0 { (kept / total).min(1.0) } else { 1.0 };
    Ok(Reduced { pair: LoraPair { a: tensor(a.as_ref())?, b: tensor(b.as_ref())?, alpha: None }, energy })
}

/// The decomposition of the part of `delta` that `columns` random directions and [`ITERATIONS`] rounds find.
fn sketched(delta: &Tensor, columns: usize, seed: u64) -> Result<Decomposed> {
    let input = delta.dim(1)?;
    let noise = Key::new(seed, "sketch", &[]).normals(input * columns);
    let noise = Tensor::from_vec(noise, (input, columns), &Device::Cpu)?;
    let transposed = delta.t()?;
    let mut range = orthonormal(&delta.matmul(&noise)?)?;
    for _ in 0..ITERATIONS {
        let back = orthonormal(&transposed.matmul(&range)?)?;
        range = orthonormal(&delta.matmul(&back)?)?;
    }
    let projected = matrix(&transposed.matmul(&range)?)?;
    let Decomposed { u, values, v } = decompose(projected.as_ref())?;
    // delta^T Q = U S V^T, so delta is about (Q V) S U^T.
    Ok(Decomposed { u: matrix(&range)? * v, values, v: u })
}

/// Orthonormal columns that span those of `x`.
fn orthonormal(x: &Tensor) -> Result<Tensor> {
    tensor(matrix(x)?.qr().compute_thin_Q().as_ref())
}

fn decompose(matrix: MatRef<f64>) -> Result<Decomposed> {
    let failed =
        |_| Error::Mismatch("the singular values of a change cannot be found: it is not finite".into());
    let svd = matrix.thin_svd().map_err(failed)?;
    let values = svd.S().column_vector().iter().copied().collect();
    Ok(Decomposed { u: svd.U().to_owned(), values, v: svd.V().to_owned() })
}

fn matrix(tensor: &Tensor) -> Result<Mat<f64>> {
    let rows: Vec<Vec<f32>> = tensor.to_vec2()?;
    Ok(Mat::from_fn(rows.len(), tensor.dim(1)?, |i, j| f64::from(rows[i][j])))
}

fn tensor(matrix: MatRef<f64>) -> Result<Tensor> {
    let (rows, columns) = (matrix.nrows(), matrix.ncols());
    let numbers: Vec<f32> = (0..rows * columns).map(|n| matrix[(n / columns, n % columns)] as f32).collect();
    Ok(Tensor::from_vec(numbers, (rows, columns), &Device::Cpu)?)
}
