//! A model's weights as one file of the kind that ComfyUI reads: official names, in a number format of choice, tensor by
//! tensor.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use kernels::weight::Format;
use kernels::{DType, Device, Tensor};

use super::checkpoint::StoredCodes;
use super::dtype::StoredDType;
use super::error::WeightsError;
use super::loader::{TensorSpec, Weights};
use super::write::{Entered, pieces, to_bytes, write_streamed};
use crate::Result;

/// The number format of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copied {
    /// Everything in bf16.
    Bf16,
    /// Everything in fp16.
    Fp16,
    /// The matrices inside the blocks in e4m3 with one scale for each (`scale_weight`, and the marker `scaled_fp8`), other
    /// matrices in bf16, and vectors and modulation in f32.
    Fp8Scaled,
}

/// Marks a file of scaled e4m3 weights, by its dtype. Two elements would mean "dequantise before products".
const MARKER: &str = "scaled_fp8";

/// Writes every tensor of `specs`, patches included, at `path`. One tensor at a time is in memory. `each` is called before
/// each tensor and may cancel.
///
/// Matrices that are stored in e4m3 with one scale are copied; others are quantised from the dequantised numbers, since this
/// kind of file has one scale per matrix.
///
/// # Errors
/// If a tensor cannot be read, the format cannot represent a number, or the file cannot be written; `None` if it was
/// cancelled. In all these cases no file is left.
pub fn write_copy(
    path: &Path,
    weights: &Weights,
    specs: &[TensorSpec],
    copied: Copied,
    metadata: &BTreeMap<String, String>,
    mut each: impl FnMut(&str) -> ControlFlow<()>,
) -> Result<Option<()>> {
    let mut entered = Vec::new();
    for spec in specs {
        let dtype = stored(copied, spec);
        let enter = |name: String, dtype, shape: &[usize]| Entered { name, dtype, shape: shape.to_vec() };
        if dtype == StoredDType::F8E4M3 {
            entered.push(enter(scale_name(&spec.name), StoredDType::F32, &[1]));
        }
        entered.push(enter(spec.name.clone(), dtype, &spec.shape));
    }
    if copied == Copied::Fp8Scaled {
        entered.push(Entered { name: MARKER.to_owned(), dtype: StoredDType::F8E4M3, shape: vec![0] });
    }
    let mut is_broken_off = false;
    let made = write_streamed(path, entered, metadata, |tensor| {
        if each(&tensor.name).is_break() {
            is_broken_off = true;
            return Err(WeightsError::file(path, "broken off").into());
        }
        bytes(path, weights, tensor)
    });
    match (made, is_broken_off) {
        (_, true) => Ok(None),
        (made, false) => made.map(Some),
    }
}

fn scale_name(weight: &str) -> String {
    format!("{}.scale_weight", weight.strip_suffix(".weight").unwrap_or(weight))
}

/// The element type of a tensor in the copy.
fn stored(copied: Copied, spec: &TensorSpec) -> StoredDType {
    match copied {
        Copied::Bf16 => StoredDType::BF16,
        Copied::Fp16 => StoredDType::F16,
        Copied::Fp8Scaled => match spec.shape.len() {
            _ if spec.class.is_matrix() => StoredDType::F8E4M3,
            1 => StoredDType::F32,
            _ if spec.name.ends_with("modulation") => StoredDType::F32,
            _ => StoredDType::BF16,
        },
    }
}

fn bytes(path: &Path, weights: &Weights, tensor: &Entered) -> Result<Vec<u8>> {
    if tensor.name == MARKER {
        return Ok(Vec::new());
    }
    if let Some(module) = tensor.name.strip_suffix(".scale_weight") {
        // Quantised a second time for its codes: keeping those of all tensors would take the memory of the model.
        return Ok(quantised(path, weights, &format!("{module}.weight"))?.0.to_le_bytes().to_vec());
    }
    let dtype = match tensor.dtype {
        StoredDType::F8E4M3 => return Ok(quantised(path, weights, &tensor.name)?.1),
        StoredDType::F16 => DType::F16,
        StoredDType::BF16 => DType::BF16,
        _ => DType::F32,
    };
    let numbers = weights.tensor(&tensor.name, dtype, &Device::Cpu)?;
    check_finite(path, &tensor.name, tensor.dtype, &numbers)?;
    to_bytes(&numbers)
}

/// Refuses numbers that are not finite in the copy. Checks in pieces, since a large tensor in f32 would take more memory than
/// the copy itself.
fn check_finite(path: &Path, name: &str, dtype: StoredDType, numbers: &Tensor) -> Result<()> {
    for piece in pieces(numbers)? {
        let piece = piece?.to_dtype(DType::F32)?;
        // Of a finite number 0; a search for the largest would pass over NaN.
        if (piece * 0.0)?.sum_all()?.to_scalar::<f32>()? != 0.0 {
            let reason = format!(
                "`{name}` has a number that is NaN or infinite, or too large for {dtype}: look at the model and the adapters, or \
                 choose another format for the copy"
            );
            return Err(WeightsError::file(path, reason).into());
        }
    }
    Ok(())
}

/// The one scale and the codes of a matrix.
fn quantised(path: &Path, weights: &Weights, name: &str) -> Result<(f32, Vec<u8>)> {
    if let Some(StoredCodes { codes, scales }) = weights.codes(name, &Device::Cpu)? {
        let first = scales.first().copied().unwrap_or(1.0);
        if scales.iter().all(|scale| *scale == first) {
            return Ok((first, codes.flatten_all()?.to_vec1()?));
        }
    }
    let numbers = weights.tensor(name, DType::F32, &Device::Cpu)?;
    check_finite(path, name, StoredDType::F8E4M3, &numbers)?;
    let numbers: Vec<f32> = numbers.flatten_all()?.to_vec1()?;
    let largest = numbers.iter().fold(0f32, |largest, number| largest.max(number.abs()));
    let scale = (largest / Format::E4m3.largest()).max(f32::MIN_POSITIVE);
    Ok((scale, numbers.iter().map(|number| Format::E4m3.code(number / scale)).collect()))
}
