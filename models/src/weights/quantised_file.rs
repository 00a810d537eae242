//! Quantised matrices of a checkpoint on disk: the next load reads one byte a number and quantises nothing.
//!
//! A safetensors file named by what determines it: the checkpoint's fingerprint, the 8-bit format, and the version of this layout. For
//! each matrix `X` it has the codes `X` (u8, [out, in]) and the scales `X.scale` (f32, `[out]`); `hashes` are XXH3 of every piece of these,
//! in the order of the header. A piece is compared with its hash when it is read, so that damage is found before it is used.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kernels::fill::{PIECE, filled};
use kernels::weight::{Format, Quantised};
use kernels::{DType, Device, Tensor};
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::Xxh3;

use super::checkpoint::Checkpoint;
use super::dtype::StoredDType;
use super::loader::{TensorSpec, Weights};
use super::quantised_writer::{Made, Writer};
use super::stored::StoredFile;
use super::write::{Entered, header};
use crate::Error;

/// The version of the layout: in the file's name and in its header.
const VERSION: &str = "tandem quantised 1";
/// The name of the table of hashes.
const HASHES: &str = "hashes";
/// Bytes that are read and hashed at a time.
const STEP: usize = 256 << 10;
/// Bytes of matrices that may wait for the disk where nothing else is said.
const BEHIND: u64 = 256 << 20;
/// A piece and its hash differ.
pub(super) const CHANGED: &str = "it does not have the bytes that were written";

/// The quantised matrices of one checkpoint in one format: those of a file that is there, or that is written while they are quantised.
#[derive(Debug)]
pub struct QuantisedFile {
    path: PathBuf,
    layout: Layout,
    /// Bytes that the checkpoint has of the same matrices.
    replaces: u64,
    /// The file that was there, with its hashes.
    stored: Option<Stored>,
    /// Bytes of matrices that may wait for the disk.
    behind: u64,
    state: Mutex<State>,
}

/// A file of this layout, with its hashes.
pub(super) type Stored = (StoredFile, Vec<u64>);

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
    writer: Option<Arc<Writer>>,
}

/// Where everything is in the file.
#[derive(Debug)]
pub(super) struct Layout {
    /// The first bytes of the file, up to the first tensor.
    pub head: Vec<u8>,
    pub matrices: BTreeMap<String, Place>,
    pub hashes: Part,
    pub bytes: u64,
}

/// A matrix that the file is for, and the format of its codes.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    name: &'a str,
    shape: [usize; 2],
    format: Format,
}

#[derive(Debug, Clone)]
pub(super) struct Place {
    shape: [usize; 2],
    format: Format,
    pub codes: Part,
    pub scale: Part,
}

/// A tensor's bytes, and the number of the hash of its first piece.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub offset: u64,
    pub bytes: usize,
    pub first: usize,
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
        Ok(Some(Self { path, layout, replaces, stored, behind: BEHIND, state }))
    }

    /// The same, of which quantised matrices of so many bytes may wait in host memory until the disk has taken those before.
    pub fn behind(self, bytes: u64) -> Self {
        Self { behind: bytes, ..self }
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

    /// Whether a matrix was quantised that the file is to have: [`Self::finish`] waits for the disk.
    pub fn is_being_written(&self) -> bool {
        self.state().writer.is_some()
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

    /// Has the matrix `name`, which was quantised now, written on another thread; waits where more of them wait than may. What the
    /// disk does not take is told by [`Self::finish`].
    ///
    /// # Errors
    /// When the device fails.
    pub(super) fn write(&self, name: &str, quantised: &Quantised) -> crate::Result<()> {
        let Some(place) = self.layout.matrices.get(name).filter(|_| !quantised.codes.device().is_shadow())
        else {
            return Ok(());
        };
        let Some(writer) = self.writer() else { return Ok(()) };
        let scale = quantised.scale.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
        let scale = scale.into_iter().flat_map(f32::to_le_bytes).collect();
        let codes = writer.codes(&quantised.codes)?;
        writer.queue(Made { name: name.to_owned(), place: place.clone(), codes, scale });
        Ok(())
    }

    /// Ends a load: where a matrix was quantised, and all others are there, waits until the file is written.
    pub fn finish(&self) -> CacheOutcome {
        let State { damage, failure, writer } = std::mem::take(&mut *self.state());
        if let Some(why) = failure {
            return CacheOutcome::NotWritten(why);
        }
        match writer.map(|writer| writer.finish(&self.path, &self.layout, self.stored.as_ref())) {
            None => CacheOutcome::Read,
            Some(Ok(())) => CacheOutcome::Written { damage },
            Some(Err(why)) => CacheOutcome::NotWritten(why),
        }
    }

    /// The file being written, which is begun where there is none yet; `None` where it cannot be.
    fn writer(&self) -> Option<Arc<Writer>> {
        let mut state = self.state();
        if state.failure.is_none() && state.writer.is_none() {
            match Writer::begin(&self.path, &self.layout, self.behind) {
                Ok(writer) => state.writer = Some(Arc::new(writer)),
                Err(why) => state.failure = Some(why.to_string()),
            }
        }
        state.writer.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
    fn found(&self, path: &Path) -> Result<Option<Stored>, String> {
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
    (file, hashes): &Stored,
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
