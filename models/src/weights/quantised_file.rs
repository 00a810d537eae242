//! Quantised matrices of a checkpoint on disk: the next load reads one byte a number and quantises nothing.
//!
//! A safetensors file named by what determines it: the checkpoint's fingerprint, the 8-bit format, and the version of this layout. For
//! each matrix `X` it has the codes `X` (u8, [out, in]) and the scales `X.scale` (f32, `[out]`); `hashes` are XXH3 of every piece of these,
//! in the order of the header. A piece is compared with its hash when it is read, so that damage is found before it is used.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kernels::fill::{PIECE, filled};
use kernels::weight::{Format, Quantised};
use kernels::{DType, Device, Tensor};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::checkpoint::Checkpoint;
use super::dtype::StoredDType;
use super::loader::{TensorSpec, Weights};
use super::stored::StoredFile;
use super::write::{Entered, Temporary, header, sync_folder, temporary_file};
use crate::Error;

/// The version of the layout: in the file's name and in its header.
const VERSION: &str = "tandem quantised 1";
/// The name of the table of hashes.
const HASHES: &str = "hashes";
/// Bytes that are read and hashed at a time.
const STEP: usize = 256 << 10;
/// A piece and its hash differ.
const CHANGED: &str = "it does not have the bytes that were written";

/// The quantised matrices of one checkpoint in one format: those of a file that is there, or that is written while they are quantised.
#[derive(Debug)]
pub struct QuantisedFile {
    path: PathBuf,
    layout: Layout,
    /// Bytes that the checkpoint has of the same matrices.
    replaces: u64,
    /// The file that was there, with its hashes.
    stored: Option<(StoredFile, Vec<u64>)>,
    state: Mutex<State>,
}

/// What became of a [`QuantisedFile`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheOutcome {
    /// Every matrix came from the file, or none was asked for.
    Read,
    /// The file was written.
    Written {
        /// Why one that was there was not used.
        damage: Option<String>,
    },
    /// The file could not be written, for this reason; matrices were quantised from the checkpoint.
    NotWritten(String),
}

#[derive(Debug, Default)]
struct State {
    damage: Option<String>,
    failure: Option<String>,
    writer: Option<Writer>,
}

/// A file that is being written under a temporary name.
#[derive(Debug)]
struct Writer {
    temporary: Temporary,
    file: Arc<File>,
    hashes: Vec<u64>,
    done: BTreeSet<String>,
}

/// Where everything is in the file.
#[derive(Debug)]
struct Layout {
    /// The first bytes of the file, up to the first tensor.
    head: Vec<u8>,
    matrices: BTreeMap<String, Place>,
    hashes: Part,
    bytes: u64,
}

/// A matrix that the file is for, and the format of its codes.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    name: &'a str,
    shape: [usize; 2],
    format: Format,
}

#[derive(Debug, Clone)]
struct Place {
    shape: [usize; 2],
    format: Format,
    codes: Part,
    scale: Part,
}

/// A tensor's bytes, and the number of the hash of its first piece.
#[derive(Debug, Clone)]
struct Part {
    offset: u64,
    bytes: usize,
    first: usize,
}

/// Why a part could not be read.
enum Fault {
    Damaged(String),
    Failed(Error),
}

impl From<kernels::Error> for Fault {
    fn from(error: kernels::Error) -> Self {
        Self::Failed(error.into())
    }
}

impl QuantisedFile {
    /// The file in `folder` for the matrices among `specs` that `weights` has on disk and not yet in `format`. Nothing is written
    /// before a matrix is quantised. `None` where there are no such matrices, or fewer than `least` bytes of them; and where
    /// weights are patched, which makes them others.
    ///
    /// # Errors
    /// A checkpoint that cannot be read.
    pub fn open(
        folder: &Path,
        weights: &Weights,
        specs: &[TensorSpec],
        format: Format,
        least: u64,
    ) -> crate::Result<Option<Self>> {
        let Some(checkpoint) = weights.checkpoint().filter(|_| weights.patched_names().next().is_none())
        else {
            return Ok(None);
        };
        let stored = |name: &str| {
            let (file, name) = weights.stored_name(name)?;
            file.dtype(name)
        };
        let is_coded = |name: &str| {
            format == Format::E4m3 && matches!(stored(name), Some(StoredDType::F8E4M3 | StoredDType::F8E5M2))
        };
        let matrices: Vec<Matrix> = specs
            .iter()
            .filter(|spec| spec.class.is_matrix() && !is_coded(&spec.name))
            .filter_map(|spec| {
                let shape = spec.shape.as_slice().try_into().ok()?;
                Some(Matrix { name: &spec.name, shape, format: spec.class.format(format) })
            })
            .collect();
        let bytes: usize = matrices.iter().map(|matrix| matrix.shape.iter().product::<usize>()).sum();
        if matrices.is_empty() || (bytes as u64) < least {
            return Ok(None);
        }
        let replaced = matrices.iter().map(|Matrix { name, shape: [rows, columns], .. }| {
            stored(name).map_or(0, |dtype| (rows * columns * dtype.size()) as u64)
        });
        let replaces = replaced.sum();
        let identity = identity(checkpoint, format)?;
        let path = folder.join(format!("{identity}.safetensors"));
        let layout = Layout::of(&path, &matrices, &identity)?;
        let (stored, damage) = match layout.found(&path) {
            Ok(stored) => (stored, None),
            Err(damage) => (None, Some(damage)),
        };
        let state = Mutex::new(State { damage, ..State::default() });
        Ok(Some(Self { path, layout, replaces, stored, state }))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.layout.bytes
    }

    /// Bytes that the checkpoint has of the same matrices.
    pub fn replaces(&self) -> u64 {
        self.replaces
    }

    /// Whether it was there, and whole as far as its length and header tell.
    pub fn is_there(&self) -> bool {
        self.stored.is_some()
    }

    /// Whether it is for the matrix `name` in `format`.
    pub(super) fn has(&self, name: &str, format: Format) -> bool {
        self.layout.matrices.get(name).is_some_and(|place| place.format == format)
    }

    /// The matrix `name` on `device`, for products in `compute`; `None` where the file does not have it undamaged.
    ///
    /// # Errors
    /// When the device fails.
    pub(super) fn matrix(
        &self,
        name: &str,
        compute: DType,
        device: &Device,
    ) -> crate::Result<Option<Quantised>> {
        let (Some(place), Some(stored)) = (self.layout.matrices.get(name), &self.stored) else {
            return Ok(None);
        };
        let read = || -> Result<Quantised, Fault> {
            let codes = part(stored, &place.codes, &place.shape, DType::U8, device)?;
            let scale = part(stored, &place.scale, &place.shape[..1], DType::F32, device)?;
            Ok(Quantised { format: place.format, codes, scale, compute })
        };
        match read() {
            Ok(quantised) => Ok(Some(quantised)),
            Err(Fault::Damaged(why)) => {
                self.state().damage.get_or_insert(format!("`{name}`: {why}"));
                Ok(None)
            }
            Err(Fault::Failed(error)) => Err(error),
        }
    }

    /// Writes the matrix `name`, which was quantised now. What the disk does not take is told by [`Self::finish`].
    ///
    /// # Errors
    /// When the device fails.
    pub(super) fn write(&self, name: &str, quantised: &Quantised) -> crate::Result<()> {
        let Some(place) = self.layout.matrices.get(name).filter(|_| !quantised.codes.device().is_shadow())
        else {
            return Ok(());
        };
        let Some(file) = self.writer() else { return Ok(()) };
        let codes = quantised.codes.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<u8>()?;
        let scale = quantised.scale.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
        let scale: Vec<u8> = scale.into_iter().flat_map(f32::to_le_bytes).collect();
        let written =
            put(&file, &place.codes, &codes).and_then(|codes| Ok((codes, put(&file, &place.scale, &scale)?)));
        let mut state = self.state();
        match (written, &mut state.writer) {
            (Ok((codes, scale)), Some(writer)) => {
                writer.note(&place.codes, &codes);
                writer.note(&place.scale, &scale);
                writer.done.insert(name.to_owned());
            }
            (Ok(_), None) => {}
            (Err(why), _) => state.give_up(&why),
        }
        Ok(())
    }

    /// Ends a load: writes the file if a matrix was quantised, and all others are there.
    pub fn finish(&self) -> CacheOutcome {
        let mut state = std::mem::take(&mut *self.state());
        if let Some(why) = state.failure {
            return CacheOutcome::NotWritten(why);
        }
        let Some(writer) = state.writer.take() else { return CacheOutcome::Read };
        match self.complete(writer) {
            Ok(()) => CacheOutcome::Written { damage: state.damage },
            Err(why) => CacheOutcome::NotWritten(why),
        }
    }

    /// The file being written, which is begun where there is none yet; `None` after the disk refused something.
    fn writer(&self) -> Option<Arc<File>> {
        let mut state = self.state();
        if state.failure.is_none() && state.writer.is_none() {
            match Writer::begin(&self.path, &self.layout) {
                Ok(writer) => state.writer = Some(writer),
                Err(why) => state.give_up(&why),
            }
        }
        state.writer.as_ref().map(|writer| writer.file.clone())
    }

    /// Adds the matrices that came from the file that was there, and puts the new one in its place.
    fn complete(&self, mut writer: Writer) -> Result<(), String> {
        let told = |error: std::io::Error| error.to_string();
        for (name, place) in &self.layout.matrices {
            if !writer.done.contains(name) {
                let stored = self.stored.as_ref().ok_or_else(|| format!("`{name}` was not read"))?;
                writer
                    .copy(stored, [&place.codes, &place.scale])
                    .map_err(|why| format!("`{name}`: {why}"))?;
            }
        }
        let hashes: Vec<u8> = writer.hashes.iter().flat_map(|hash| hash.to_le_bytes()).collect();
        writer.file.write_all_at(&hashes, self.layout.hashes.offset).map_err(told)?;
        writer.file.sync_all().map_err(told)?;
        writer.temporary.rename_to(&self.path).map_err(told)?;
        sync_folder(&self.path).map_err(|error| error.to_string())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn give_up(&mut self, why: &std::io::Error) {
        self.failure.get_or_insert(why.to_string());
        self.writer = None;
    }
}

impl Writer {
    fn begin(path: &Path, layout: &Layout) -> std::io::Result<Self> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let (temporary, file) = temporary_file(path)?;
        file.write_all_at(&layout.head, 0)?;
        file.set_len(layout.bytes)?;
        let hashes = vec![0; layout.hashes.bytes / size_of::<u64>()];
        Ok(Self { temporary, file: file.into(), hashes, done: BTreeSet::new() })
    }

    fn note(&mut self, part: &Part, hashes: &[u64]) {
        self.hashes[part.first..part.first + hashes.len()].copy_from_slice(hashes);
    }

    /// Copies `parts` of another file of this layout.
    fn copy(&mut self, (from, hashes): &(StoredFile, Vec<u64>), parts: [&Part; 2]) -> Result<(), String> {
        for part in parts {
            let bytes = from.bytes_at(part.offset, part.bytes).map_err(|error| error.to_string())?;
            let found = put(&self.file, part, &bytes).map_err(|error| error.to_string())?;
            if found != hashes[part.first..part.first + found.len()] {
                return Err(CHANGED.to_owned());
            }
            self.note(part, &found);
        }
        Ok(())
    }
}

/// A name for the matrices of `checkpoint` in `format`: 40 hexadecimal digits.
fn identity(checkpoint: &Checkpoint, format: Format) -> crate::Result<String> {
    let mut hash = Sha256::new();
    hash.update(format!("{VERSION}\0{}\0{}", format.name(), checkpoint.fingerprint()?));
    Ok(hash.finalize().iter().take(20).map(|byte| format!("{byte:02x}")).collect())
}

impl Layout {
    fn of(path: &Path, matrices: &[Matrix], identity: &str) -> crate::Result<Self> {
        let pieces = |bytes: usize| bytes.div_ceil(PIECE);
        let of_matrix = |[rows, columns]: [usize; 2]| pieces(rows * columns) + pieces(4 * rows);
        let count: usize = matrices.iter().map(|matrix| of_matrix(matrix.shape)).sum();
        let enter = |name: String, dtype, shape: &[usize]| Entered { name, dtype, shape: shape.to_vec() };
        // Largest numbers first, so that each is aligned.
        let mut entered = vec![enter(HASHES.to_owned(), StoredDType::U64, &[count])];
        entered.extend(
            matrices.iter().map(|Matrix { name, shape, .. }| {
                enter(format!("{name}.scale"), StoredDType::F32, &shape[..1])
            }),
        );
        entered.extend(matrices.iter().map(|m| enter(m.name.to_owned(), StoredDType::U8, &m.shape)));
        let metadata = [("format", "pt"), ("version", VERSION), ("of", identity)]
            .map(|(k, v)| (k.to_owned(), v.to_owned()));
        let text = header(path, &entered, &BTreeMap::from(metadata))?;
        let head = [&(text.len() as u64).to_le_bytes()[..], &text].concat();
        let (mut offset, mut first) = (head.len() as u64, 0);
        let mut parts = entered.iter().map(|entered| {
            let part = Part { offset, bytes: entered.bytes(), first };
            offset += part.bytes as u64;
            if entered.name != HASHES {
                first += pieces(part.bytes);
            }
            part
        });
        let mut next = || parts.next().unwrap_or(Part { offset: 0, bytes: 0, first: 0 }); // as many as were entered
        let hashes = next();
        let scales: Vec<Part> = matrices.iter().map(|_| next()).collect();
        let codes: Vec<Part> = matrices.iter().map(|_| next()).collect();
        drop(parts);
        let places = matrices.iter().zip(scales.into_iter().zip(codes));
        let matrices = places.map(|(&Matrix { name, shape, format }, (scale, codes))| {
            (name.to_owned(), Place { shape, format, codes, scale })
        });
        Ok(Self { head, matrices: matrices.collect(), hashes, bytes: offset })
    }

    /// The file of this layout at `path`, with its hashes; why it is not one, if there is one.
    fn found(&self, path: &Path) -> Result<Option<(StoredFile, Vec<u64>)>, String> {
        let file = match StoredFile::open(path) {
            Ok(file) => file,
            Err(_) if !path.exists() => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        let length = file.length().map_err(|error| error.to_string())?;
        if length != self.bytes {
            return Err(format!("it has {length} bytes instead of {}", self.bytes));
        }
        let read = |offset, count| file.bytes_at(offset, count).map_err(|error| error.to_string());
        if read(0, self.head.len())? != self.head {
            return Err("its header is not what it was written with".to_owned());
        }
        let hashes = read(self.hashes.offset, self.hashes.bytes)?;
        let hashes = hashes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
        Ok(Some((file, hashes)))
    }
}

/// Reads a part to `device`, and compares each piece with its hash.
fn part(
    (file, hashes): &(StoredFile, Vec<u64>),
    part: &Part,
    shape: &[usize],
    dtype: DType,
    device: &Device,
) -> Result<Tensor, Fault> {
    filled(shape, dtype, device, |first, piece| {
        let mut hash = Xxh3::new();
        for (i, step) in piece.chunks_mut(STEP).enumerate() {
            let at = part.offset + (first + i * STEP) as u64;
            file.read_at(at, step).map_err(|error| Fault::Damaged(error.to_string()))?;
            hash.update(step);
        }
        match hash.digest() == hashes[part.first + first / PIECE] {
            true => Ok(()),
            false => Err(Fault::Damaged(CHANGED.to_owned())),
        }
    })
}

/// Writes the bytes of a part, and returns the hashes of its pieces.
fn put(file: &File, part: &Part, bytes: &[u8]) -> std::io::Result<Vec<u64>> {
    if bytes.len() != part.bytes {
        return Err(std::io::Error::other(format!("{} bytes instead of {}", bytes.len(), part.bytes)));
    }
    let pieces = bytes.par_chunks(PIECE).enumerate();
    pieces
        .map(|(n, piece)| {
            file.write_all_at(piece, part.offset + (n * PIECE) as u64)?;
            Ok(xxh3_64(piece))
        })
        .collect()
}
