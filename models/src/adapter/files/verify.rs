//! Verification of a written file: it is read back and compared factor by factor.

use std::path::Path;

use kernels::{DType, Device, Tensor};
use rayon::prelude::*;

use super::encode::on_cpu;
use super::error::AdapterFileError;
use super::{AdapterFile, Precision, read};
use crate::Result;
use crate::delta::{Change, DoraPair, Magnitude};

/// Reads the file at `path` and compares every number of every factor with that of `source`. A style may fold the scale
/// into a factor, so that factor is compared times the scale. Returns the largest absolute difference.
///
/// # Errors
/// Other modules, kinds or shapes than `source` has, or a number further off than rounding it to `precision`, and
/// folding the scale in f32, explains.
pub fn verify_written(path: &Path, source: &AdapterFile, precision: Precision) -> Result<f64> {
    let differs = |difference: String| AdapterFileError::Verification { path: path.to_owned(), difference };
    let file = read(path)?;
    let same_names = file.modules.keys().eq(source.modules.keys())
        && file.differences.keys().eq(source.differences.keys());
    if !same_names {
        let (found, meant) = (file.modules.len(), source.modules.len());
        return Err(
            differs(format!("{found} modules in the file, {meant} expected, under other names")).into()
        );
    }
    let rounding = Rounding::of(precision);
    let modules = source.modules.par_iter().map(|(module, meant)| {
        let meant = on_cpu(meant)?;
        let pairs = pairs(&file.modules[module], &meant);
        let pairs = pairs.ok_or_else(|| differs(format!("{module} is an adapter of another kind")))?;
        pairs.iter().try_fold(0.0, |largest: f64, (name, [read, meant])| {
            let error = rounding.largest_error(read, meant)?;
            Ok(largest.max(error.map_err(|difference| differs(format!("{name} of {module} {difference}")))?))
        })
    });
    let differences = source.differences.par_iter().map(|(name, meant)| {
        let meant = meant.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        let error =
            rounding.largest_error(&Factor::plain(&file.differences[name]), &Factor::plain(&meant))?;
        Ok(error.map_err(|difference| differs(format!("the difference of {name} {difference}")))?)
    });
    let errors = modules.chain(differences).collect::<Result<Vec<f64>>>()?;
    Ok(errors.into_iter().fold(0.0, f64::max))
}

/// A tensor, and the factor that makes it comparable between styles.
#[derive(Clone, Copy)]
struct Factor<'a> {
    tensor: &'a Tensor,
    scale: f64,
}

impl<'a> Factor<'a> {
    fn plain(tensor: &'a Tensor) -> Self {
        Self { tensor, scale: 1.0 }
    }
}

/// A name with the tensor that was read and the expected one.
type Pair<'a> = (&'static str, [Factor<'a>; 2]);

/// The factors of two changes in pairs; `None` if the kinds differ.
fn pairs<'a>(read: &'a Change, meant: &'a Change) -> Option<Vec<Pair<'a>>> {
    let scales = [scale_of(read), scale_of(meant)];
    let beside = |(name, read): (_, &'a Tensor), meant: &'a Tensor, scales: [f64; 2]| -> Pair<'a> {
        (name, [Factor { tensor: read, scale: scales[0] }, Factor { tensor: meant, scale: scales[1] }])
    };
    match (read, meant) {
        (Change::Lora(read), Change::Lora(meant)) => {
            Some(vec![beside(("A", &read.a), &meant.a, [1.0; 2]), beside(("B", &read.b), &meant.b, scales)])
        }
        (Change::Dora(read), Change::Dora(meant)) => {
            let lengths = lengths(&read.magnitude, &meant.magnitude)?;
            Some(vec![
                beside(("A", &read.pair.a), &meant.pair.a, [1.0; 2]),
                beside(("B", &read.pair.b), &meant.pair.b, scales),
                beside(("the magnitude", lengths[0]), lengths[1], [1.0; 2]),
            ])
        }
        (Change::Loha(_), Change::Loha(_)) | (Change::Lokr(_), Change::Lokr(_)) => {
            let (read, meant) = (read.tensors(), meant.tensors());
            let same_names = read.iter().map(|(name, _)| name).eq(meant.iter().map(|(name, _)| name));
            // A style without alpha has the scale in the first factor.
            let beside =
                |(i, (read, (_, meant)))| beside(read, meant, if i == 0 { scales } else { [1.0; 2] });
            same_names.then(|| read.into_iter().zip(meant).enumerate().map(beside).collect())
        }
        _ => None,
    }
}

fn scale_of(change: &Change) -> f64 {
    match change {
        Change::Lora(pair) | Change::Dora(DoraPair { pair, .. }) => pair.scale(),
        Change::Loha(factors) => factors.scale,
        Change::Lokr(factors) => factors.scale,
    }
}

/// Of the magnitudes of both conventions, those of the one in the file.
fn lengths<'a>(read: &'a Magnitude, meant: &'a Magnitude) -> Option<[&'a Tensor; 2]> {
    let both = |f: fn(&Magnitude) -> Option<&Tensor>| Some([f(read)?, f(meant)?]);
    both(Magnitude::of_base).or_else(|| both(Magnitude::of_merged))
}

/// What rounding to a number format does: a share of each number, and no less than `tiny` below the normal range.
#[derive(Clone, Copy)]
struct Rounding {
    share: f64,
    tiny: f64,
}

/// What folding a scale in f32 does on top: the scale is rounded, the product is, and alpha may be.
const FOLDING: Rounding = Rounding { share: 2.0 * f32::EPSILON as f64, tiny: 1.5e-45 };

impl Rounding {
    fn of(precision: Precision) -> Self {
        let (share, tiny) = match precision {
            Precision::Float32 => (0.0, 0.0),
            Precision::Bfloat16 => (2f64.powi(-8), 2f64.powi(-134)),
            Precision::Float16 => (2f64.powi(-11), 2f64.powi(-25)),
        };
        Self { share, tiny }
    }

    /// The largest difference of any number, or what is wrong with the first that rounding does not explain.
    fn largest_error(self, read: &Factor, meant: &Factor) -> Result<std::result::Result<f64, String>> {
        let shapes = [read.tensor.dims(), meant.tensor.dims()];
        if shapes[0] != shapes[1] {
            return Ok(Err(format!("has shape {:?} in place of {:?}", shapes[0], shapes[1])));
        }
        let is_folded = read.scale != meant.scale;
        let folding = if is_folded { FOLDING } else { Self { share: 0.0, tiny: 0.0 } };
        let (share, tiny) = (self.share + folding.share, (self.tiny + folding.tiny) * read.scale.abs());
        let (got, want) = (read.tensor.flatten_all()?, meant.tensor.flatten_all()?);
        let (got, want): (Vec<f32>, Vec<f32>) = (got.to_vec1()?, want.to_vec1()?);
        let mut largest = 0.0f64;
        for (i, (got, want)) in got.into_iter().zip(want).enumerate() {
            let (got, want) = (f64::from(got) * read.scale, f64::from(want) * meant.scale);
            let (error, bound) = ((got - want).abs(), want.abs() * share + tiny);
            if error > bound || error.is_nan() {
                return Ok(Err(format!(
                    "is {got:.6e} in place of {want:.6e} at {i}, rounding explains {bound:.1e}"
                )));
            }
            largest = largest.max(error);
        }
        Ok(Ok(largest))
    }
}
