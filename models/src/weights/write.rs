//! Writing safetensors: tensor by tensor, to a temporary name, synced, renamed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use half::{bf16, f16};
use kernels::{DType, Device, Tensor};
use sha2::{Digest, Sha256};

use super::dtype::StoredDType;
use super::error::{Result, WeightsError};

/// A tensor that is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entered {
    /// Its name in the file.
    pub name: String,
    /// Its element type there.
    pub dtype: StoredDType,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl Entered {
    /// Bytes of its elements.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }
}

/// Writes `tensors` as a safetensors file with `metadata`, each tensor in its own dtype, largest element type first,
/// then by name, as the format's own writer orders them: the same tensors always give the same bytes.
///
/// # Errors
/// If safetensors does not support a dtype, a name occurs twice, or the file cannot be written: then no file is left and an
/// earlier one at `path` is untouched.
pub fn write_safetensors<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    metadata: &BTreeMap<String, String>,
) -> crate::Result<()> {
    let by_name: Vec<(&str, &Tensor)> = tensors.into_iter().collect();
    let entered = entered(path, &by_name)?;
    let by_name: BTreeMap<&str, &Tensor> = by_name.into_iter().collect();
    write_streamed(path, entered, metadata, |entered| to_bytes(by_name[entered.name.as_str()]))
}

/// SHA-256, in hexadecimal, over everything that [`write_safetensors`] of `tensors` writes after the header.
///
/// # Errors
/// Those of [`write_safetensors`] that are not about the file.
pub fn tensor_hash<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
) -> crate::Result<String> {
    let by_name: Vec<(&str, &Tensor)> = tensors.into_iter().collect();
    let mut entered = entered(path, &by_name)?;
    let by_name: BTreeMap<&str, &Tensor> = by_name.into_iter().collect();
    into_order(&mut entered);
    let mut hash = Sha256::new();
    for Entered { name, .. } in &entered {
        hash.update(to_bytes(by_name[name.as_str()])?);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The tensors as a header has them.
fn entered(path: &Path, tensors: &[(&str, &Tensor)]) -> Result<Vec<Entered>> {
    let entry = |(name, tensor): &(&str, &Tensor)| {
        let dtype = StoredDType::from_candle(tensor.dtype()).ok_or_else(|| {
            let dtype = tensor.dtype().as_str();
            WeightsError::file(path, format!("cannot write tensor `{name}`: safetensors has no {dtype}"))
        })?;
        Ok(Entered { name: (*name).to_owned(), dtype, shape: tensor.dims().to_vec() })
    };
    tensors.iter().map(entry).collect()
}

/// Largest element type first, then by name.
fn into_order(tensors: &mut [Entered]) {
    tensors.sort_by(|a, b| {
        let key = |t: &Entered| (std::cmp::Reverse(t.dtype.size()), t.dtype);
        (key(a), &a.name).cmp(&(key(b), &b.name))
    });
}

/// [`write_safetensors`] of tensors that are generated one by one: `make` returns the bytes of each, little-endian in row-major
/// order, and only one at a time is in memory.
///
/// # Errors
/// Those of [`write_safetensors`] and of `make`, and bytes of another length than declared.
pub fn write_streamed(
    path: &Path,
    mut tensors: Vec<Entered>,
    metadata: &BTreeMap<String, String>,
    mut make: impl FnMut(&Entered) -> crate::Result<Vec<u8>>,
) -> crate::Result<()> {
    into_order(&mut tensors);
    let header = header(path, &tensors, metadata)?;
    write_atomically(path, |out| {
        let write = |e| WeightsError::io("write", path)(e);
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(write)?;
        out.write_all(&header).map_err(write)?;
        for tensor in &tensors {
            let bytes = make(tensor)?;
            if bytes.len() != tensor.bytes() {
                let (name, found) = (&tensor.name, bytes.len());
                return Err(
                    WeightsError::file(path, format!("`{name}` has {found} bytes, which is a bug")).into()
                );
            }
            out.write_all(&bytes).map_err(write)?;
        }
        Ok(())
    })
}

/// The header of a file of `tensors` in this order, without its length.
pub(super) fn header(
    path: &Path,
    tensors: &[Entered],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>> {
    let mut json = serde_json::Map::new();
    if !metadata.is_empty() {
        json.insert("__metadata__".to_owned(), serde_json::json!(metadata));
    }
    let mut begin = 0;
    for tensor in tensors {
        let (name, end) = (&tensor.name, begin + tensor.bytes());
        let info = serde_json::json!({
            "dtype": tensor.dtype.name(), "shape": tensor.shape, "data_offsets": [begin, end],
        });
        if name == "__metadata__" || json.insert(name.clone(), info).is_some() {
            return Err(WeightsError::file(path, format!("cannot write two tensors named `{name}`")));
        }
        begin = end;
    }
    let mut text = serde_json::Value::Object(json).to_string().into_bytes();
    // Spaces up to a multiple of eight keep the tensors aligned for readers that map the file.
    text.resize(text.len().next_multiple_of(8), b' ');
    Ok(text)
}

/// The little-endian bytes of a tensor in row-major order.
pub(super) fn to_bytes(tensor: &Tensor) -> crate::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(tensor.elem_count() * tensor.dtype().size_in_bytes());
    for piece in pieces(&tensor.to_device(&Device::Cpu)?)? {
        bytes.extend(piece_bytes(&piece?)?);
    }
    Ok(bytes)
}

/// Numbers that are converted at once: intermediate buffers are small compared with a matrix.
const PIECE: usize = 1 << 20;

/// A tensor's numbers in row-major order, piece by piece.
pub(super) fn pieces(tensor: &Tensor) -> crate::Result<impl Iterator<Item = crate::Result<Tensor>>> {
    let flat = tensor.flatten_all()?;
    let count = flat.elem_count();
    Ok((0..count)
        .step_by(PIECE)
        .map(move |begin| Ok(flat.narrow(0, begin, PIECE.min(count - begin))?.contiguous()?)))
}

fn piece_bytes(flat: &Tensor) -> crate::Result<Vec<u8>> {
    Ok(match flat.dtype() {
        DType::F64 => little_endian(flat.to_vec1::<f64>()?, f64::to_le_bytes),
        DType::F32 => little_endian(flat.to_vec1::<f32>()?, f32::to_le_bytes),
        DType::F16 => little_endian(flat.to_vec1::<f16>()?, f16::to_le_bytes),
        DType::BF16 => little_endian(flat.to_vec1::<bf16>()?, bf16::to_le_bytes),
        DType::I64 => little_endian(flat.to_vec1::<i64>()?, i64::to_le_bytes),
        DType::I32 => little_endian(flat.to_vec1::<i32>()?, i32::to_le_bytes),
        DType::I16 => little_endian(flat.to_vec1::<i16>()?, i16::to_le_bytes),
        DType::U32 => little_endian(flat.to_vec1::<u32>()?, u32::to_le_bytes),
        DType::F8E4M3 => flat.to_vec1::<float8::F8E4M3>()?.into_iter().map(|v| v.to_bits()).collect(),
        _ => flat.to_vec1::<u8>()?,
    })
}

/// Arrays first, then flattened: this compiles to a copy, where flattening byte by byte does not.
fn little_endian<T, const N: usize>(values: Vec<T>, bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.into_iter().map(bytes).collect::<Vec<[u8; N]>>().into_flattened()
}

/// Writes a file so that a reader sees the old one or the whole new one: a sibling temporary file, synced, renamed.
/// The temporary file is removed if anything fails.
pub fn write_atomically(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> crate::Result<()>,
) -> crate::Result<()> {
    let (temporary, file) = temporary_file(path).map_err(WeightsError::io("write", path))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    fill(&mut out)?;
    out.flush().map_err(WeightsError::io("write", path))?;
    out.get_ref().sync_all().map_err(WeightsError::io("write", path))?;
    drop(out);
    temporary.rename_to(path).map_err(WeightsError::io("write", path))?;
    Ok(sync_folder(path)?)
}

/// A new file in the folder of `path`, to be renamed to it.
pub(super) fn temporary_file(path: &Path) -> std::io::Result<(Temporary, File)> {
    let temporary = Temporary(sibling(path));
    let file = File::create_new(&temporary.0)?;
    Ok((temporary, file))
}

/// Brings the renaming of a file to `path` to the disk; where its folder cannot be opened there is nothing to sync.
pub(super) fn sync_folder(path: &Path) -> Result<()> {
    match path.parent().filter(|p| !p.as_os_str().is_empty()).map(File::open) {
        Some(Ok(folder)) => folder.sync_all().map_err(WeightsError::io("write", path)),
        _ => Ok(()),
    }
}

/// A file that is removed when dropped.
#[derive(Debug)]
pub(super) struct Temporary(PathBuf);

impl Temporary {
    /// Gives it its final name.
    pub fn rename_to(self, path: &Path) -> std::io::Result<()> {
        std::fs::rename(&self.0, path)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Already renamed, or never created: not an error.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Most bytes of a file's name in the name of its temporary file: file systems allow 255 in total.
const NAME_BYTES: usize = 128;

/// A path in the folder of `path` that no other write of this or another process uses.
fn sibling(path: &Path) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = &name[..name.floor_char_boundary(NAME_BYTES)];
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    path.with_file_name(format!(".{name}.{}-{n}.tmp", std::process::id()))
}
