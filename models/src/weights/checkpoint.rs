//! A checkpoint on disk: one file or a sharded folder, known from its headers, read tensor by tensor.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kernels::{DType, Device, Tensor};

use super::dtype::StoredDType;
use super::entry::Entry;
use super::error::{Result, WeightsError};
use super::kind::FileKind;
use super::quantised::{Grid, StoredScales};
use super::read::Scales;
use super::stored::StoredFile;
use super::{folder, header, pth, read};

/// Prefixes of the names of a diffusion model in files of ComfyUI and other tools.
const PREFIXES: [&str; 2] = ["model.diffusion_model.", "diffusion_model."];

/// The tensors of a checkpoint. Opening reads and checks headers only; each tensor is read when it is asked for,
/// so that memory never holds a whole model. The files stay open.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<StoredFile>,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
    stored_scales: StoredScales,
    /// Tensors whose rows the files have as several tensors.
    joined: BTreeMap<String, Joined>,
}

/// A tensor whose rows are those of several, in their order.
#[derive(Debug)]
struct Joined {
    parts: Vec<String>,
    shape: Vec<usize>,
}

/// A quantised weight as a file stores it.
#[derive(Debug)]
pub struct StoredCodes {
    /// u8, of the weight's shape: OCP 8-bit floats e4m3fn.
    pub codes: Tensor,
    /// f32, row by row.
    pub scales: Vec<f32>,
}

impl Checkpoint {
    /// Opens a `.safetensors` file, a `.pth` file (a plain dictionary of tensors; nothing in it is ever executed), or
    /// a folder with one `.safetensors` file or with shards and their `.safetensors.index.json`.
    ///
    /// # Errors
    /// Missing or truncated files and shards, headers that do not describe their file exactly, an index that does not
    /// match its shards, and `.pth` files that are more than tensors.
    pub fn open(path: &Path) -> Result<Self> {
        let kind = std::fs::metadata(path).map_err(WeightsError::io("open", path))?;
        if kind.is_dir() {
            let shards = folder::find(path)?;
            let checkpoint = Self::from_shards(path, &shards.paths)?;
            shards.check(|name| {
                let entry = checkpoint.entries.get(name)?;
                Some(checkpoint.files[entry.file].path())
            })?;
            return Ok(checkpoint);
        }
        let kind = FileKind::of(path)?;
        if let Some(reason) = kind.refusal() {
            return Err(WeightsError::file(path, reason));
        }
        if kind != FileKind::TorchZip {
            return Self::from_shards(path, &[path.to_owned()]);
        }
        let file = StoredFile::open(path)?;
        let entries = pth::read(&file, 0)?;
        Self::new(path, vec![file], entries, BTreeMap::new())
    }

    fn new(
        path: &Path,
        files: Vec<StoredFile>,
        entries: BTreeMap<String, Entry>,
        metadata: BTreeMap<String, String>,
    ) -> Result<Self> {
        let bytes = |name: &str| read::bytes(&files[entries[name].file], &entries[name]);
        let stored_scales = StoredScales::find(&entries, &metadata, bytes)?;
        let joined = BTreeMap::new();
        Ok(Self { path: path.to_owned(), files, entries, metadata, stored_scales, joined })
    }

    /// Adds the tensor `name`, whose rows are those of `parts` in their order; nothing where a part is missing.
    ///
    /// # Errors
    /// Parts whose rows are of different shapes.
    pub fn joining(mut self, name: String, parts: &[String]) -> Result<Self> {
        let shapes: Option<Vec<&[usize]>> = parts.iter().map(|part| self.shape(part)).collect();
        let Some(shapes) = shapes.filter(|shapes| shapes.iter().all(|shape| !shape.is_empty())) else {
            return Ok(self);
        };
        let rows = shapes.iter().map(|shape| shape[0]).sum();
        if shapes.windows(2).any(|pair| pair[0][1..] != pair[1][1..]) {
            let why = format!("{} have rows of different shapes", parts.join(" and "));
            return Err(WeightsError::file(&self.path, why));
        }
        let shape = shapes.first().map_or_else(Vec::new, |first| [&[rows], &first[1..]].concat());
        self.joined.insert(name, Joined { parts: parts.to_vec(), shape });
        Ok(self)
    }

    /// Opens several safetensors files as one checkpoint found at `path`.
    fn from_shards(path: &Path, shards: &[PathBuf]) -> Result<Self> {
        let files = shards.iter().map(|shard| StoredFile::open(shard)).collect::<Result<Vec<_>>>()?;
        let mut entries = BTreeMap::new();
        let mut metadata = BTreeMap::new();
        for (i, file) in files.iter().enumerate() {
            let header = header::read(file, i)?;
            metadata.extend(header.metadata);
            for (name, entry) in header.entries {
                if let Some(other) = entries.insert(name.clone(), entry) {
                    let other = files[other.file].path().display().to_string();
                    return Err(WeightsError::file(
                        file.path(),
                        format!("the tensor `{name}` is also in {other}"),
                    ));
                }
            }
        }
        Self::new(path, files, entries, metadata)
    }

    /// Removes `model.diffusion_model.` and `diffusion_model.` from the names, as single-file repackagings have them.
    /// Not for adapter files, whose style shows in the prefix.
    ///
    /// # Errors
    /// When two names become the same.
    pub fn without_model_prefix(mut self) -> Result<Self> {
        for (name, entry) in std::mem::take(&mut self.entries) {
            let short = PREFIXES.iter().find_map(|p| name.strip_prefix(p)).unwrap_or(&name).to_owned();
            if self.entries.insert(short.clone(), entry).is_some() {
                return Err(WeightsError::file(
                    &self.path,
                    format!("it holds `{short}` with and without a prefix"),
                ));
            }
        }
        Self::new(&self.path, self.files, self.entries, self.metadata)
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files that hold the tensors.
    pub fn files(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.files.iter().map(StoredFile::path)
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Names with their type and shape, sorted by name.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.entries.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        let joined = self.joined.get(name).map(|joined| joined.shape.as_slice());
        joined.or_else(|| self.entries.get(name).map(|e| e.shape.as_slice()))
    }

    /// The element type of a tensor in the file.
    pub fn dtype(&self, name: &str) -> Option<StoredDType> {
        let name = self.joined.get(name).and_then(|joined| joined.parts.first()).map_or(name, String::as_str);
        self.entries.get(name).map(|e| e.dtype)
    }

    /// The `__metadata__` of safetensors files, of all shards together; empty for `.pth`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Bytes of all tensors as they are stored.
    pub fn total_bytes(&self) -> u64 {
        self.entries.values().map(|e| e.bytes() as u64).sum()
    }

    /// Reads one tensor, converted to `dtype`, on `device`. Weights of eight bits are multiplied by their scales in
    /// f32, then rounded once.
    ///
    /// # Errors
    /// An unknown name, a value that is NaN or infinite (in the file or after conversion), a stored type that cannot
    /// become `dtype`, or a file that changed since it was opened.
    pub fn tensor(&self, name: &str, dtype: DType, device: &Device) -> crate::Result<Tensor> {
        if let Some(joined) = self.joined.get(name) {
            let parts = joined.parts.iter().map(|part| self.tensor(part, dtype, device));
            return Ok(Tensor::cat(&parts.collect::<crate::Result<Vec<_>>>()?, 0)?);
        }
        let entry = self.entry(name)?;
        let scales = self.scales(name, entry)?;
        read::tensor(&self.files[entry.file], name, entry, dtype, scales.as_ref(), device)
    }

    /// The codes of a matrix that is stored in e4m3, and its scales, one for each row or for each block of one: as they
    /// are stored, nothing is rounded. `None` for a tensor of another type.
    ///
    /// # Errors
    /// Those of [`Self::tensor`].
    pub fn codes(&self, name: &str, device: &Device) -> crate::Result<Option<StoredCodes>> {
        if let Some(joined) = self.joined.get(name) {
            let parts = joined.parts.iter().map(|part| self.codes(part, device));
            let parts: Option<Vec<_>> = parts.collect::<crate::Result<Option<Vec<_>>>>()?;
            let Some(parts) = parts else { return Ok(None) };
            let codes = parts.iter().map(|part| &part.codes).collect::<Vec<_>>();
            let codes = Tensor::cat(&codes, 0)?;
            return Ok(Some(StoredCodes {
                codes,
                scales: parts.into_iter().flat_map(|p| p.scales).collect(),
            }));
        }
        let entry = self.entry(name)?;
        let &[rows, columns] = entry.shape.as_slice() else { return Ok(None) };
        if entry.dtype != StoredDType::F8E4M3 || entry.strides.is_some() {
            return Ok(None);
        }
        let scales = match self.scales(name, entry)? {
            None => vec![1.0; rows],
            Some(Scales { values, each }) if each == rows * columns => vec![values[0]; rows],
            Some(Scales { values, .. }) => values,
        };
        let codes = read::codes(&self.files[entry.file], name, entry, device)?;
        Ok(Some(StoredCodes { codes, scales }))
    }

    /// The scales of a weight; none where it has none.
    fn scales(&self, name: &str, entry: &Entry) -> crate::Result<Option<Scales>> {
        let Some(scale) = self.stored_scales.scales.get(name) else { return Ok(None) };
        let of = self.entry(&scale.tensor)?;
        let file = &self.files[of.file];
        let values = read::tensor(file, &scale.tensor, of, DType::F32, None, &Device::Cpu)?;
        let values: Vec<f32> = values.flatten_all()?.to_vec1()?;
        // The grid divides its weight: this was checked when the file was opened.
        let each = entry.elements() / values.len();
        Ok(Some(Scales { values, each }))
    }

    /// Whether a tensor only describes how another one is stored.
    pub fn is_side(&self, name: &str) -> bool {
        self.stored_scales.side.contains(name)
    }

    /// Whether another tensor says what it is for: it describes how that one is stored, or is a part of its rows.
    pub fn is_described(&self, name: &str) -> bool {
        self.is_side(name) || self.joined.values().any(|joined| joined.parts.iter().any(|part| part == name))
    }

    /// How 8-bit weights are scaled, with the number of weights of each kind of scale; `None` for weights without a scale.
    pub fn scalings(&self) -> BTreeMap<Option<Grid>, usize> {
        let mut counts = BTreeMap::new();
        let quantised = |entry: &Entry| matches!(entry.dtype, StoredDType::F8E4M3 | StoredDType::F8E5M2);
        for (name, _) in self.entries.iter().filter(|(name, entry)| quantised(entry) && !self.is_side(name)) {
            *counts.entry(self.stored_scales.scales.get(name).map(|scale| scale.grid)).or_default() += 1;
        }
        counts
    }

    /// The finest scale grid of the matrices of a network's layers, if all of them are stored in e4m3, else `None`. Prefixes of
    /// names must have been removed.
    pub fn quantised_layers(&self) -> Option<Grid> {
        let is_matrix = |(name, entry): &(&String, &Entry)| {
            let in_layer = name.starts_with("blocks.") || name.starts_with("encoder.block.");
            let is_table = name.contains("relative_attention_bias") || name.contains("pos_embedding");
            in_layer && name.ends_with(".weight") && entry.shape.len() == 2 && !is_table
        };
        let mut finest = None;
        for (name, entry) in self.entries.iter().filter(is_matrix) {
            if entry.dtype != StoredDType::F8E4M3 {
                return None;
            }
            finest = finest
                .max(Some(self.stored_scales.scales.get(name).map_or(Grid::Tensor, |scale| scale.grid)));
        }
        finest
    }

    /// Why the weights of an intact file cannot be read: they are quantised in an unsupported way.
    pub fn refusal(&self) -> Option<&str> {
        self.stored_scales.refusal.as_deref()
    }

    /// The bytes of one tensor as stored, in row-major order: for tensors that are not numbers, such as an embedded tokenizer.
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let entry = self.entry(name)?;
        read::bytes(&self.files[entry.file], entry)
    }

    /// A short text that identifies these weights: SHA-256 over names, types, shapes and a sample of the bytes of each
    /// tensor. Reads a few kilobytes per tensor, never the whole file; the place and layout of the files do not count.
    pub fn fingerprint(&self) -> Result<String> {
        super::fingerprint::of(self.entries.iter().map(|(name, e)| (name.as_str(), &self.files[e.file], e)))
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        let missing = || WeightsError::NoSuchTensor { path: self.path.clone(), name: name.to_owned() };
        self.entries.get(name).ok_or_else(missing)
    }
}
