//! Whether a file says what was meant: read back, change by change.

use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::encode::on_cpu;
use super::error::AdapterFileError;
use super::{AdapterFile, Precision, read};
use crate::Result;
use crate::adapter::change::{Change, LoraPair, Magnitude};

/// Reads the file at `path` and compares what it adds to every weight with `source`. Returns the largest absolute
/// difference.
///
/// # Errors
/// Other modules than `source` has, or a delta further off than rounding the factors to `precision` explains.
pub fn verify_written(path: &Path, source: &AdapterFile, precision: Precision) -> Result<f64> {
    let differs = |difference: String| AdapterFileError::Verification { path: path.to_owned(), difference };
    let file = read(path)?;
    let same_names = file.modules.keys().eq(source.modules.keys())
        && file.differences.keys().eq(source.differences.keys());
    if !same_names {
        let (found, meant) = (file.modules.len(), source.modules.len());
        return Err(differs(format!("{found} modules in the file, {meant} meant, under other names")).into());
    }
    let mut largest = 0.0f64;
    let mut hold = |name: &str, error: f64, bound: f64| {
        if error.is_nan() || error > bound {
            return Err(differs(format!("{name} is off by {error:.2e}, rounding explains {bound:.2e}")));
        }
        largest = largest.max(error);
        Ok(())
    };
    for (module, meant) in &source.modules {
        for (error, bound) in errors(&file.modules[module], &on_cpu(meant)?, precision)? {
            hold(module, error, bound)?;
        }
    }
    let rounding = Rounding::of(precision);
    for (name, meant) in &source.differences {
        let meant = meant.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        let error = maximum(&(&file.differences[name] - &meant)?.abs()?)?;
        hold(name, error, maximum(&meant.abs()?)? * rounding.share + rounding.tiny)?;
    }
    Ok(largest)
}

/// What rounding to a number format does: a share of each number, and no less than `tiny` below the normal range.
#[derive(Clone, Copy)]
struct Rounding {
    share: f64,
    tiny: f64,
}

impl Rounding {
    fn of(precision: Precision) -> Self {
        let (share, tiny) = match precision {
            Precision::Float32 => (0.0, 0.0),
            Precision::Bfloat16 => (2f64.powi(-8), 0.0),
            Precision::Float16 => (2f64.powi(-11), 2f64.powi(-25)),
        };
        Self { share, tiny }
    }
}

/// The differences between what was read and what was meant, each with the most that rounding explains.
fn errors(read: &Change, meant: &Change, precision: Precision) -> Result<Vec<(f64, f64)>> {
    let rounding = Rounding::of(precision);
    match (read, meant) {
        (Change::Dora(read), Change::Dora(meant)) => {
            let (got, want) = lengths(&read.magnitude, &meant.magnitude);
            let off = maximum(&(got - want)?.abs()?)?;
            let bound = maximum(&want.abs()?)? * rounding.share + rounding.tiny;
            Ok(vec![of_pairs(&read.pair, &meant.pair, rounding)?, (off, bound)])
        }
        (Change::Lora(read), Change::Lora(meant)) => Ok(vec![of_pairs(read, meant, rounding)?]),
        (read, meant) if read.kind() == meant.kind() => {
            let (Some(got), Some(want)) = (read.delta()?, meant.delta()?) else { return Ok(Vec::new()) };
            Ok(vec![(maximum(&(got - want)?.abs()?)?, product_bound(meant, rounding)?)])
        }
        // Another kind was read: whatever it adds, it is not what was meant.
        _ => Ok(vec![(f64::INFINITY, 0.0)]),
    }
}

/// The lengths of one rule in both.
fn lengths<'a>(read: &'a Magnitude, meant: &'a Magnitude) -> (&'a Tensor, &'a Tensor) {
    let both = |f: fn(&Magnitude) -> Option<&Tensor>| Some((f(read)?, f(meant)?));
    both(Magnitude::of_base).or(both(Magnitude::of_merged)).unwrap_or((read.any(), meant.any()))
}

fn of_pairs(read: &LoraPair, meant: &LoraPair, rounding: Rounding) -> Result<(f64, f64)> {
    let error = maximum(&(read.delta()? - meant.delta()?)?.abs()?)?;
    Ok((error, pair_bound(meant, rounding)?))
}

/// How far rounding both factors may move any entry of the delta: with a relative error u in each factor and at most
/// `tiny` below the normal range, |B A| moves by at most 2u |B||A| + tiny (|B| 1 + 1 |A|), plus float32's own rounding
/// of the sums.
fn pair_bound(pair: &LoraPair, Rounding { share: u, tiny }: Rounding) -> Result<f64> {
    let (a, b) = (pair.a.abs()?, pair.b.abs()?);
    let scale = pair.scale().abs();
    let product = scale * maximum(&b.matmul(&a)?)?;
    // B is stored times the scale where alpha is not.
    let sums = scale * maximum(&b.sum(1)?)? + maximum(&a.sum(0)?)? * scale.max(1.0);
    let of_sums = (pair.rank() as f64 + 8.0) * f64::from(f32::EPSILON);
    Ok(product * (2.0 * u + u * u + of_sums) + tiny * sums)
}

/// The same for products of up to four factors: every factor as large as rounding may make it, less what it is.
fn product_bound(change: &Change, Rounding { share, tiny }: Rounding) -> Result<f64> {
    let grown = |grow: f64, add: f64| -> Result<Tensor> {
        let grown = change.map(&mut |t| Ok(((t.abs()? * grow)? + add)?))?;
        Ok(grown.delta()?.map_or_else(|| Tensor::zeros(1, DType::F32, &Device::Cpu), |delta| delta.abs())?)
    };
    let plain = grown(1.0, 0.0)?;
    let of_sums = (change.rank().unwrap_or(1) as f64 + 16.0) * f64::from(f32::EPSILON);
    // The scale may stand in the first factor, where `tiny` is not multiplied by it.
    let moved = maximum(&(grown(1.0 + share, tiny * 2.0)? - &plain)?)?;
    Ok(moved + maximum(&plain)? * of_sums)
}

fn maximum(tensor: &Tensor) -> Result<f64> {
    Ok(f64::from(tensor.max_all()?.to_scalar::<f32>()?))
}
