//! A cheap, stable identity of weights, for cache keys.

use kernels::{DType, Tensor};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::entry::Entry;
use super::error::Result;
use super::stored::StoredFile;

/// Places sampled in each tensor, evenly spread from its first to its last bytes, and bytes taken at each.
const SAMPLES: u64 = 8;
const SAMPLE_BYTES: u64 = 256;

/// Hashes tensors on disk, in the order given: name, type, shape, and samples of the bytes, which are read on all cores: of a cold file
/// each is a wait of its own.
pub(super) fn of<'a>(tensors: impl Iterator<Item = (&'a str, &'a StoredFile, &'a Entry)>) -> Result<String> {
    let tensors: Vec<_> = tensors.collect();
    let samples: Vec<Vec<u8>> =
        tensors.par_iter().map(|(_, file, entry)| sample(file, entry)).collect::<Result<_>>()?;
    let mut hash = Sha256::new();
    for ((name, _, entry), sample) in tensors.iter().zip(samples) {
        describe(&mut hash, name, entry.dtype.name(), &entry.shape);
        hash.update(sample);
    }
    Ok(hex(hash))
}

/// Hashes tensors in memory, whole.
pub(super) fn of_tensors<'a>(tensors: impl Iterator<Item = (&'a str, &'a Tensor)>) -> crate::Result<String> {
    let mut hash = Sha256::new();
    for (name, tensor) in tensors {
        describe(&mut hash, name, tensor.dtype().as_str(), tensor.dims());
        for value in tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()? {
            hash.update(value.to_le_bytes());
        }
    }
    Ok(hex(hash))
}

fn describe(hash: &mut Sha256, name: &str, dtype: &str, shape: &[usize]) {
    let shape: Vec<String> = shape.iter().map(usize::to_string).collect();
    hash.update(format!("{name}\0{dtype}\0[{}]\0", shape.join(", ")));
}

fn sample(file: &StoredFile, entry: &Entry) -> Result<Vec<u8>> {
    let bytes = entry.span_bytes() as u64;
    let (each, last) = (bytes.min(SAMPLE_BYTES) as usize, bytes.saturating_sub(SAMPLE_BYTES));
    let mut samples = vec![0; each * SAMPLES as usize];
    if each > 0 {
        for (i, piece) in (0..).zip(samples.chunks_mut(each)) {
            file.read_at(entry.offset + last * i / (SAMPLES - 1), piece)?;
        }
    }
    Ok(samples)
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}
