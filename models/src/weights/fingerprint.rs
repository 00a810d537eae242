//! A cheap, stable identity of weights, for cache keys.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;

use kernels::{DType, Tensor};
use sha2::{Digest, Sha256};

use super::entry::Entry;
use super::error::{Result, WeightsError};

/// Places sampled in each tensor, evenly spread from its first to its last bytes, and bytes taken at each.
const SAMPLES: u64 = 8;
const SAMPLE_BYTES: u64 = 256;

/// Hashes tensors on disk, in the order given: name, type, shape, and samples of the bytes.
pub(super) fn of<'a>(tensors: impl Iterator<Item = (&'a str, &'a PathBuf, &'a Entry)>) -> Result<String> {
    let mut hash = Sha256::new();
    let mut open: Option<(&PathBuf, File)> = None;
    for (name, path, entry) in tensors {
        describe(&mut hash, name, entry.dtype.name(), &entry.shape);
        let file = match &mut open {
            Some((current, file)) if *current == path => file,
            _ => &mut open.insert((path, File::open(path).map_err(WeightsError::io("open", path))?)).1,
        };
        sample(&mut hash, file, entry).map_err(WeightsError::io("read", path))?;
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

fn sample(hash: &mut Sha256, file: &mut File, entry: &Entry) -> std::io::Result<()> {
    let bytes = entry.span_bytes() as u64;
    let mut buffer = [0u8; SAMPLE_BYTES as usize];
    let last = bytes.saturating_sub(SAMPLE_BYTES);
    for i in 0..SAMPLES {
        file.seek(SeekFrom::Start(entry.offset + last * i / (SAMPLES - 1)))?;
        let piece = &mut buffer[..bytes.min(SAMPLE_BYTES) as usize];
        file.read_exact(piece)?;
        hash.update(piece);
    }
    Ok(())
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}
