//! Writing an adapter file, and making sure that it says what was meant.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use sha2::{Digest, Sha256};

use super::error::AdapterFileError;
use super::{AdapterFile, LoraPair, Precision, Style, keys, read};
use crate::Result;
use crate::weights::write_safetensors;

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Written {
    /// Adapted modules.
    pub modules: usize,
    /// Size of the file in bytes.
    pub bytes: u64,
    /// The largest difference of any merged delta, read back, from its source: the rounding of the number format.
    pub largest_error: f64,
}

/// Writes `adapter` at `path`, reads it back, compares every merged delta, and only then gives the file its name.
/// An older file at `path` stays whole until that moment. The header gets `adapter.metadata`.
///
/// # Errors
/// An adapter without modules, a module without a name in `style`, values that `precision` cannot hold, the file
/// system, or a read-back that differs.
pub fn write(path: &Path, adapter: &AdapterFile, style: Style, precision: Precision) -> Result<Written> {
    if adapter.modules.is_empty() {
        return Err(AdapterFileError::Empty { path: path.to_owned() }.into());
    }
    let tensors = encode(path, adapter, style, precision)?;
    let mut metadata = adapter.metadata.clone();
    let unverified = Unverified::beside(path);
    let store = |metadata: &BTreeMap<String, String>| {
        write_safetensors(&unverified.0, tensors.iter().map(|(key, tensor)| (key.as_str(), tensor)), metadata)
    };
    store(&metadata)?;
    let io = |source| AdapterFileError::Io { path: path.to_owned(), source };
    if style == Style::Kohya {
        // Tools of this family recognise a file by the hash of its tensors, which does not cover the header.
        let hash = tensor_hash(&unverified.0).map_err(io)?;
        metadata.insert("modelspec.hash_sha256".to_owned(), format!("0x{hash}"));
        metadata.insert("sshs_model_hash".to_owned(), hash);
        store(&metadata)?;
    }
    let largest_error = verify_written(&unverified.0, adapter, precision)?;
    let bytes = std::fs::metadata(&unverified.0).map_err(io)?.len();
    std::fs::rename(&unverified.0, path).map_err(io)?;
    Ok(Written { modules: adapter.modules.len(), bytes, largest_error })
}

/// Reads the file at `path` and compares the merged delta of every module with that of `source`. Returns the largest
/// absolute difference.
///
/// # Errors
/// Other modules than `source` has, or a delta further off than rounding the factors to `precision` explains.
pub fn verify_written(path: &Path, source: &AdapterFile, precision: Precision) -> Result<f64> {
    let differs = |difference: String| AdapterFileError::Verification { path: path.to_owned(), difference };
    let file = read(path)?;
    if !file.modules.keys().eq(source.modules.keys()) {
        let (found, meant) = (file.modules.len(), source.modules.len());
        return Err(differs(format!("{found} modules in the file, {meant} meant, under other names")).into());
    }
    let mut largest = 0.0f64;
    for (module, meant) in &source.modules {
        let error = maximum(&(file.modules[module].delta()? - on_cpu(meant)?.delta()?)?.abs()?)?;
        let bound = rounding_bound(meant, precision)?;
        if error.is_nan() || error > bound {
            return Err(
                differs(format!("{module} is off by {error:.2e}, rounding explains {bound:.2e}")).into()
            );
        }
        largest = largest.max(error);
    }
    Ok(largest)
}

/// How far rounding both factors may move any entry of the delta: with a relative error u in each factor and at most
/// `tiny` below the normal range, |B A| moves by at most 2u |B||A| + tiny (|B| 1 + 1 |A|), plus float32's own rounding
/// of the sums.
fn rounding_bound(pair: &LoraPair, precision: Precision) -> Result<f64> {
    let (u, tiny) = match precision {
        Precision::Float32 => (0.0, 0.0),
        Precision::Bfloat16 => (2f64.powi(-8), 0.0),
        Precision::Float16 => (2f64.powi(-11), 2f64.powi(-25)),
    };
    let pair = on_cpu(pair)?;
    let (a, b) = (pair.a.abs()?, pair.b.abs()?);
    let scale = pair.scale().abs();
    let product = scale * maximum(&b.matmul(&a)?)?;
    // B is stored times the scale where alpha is not.
    let sums = scale * maximum(&b.sum(1)?)? + maximum(&a.sum(0)?)? * scale.max(1.0);
    let of_sums = (pair.rank() as f64 + 8.0) * f64::from(f32::EPSILON);
    Ok(product * (2.0 * u + u * u + of_sums) + tiny * sums)
}

/// The tensors of the file by key.
fn encode(
    path: &Path,
    adapter: &AdapterFile,
    style: Style,
    precision: Precision,
) -> Result<BTreeMap<String, Tensor>> {
    let (dtype, called) = match precision {
        Precision::Float32 => (DType::F32, "float32"),
        Precision::Bfloat16 => (DType::BF16, "bfloat16"),
        Precision::Float16 => (DType::F16, "float16"),
    };
    let mut tensors = BTreeMap::new();
    for (module, pair) in &adapter.modules {
        let Some((down, up, alpha)) = keys::spell(style, module) else {
            return Err(AdapterFileError::NoName { path: path.to_owned(), module: module.clone() }.into());
        };
        let pair = on_cpu(pair)?;
        let stored =
            if alpha.is_none() && pair.scale() != 1.0 { (&pair.b * pair.scale())? } else { pair.b.clone() };
        for (key, factor) in [(down, &pair.a), (up, &stored)] {
            let factor = factor.to_dtype(dtype)?;
            if !factor.to_dtype(DType::F32)?.abs()?.sum_all()?.to_scalar::<f32>()?.is_finite() {
                let (path, module) = (path.to_owned(), module.clone());
                return Err(AdapterFileError::NotFinite { path, module, precision: called }.into());
            }
            tensors.insert(key, factor);
        }
        if let Some(key) = alpha {
            tensors.insert(key, Tensor::new(pair.alpha.unwrap_or(pair.rank() as f32), &Device::Cpu)?);
        }
    }
    Ok(tensors)
}

/// The pair in f32 on the CPU, wherever it was trained.
fn on_cpu(pair: &LoraPair) -> Result<LoraPair> {
    let cpu = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F32);
    Ok(LoraPair { a: cpu(&pair.a)?, b: cpu(&pair.b)?, alpha: pair.alpha })
}

fn maximum(tensor: &Tensor) -> Result<f64> {
    Ok(f64::from(tensor.max_all()?.to_scalar::<f32>()?))
}

/// SHA-256 over everything behind the header of a safetensors file, in hexadecimal.
fn tensor_hash(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    file.seek(SeekFrom::Start(8 + u64::from_le_bytes(length)))?;
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut chunk)?;
        if n == 0 {
            return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
        }
        hash.update(&chunk[..n]);
    }
}

/// A file that is removed when dropped, unless it was renamed.
struct Unverified(PathBuf);

impl Unverified {
    fn beside(path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Self(path.with_file_name(format!(".{name}.{}.unverified.tmp", std::process::id())))
    }
}

impl Drop for Unverified {
    fn drop(&mut self) {
        // Already renamed, or never written: nothing to tell then.
        let _ = std::fs::remove_file(&self.0);
    }
}
