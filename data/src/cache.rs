//! The cache of encoded clips and prompts on disk: one safetensors file per entry, verified when it is first read.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use half::bf16;
use half::slice::HalfFloatSliceExt;
use safetensors::tensor::Metadata;
use safetensors::{Dtype, SafeTensors, View};
use sha2::{Digest, Sha256};

use crate::atomic;
use crate::error::{DataError, Result};
use crate::key::{FORMAT_VERSION, Key, hex};
use crate::tensor::{HostTensor, Storage};

/// A folder of cache entries.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: PathBuf,
    /// Entries whose checksum was found right since the folder was opened, here and in clones.
    verified: Arc<Mutex<HashSet<Key>>>,
}

/// Answer to "is this cached?".
#[derive(Debug, Clone, PartialEq)]
pub enum Lookup {
    /// The entry, verified.
    Hit(Entry),
    /// It has to be encoded (again).
    Miss {
        /// Why.
        reason: MissReason,
    },
}

/// Why an entry has to be encoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MissReason {
    /// There is none.
    Absent,
    /// The file is damaged or is not this entry, with the reason.
    Damaged(String),
}

impl fmt::Display for MissReason {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Absent => formatter.write_str("not cached yet"),
            Self::Damaged(how) => write!(formatter, "the cached file is damaged ({how})"),
        }
    }
}

/// Contents of an entry.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Entry {
    /// Tensors by name.
    pub tensors: BTreeMap<String, HostTensor>,
    /// Whatever else was written: the source's name, a hash of its caption.
    pub meta: BTreeMap<String, String>,
}

/// Bytes of the length of a safetensors header.
const HEADER_LENGTH: u64 = 8;
const KEY: &str = "tandem.key";
const VERSION: &str = "tandem.format_version";
const SHA256: &str = "tandem.sha256";
/// Fixed by the convention (bford.info/cachedir), by which backup programs recognise the folder.
const MARKER_TEXT: &str = "Signature: 8a477f597d28d172789f06886806bc55\n# Made by Tandem. Safe to delete.\n";

impl Cache {
    /// Opens a cache folder, creating it if need be.
    ///
    /// # Errors
    /// [`DataError::CacheReadOnly`] when it does not exist and cannot be created. A folder that cannot be written to is
    /// only an error once something new is [`Cache::put`], or at [`Cache::check_writable`]: a complete cache may be read-only.
    pub fn open(folder: impl Into<PathBuf>) -> Result<Self> {
        let folder = folder.into();
        let refused = |source| DataError::CacheReadOnly { folder: folder.clone(), source };
        if !folder.is_dir() {
            std::fs::create_dir_all(&folder).map_err(refused)?;
            let marker = folder.join(crate::scan::CACHE_MARKER);
            atomic::write(&marker, |file| file.write_all(MARKER_TEXT.as_bytes())).map_err(refused)?;
        }
        Ok(Self { folder, verified: Arc::default() })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Asks before hours of encoding whether their result can be kept, and removes what writers that died left
    /// half-written.
    ///
    /// # Errors
    /// [`DataError::CacheReadOnly`].
    pub fn check_writable(&self) -> Result<()> {
        let refused = |source| DataError::CacheReadOnly { folder: self.folder.clone(), source };
        // Under a unique name: other processes may do this at the same time.
        let probe = self.folder.join(format!("writable-{}", std::process::id()));
        atomic::write(&probe, |_| Ok(())).map_err(refused)?;
        match std::fs::remove_file(&probe) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(refused(error)),
            _ => {}
        }
        self.remove_leftovers().map_err(DataError::io("remove temporary files in", &self.folder))
    }

    /// Removes temporary files whose writers have ended.
    fn remove_leftovers(&self) -> std::io::Result<()> {
        let mut folders = vec![self.folder.clone()];
        for entry in std::fs::read_dir(&self.folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            }
        }
        for folder in folders {
            for leftover in atomic::leftovers(&folder)?.iter().filter(|leftover| leftover.is_abandoned()) {
                match std::fs::remove_file(&leftover.path) {
                    // Another process was faster.
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    other => other?,
                }
            }
        }
        Ok(())
    }

    /// Reads an entry and verifies it: lengths and key always, the checksum the first time. A damaged or foreign file is a
    /// miss, and encoded again.
    ///
    /// # Errors
    /// [`DataError::Io`] when the system refuses to read a file that exists.
    pub fn get(&self, key: &Key) -> Result<Lookup> {
        let path = self.path_of(key);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Ok(Lookup::Miss { reason: MissReason::Absent });
            }
            Err(error) => return Err(DataError::io("read", &path)(error)),
        };
        let checksum = if self.verified().contains(key) { Checksum::Known } else { Checksum::Verify };
        Ok(match decode(&bytes, key, checksum) {
            Ok(entry) => {
                self.verified().insert(*key);
                Lookup::Hit(entry)
            }
            Err(how) => Lookup::Miss { reason: MissReason::Damaged(how) },
        })
    }

    /// Why an entry has to be encoded, as far as the header and the length of its file show; `None` if they are as they must
    /// be. [`Cache::get`] finds what else may be wrong.
    ///
    /// # Errors
    /// [`DataError::Io`] when the system refuses to read a file that exists.
    pub fn peek(&self, key: &Key) -> Result<Option<MissReason>> {
        let path = self.path_of(key);
        let io = |error| DataError::io("read", &path)(error);
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Some(MissReason::Absent)),
            Err(error) => return Err(io(error)),
        };
        let length = file.metadata().map_err(io)?.len();
        let (mut claimed, mut head) = ([0; HEADER_LENGTH as usize], Vec::new());
        let claimed = match file.read_exact(&mut claimed) {
            Ok(()) => u64::from_le_bytes(claimed),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                return Ok(Some(MissReason::Damaged("it ends within its header".into())));
            }
            Err(error) => return Err(io(error)),
        };
        // Nothing beyond the end of the file is read, whatever the header claims.
        file.take(claimed.min(length)).read_to_end(&mut head).map_err(io)?;
        let found = serde_json::from_slice::<Metadata>(&head);
        let checked = found.map_err(|error| format!("its header is invalid: {error}")).and_then(|header| {
            check_header(&header, key)?;
            let whole =
                HEADER_LENGTH.checked_add(claimed).and_then(|n| n.checked_add(header.data_len() as u64));
            if whole == Some(length) { Ok(()) } else { Err("it has another length than it claims".into()) }
        });
        Ok(checked.err().map(MissReason::Damaged))
    }

    /// Removes a damaged entry, so that it is encoded again.
    ///
    /// # Errors
    /// [`DataError::Io`] when the system refuses.
    pub fn remove(&self, key: &Key) -> Result<()> {
        self.verified().remove(key);
        let path = self.path_of(key);
        std::fs::remove_file(&path).map_err(DataError::io("remove", &path))
    }

    fn verified(&self) -> MutexGuard<'_, HashSet<Key>> {
        // A panic elsewhere leaves the set of keys intact.
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores an entry, replacing an earlier one. When this returns, the entry survives a crash.
    ///
    /// # Errors
    /// [`DataError::CacheReadOnly`] when the folder takes no files, [`DataError::Io`] for a full disk and the like.
    pub fn put(
        &self,
        key: &Key,
        tensors: &[(&str, &HostTensor, Storage)],
        meta: &BTreeMap<String, String>,
    ) -> Result<()> {
        let path = self.path_of(key);
        self.verified().remove(key);
        let bytes = encode_entry(key, tensors, meta).map_err(|reason| DataError::encode(&path, reason))?;
        let folder = path.parent().unwrap_or(&self.folder);
        let written = std::fs::create_dir_all(folder)
            .and_then(|()| atomic::write(&path, |file| file.write_all(&bytes)));
        written.map_err(|source| match source.kind() {
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                DataError::CacheReadOnly { folder: self.folder.clone(), source }
            }
            _ => DataError::io("write", &path)(source),
        })
    }

    /// Entries are spread over 256 folders: some file systems slow down with very many files in one.
    fn path_of(&self, key: &Key) -> PathBuf {
        let name = key.to_string();
        self.folder.join(&name[..2]).join(format!("{name}.safetensors"))
    }
}

/// A tensor on its way to the file.
struct Stored<'a> {
    dtype: Dtype,
    shape: &'a [usize],
    bytes: Vec<u8>,
}

impl View for &Stored<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// The bytes of an entry's file.
///
/// # Errors
/// When safetensors refuses a name.
pub fn encode_entry(
    key: &Key,
    tensors: &[(&str, &HostTensor, Storage)],
    meta: &BTreeMap<String, String>,
) -> std::result::Result<Vec<u8>, String> {
    let mut stored = BTreeMap::new();
    for (name, tensor, storage) in tensors {
        let (dtype, bytes) = match storage {
            Storage::F32 => {
                (Dtype::F32, tensor.data().iter().flat_map(|value| value.to_le_bytes()).collect())
            }
            Storage::Bf16 => (
                Dtype::BF16,
                tensor.data().iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
            ),
        };
        stored.insert(*name, Stored { dtype, shape: tensor.shape(), bytes });
    }
    let digest =
        digest(stored.iter().map(|(name, tensor)| (*name, tensor.dtype, tensor.shape, &tensor.bytes[..])));
    let mut metadata: HashMap<String, String> =
        meta.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
    metadata.insert(KEY.into(), key.to_string());
    metadata.insert(VERSION.into(), FORMAT_VERSION.to_string());
    metadata.insert(SHA256.into(), digest);
    safetensors::serialize(stored.iter().map(|(name, tensor)| (*name, tensor)), Some(metadata))
        .map_err(|error| error.to_string())
}

/// Reads the bytes of an entry's file and checks everything: lengths against the file (done by safetensors), the key against the
/// one asked for, the contents against their hash.
///
/// # Errors
/// What is wrong, in a few words.
pub fn decode_entry(bytes: &[u8], key: &Key) -> std::result::Result<Entry, String> {
    decode(bytes, key, Checksum::Verify)
}

/// Whether the checksum of an entry is still to be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Checksum {
    Verify,
    /// It was, since the cache was opened.
    Known,
}

/// Whether a header is that of the entry `key`.
fn check_header(header: &Metadata, key: &Key) -> std::result::Result<(), String> {
    let field = |name: &str| header.metadata().as_ref().and_then(|all| all.get(name)).map(String::as_str);
    if field(KEY) != Some(&key.to_string()) {
        return Err("it belongs to another entry".into());
    }
    if field(VERSION) != Some(&FORMAT_VERSION.to_string()) {
        return Err("it was written by another version".into());
    }
    Ok(())
}

fn decode(bytes: &[u8], key: &Key, checksum: Checksum) -> std::result::Result<Entry, String> {
    let (_, header) =
        SafeTensors::read_metadata(bytes).map_err(|error| format!("its header is invalid: {error}"))?;
    check_header(&header, key)?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let file =
        SafeTensors::deserialize(bytes).map_err(|error| format!("its contents are invalid: {error}"))?;
    let views: BTreeMap<String, _> = file.tensors().into_iter().collect();
    let found =
        || digest(views.iter().map(|(name, view)| (name.as_str(), view.dtype(), view.shape(), view.data())));
    if checksum == Checksum::Verify && metadata.get(SHA256) != Some(&found()) {
        return Err("its contents do not match their checksum".into());
    }
    let mut tensors = BTreeMap::new();
    for (name, view) in views {
        let data = match view.dtype() {
            Dtype::F32 => view
                .data()
                .chunks_exact(4)
                .map(|le| f32::from_le_bytes([le[0], le[1], le[2], le[3]]))
                .collect(),
            Dtype::BF16 => {
                let halves: Vec<bf16> =
                    view.data().chunks_exact(2).map(|le| bf16::from_le_bytes([le[0], le[1]])).collect();
                halves.to_f32_vec()
            }
            other => return Err(format!("tensor {name} has the unexpected type {other:?}")),
        };
        let tensor = HostTensor::new(view.shape().to_vec(), data);
        tensors.insert(name.clone(), tensor.ok_or_else(|| format!("tensor {name} does not fill its shape"))?);
    }
    let meta = metadata.into_iter().filter(|(name, _)| !name.starts_with("tandem.")).collect();
    Ok(Entry { tensors, meta })
}

/// The name of an element type in the checksums of entries, which must never change. Entries have no other types.
fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "F32",
        Dtype::BF16 => "BF16",
        _ => "unexpected",
    }
}

/// Hash over every tensor's name, type, shape and bytes, in order of names.
fn digest<'a>(tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize], &'a [u8])>) -> String {
    let mut hash = Sha256::new();
    for (name, dtype, shape, bytes) in tensors {
        let shape: Vec<String> = shape.iter().map(usize::to_string).collect();
        let (dtype, shape) = (dtype_name(dtype), shape.join(", "));
        hash.update(format!("{name}\0{dtype}\0[{shape}]\0{}\0", bytes.len()));
        hash.update(bytes);
    }
    hex(&hash.finalize())
}
