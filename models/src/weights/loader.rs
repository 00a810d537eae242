//! Weights of a model: a checkpoint matched to what the model expects.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kernels::weight::Format;
use kernels::{DType, Device, Tensor};

use super::checkpoint::{Checkpoint, StoredCodes};
use super::dtype::StoredDType;
use super::error::{MismatchReport, Result, WeightsError};
use super::fingerprint;
use super::patch::Patches;
use super::quantised_file::QuantisedFile;

/// A tensor that a model expects: its official name and its shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Official name.
    pub name: String,
    /// Exact shape.
    pub shape: Vec<usize>,
    /// How it is stored.
    pub class: TensorClass,
    /// How exactly a file must have the shape.
    axes: Axes,
}

/// How exactly a file must have a shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Axes {
    All,
    /// Axes of length one count for nothing.
    LongerThanOne,
}

/// How a frozen tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorClass {
    /// A matrix of the repeated layers: as [`Frozen`](super::Frozen) says, possibly quantised.
    Matrix,
    /// One that only a condition's rows go through, such as the text's: the same, but never multiplied in integers, which does not pay
    /// for so few rows.
    ConditionMatrix,
    /// The dtype that the network computes in.
    Compute,
    /// f32, for every compute dtype.
    Full,
}

impl TensorClass {
    /// Whether it is the matrix of a linear layer of the repeated layers.
    pub const fn is_matrix(self) -> bool {
        matches!(self, Self::Matrix | Self::ConditionMatrix)
    }

    /// The format of a matrix of this class in a network whose matrices are quantised in `format`.
    pub const fn format(self, format: Format) -> Format {
        match (self, format) {
            (Self::ConditionMatrix, Format::RotatedInt8) => Format::Int8,
            _ => format,
        }
    }
}

impl TensorSpec {
    /// A tensor named `name` of shape `shape`, in the dtype that the network computes in.
    pub fn new(name: impl Into<String>, shape: impl Into<Vec<usize>>) -> Self {
        Self { name: name.into(), shape: shape.into(), class: TensorClass::Compute, axes: Axes::All }
    }

    /// The same, also of a file that has more or fewer axes of length one.
    pub fn with_any_ones(self) -> Self {
        Self { axes: Axes::LongerThanOne, ..self }
    }

    /// Whether a tensor of the shape `found` is it.
    fn is_fit(&self, found: &[usize]) -> bool {
        let long = |shape: &[usize]| shape.iter().copied().filter(|axis| *axis != 1).collect::<Vec<_>>();
        match self.axes {
            Axes::All => found == self.shape,
            Axes::LongerThanOne => long(found) == long(&self.shape),
        }
    }

    /// The linear layer that this is the matrix of, and that adapters may attach to: (official module name, out, in).
    pub fn adaptable(&self) -> Option<(String, usize, usize)> {
        match (self.class, self.name.strip_suffix(".weight"), self.shape.as_slice()) {
            (class, Some(module), &[out, input]) if class.is_matrix() => {
                Some((module.to_owned(), out, input))
            }
            _ => None,
        }
    }

    /// The same, stored as `class`.
    pub fn of(self, class: TensorClass) -> Self {
        Self { class, ..self }
    }
}

/// The tensors of one model, checked against its specs and ready to be read by their official names.
#[derive(Debug)]
pub struct Weights {
    source: Source,
    patches: Patches,
    /// Matrices that were quantised before.
    cache: Option<Arc<QuantisedFile>>,
}

#[derive(Debug)]
enum Source {
    /// Official name to name in the checkpoint.
    Disk {
        checkpoint: Checkpoint,
        names: BTreeMap<String, String>,
    },
    Memory(BTreeMap<String, Tensor>),
    /// Generated on request, so that only loaded tensors take memory.
    Seeded {
        shapes: BTreeMap<String, Vec<usize>>,
        seed: u64,
    },
}

impl Weights {
    /// Opens `path` and matches it to `specs`: see [`Weights::from_checkpoint`]. Prefixes that single-file
    /// repackagings put before the names are removed first.
    pub fn open(
        path: &Path,
        specs: &[TensorSpec],
        to_file_name: impl Fn(&str) -> Option<String>,
        ignored: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?.without_model_prefix()?;
        Self::from_checkpoint(checkpoint, specs, to_file_name, ignored)
    }

    /// Matches a checkpoint to `specs`: every tensor is used exactly once, or the load fails.
    ///
    /// `to_file_name` gives the name in the file of an official name, `None` meaning the same name. Names in the file
    /// for which `ignored` holds may be left over.
    ///
    /// # Errors
    /// One [`WeightsError::Mismatch`] with all missing, unexpected and misshapen names; weights that are quantised in an
    /// unsupported way.
    pub fn from_checkpoint(
        checkpoint: Checkpoint,
        specs: &[TensorSpec],
        to_file_name: impl Fn(&str) -> Option<String>,
        ignored: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        if let Some(refusal) = checkpoint.refusal() {
            return Err(WeightsError::file(checkpoint.path(), refusal));
        }
        let mut report = MismatchReport::default();
        let mut names = BTreeMap::new();
        let mut used = BTreeSet::new();
        for spec in specs {
            let name = to_file_name(&spec.name).unwrap_or_else(|| spec.name.clone());
            match checkpoint.shape(&name) {
                None => report.missing.push(name.clone()),
                Some(found) if !spec.is_fit(found) => {
                    report.misshapen.push((name.clone(), spec.shape.clone(), found.to_vec()));
                }
                Some(_) => {}
            }
            used.insert(name.clone());
            names.insert(spec.name.clone(), name);
        }
        let is_left = |name: &&str| !used.contains(*name) && !ignored(name) && !checkpoint.is_described(name);
        let unexpected = checkpoint.names().filter(is_left);
        report.unexpected.extend(unexpected.map(str::to_owned));
        match report.is_empty() {
            true => Ok(Self::of(Source::Disk { checkpoint, names })),
            false => Err(WeightsError::Mismatch { path: checkpoint.path().to_owned(), report }),
        }
    }

    /// Weights from tensors in memory, by official names: for tests and for models generated from a seed.
    pub fn from_tensors(tensors: BTreeMap<String, Tensor>) -> Self {
        Self::of(Source::Memory(tensors))
    }

    /// Weights generated from `seed` on request, for measuring speed and memory without a checkpoint: gains of norms are one,
    /// other vectors zero, everything else small numbers, generated on the device.
    pub fn seeded(specs: Vec<TensorSpec>, seed: u64) -> Self {
        let shapes = specs.into_iter().map(|spec| (spec.name, spec.shape)).collect();
        Self::of(Source::Seeded { shapes, seed })
    }

    /// The same weights with `patches` behind those that they have, which are applied when a tensor is read.
    pub fn patched(self, patches: Patches) -> Self {
        Self { patches: self.patches.then(patches), ..self }
    }

    /// The same weights, whose quantised matrices are read from `file` where it has them, and written there otherwise.
    pub fn cached_in(self, file: Arc<QuantisedFile>) -> Self {
        Self { cache: Some(file), ..self }
    }

    /// The file of the quantised matrices that are not patched.
    pub(super) fn cache(&self, name: &str, format: Format) -> Option<&QuantisedFile> {
        self.cache.as_deref().filter(|cache| cache.has(name, format) && !self.is_patched(name))
    }

    fn of(source: Source) -> Self {
        Self { source, patches: Patches::default(), cache: None }
    }

    /// Whether the tensor `name` has a patch.
    pub fn is_patched(&self, name: &str) -> bool {
        self.patches.contains(name)
    }

    /// The names of the tensors that are patched.
    pub fn patched_names(&self) -> impl Iterator<Item = &str> {
        self.patches.names()
    }

    /// Reads the tensor `name` into `place`, in its dtype and on its device, where `changed` has a patch for it.
    ///
    /// # Errors
    /// See [`Weights::tensor`].
    pub fn reload(&self, name: &str, changed: &Self, place: &mut Tensor) -> crate::Result<()> {
        if changed.is_patched(name) {
            *place = self.tensor(name, place.dtype(), place.device())?;
        }
        Ok(())
    }

    /// Reads one tensor by its official name, converted to `dtype`, on `device`.
    ///
    /// # Errors
    /// See [`Checkpoint::tensor`].
    pub fn tensor(&self, name: &str, dtype: DType, device: &Device) -> crate::Result<Tensor> {
        self.patches.applied(name, dtype, device, |dtype, device| self.unpatched(name, dtype, device))
    }

    /// The tensor `name` without patches.
    fn unpatched(&self, name: &str, dtype: DType, device: &Device) -> crate::Result<Tensor> {
        match &self.source {
            Source::Disk { checkpoint, names } => {
                checkpoint.tensor(names.get(name).map_or(name, String::as_str), dtype, device)
            }
            Source::Memory(tensors) => match tensors.get(name) {
                Some(tensor) => Ok(tensor.to_dtype(dtype)?.to_device(device)?),
                None => Err(not_in_memory(name)),
            },
            Source::Seeded { shapes, seed } => match shapes.get(name) {
                Some(shape) => super::seeded::tensor(name, shape, *seed, dtype, device),
                None => Err(not_in_memory(name)),
            },
        }
    }

    /// The dtype that represents the stored numbers of a tensor exactly; f32 for an unknown name, which [`Weights::tensor`]
    /// reports.
    pub(super) fn float_dtype(&self, name: &str) -> DType {
        if self.is_patched(name) {
            return DType::F32;
        }
        match &self.source {
            Source::Disk { checkpoint, names } => {
                names.get(name).and_then(|name| checkpoint.dtype(name)).map_or(DType::F32, StoredDType::float)
            }
            Source::Memory(tensors) => tensors.get(name).map_or(DType::F32, Tensor::dtype),
            Source::Seeded { .. } => DType::BF16,
        }
    }

    /// The codes of a matrix that is stored in e4m3, with its scales; `None` if it is not, or is patched.
    ///
    /// # Errors
    /// See [`Checkpoint::codes`].
    pub fn codes(&self, name: &str, device: &Device) -> crate::Result<Option<StoredCodes>> {
        match self.stored_name(name).filter(|_| !self.is_patched(name)) {
            Some((checkpoint, name)) => checkpoint.codes(name, device),
            None => Ok(None),
        }
    }

    /// The checkpoint of a tensor, and the tensor's name in it.
    pub(super) fn stored_name(&self, name: &str) -> Option<(&Checkpoint, &str)> {
        match &self.source {
            Source::Disk { checkpoint, names } => Some((checkpoint, names.get(name)?)),
            Source::Memory(_) | Source::Seeded { .. } => None,
        }
    }

    /// Official names, sorted.
    pub fn names(&self) -> Vec<&str> {
        match &self.source {
            Source::Disk { names, .. } => names.keys().map(String::as_str).collect(),
            Source::Memory(tensors) => tensors.keys().map(String::as_str).collect(),
            Source::Seeded { shapes, .. } => shapes.keys().map(String::as_str).collect(),
        }
    }

    /// Whether the model has a tensor of this official name.
    pub fn contains(&self, name: &str) -> bool {
        match &self.source {
            Source::Disk { names, .. } => names.contains_key(name),
            Source::Memory(tensors) => tensors.contains_key(name),
            Source::Seeded { shapes, .. } => shapes.contains_key(name),
        }
    }

    /// The shape of a tensor by its official name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        match &self.source {
            Source::Disk { checkpoint, names } => checkpoint.shape(names.get(name)?),
            Source::Memory(tensors) => tensors.get(name).map(Tensor::dims),
            Source::Seeded { shapes, .. } => shapes.get(name).map(Vec::as_slice),
        }
    }

    /// The checkpoint behind these weights; `None` for weights in memory.
    pub fn checkpoint(&self) -> Option<&Checkpoint> {
        match &self.source {
            Source::Disk { checkpoint, .. } => Some(checkpoint),
            Source::Memory(_) | Source::Seeded { .. } => None,
        }
    }

    /// A short text that identifies these weights: [`Checkpoint::fingerprint`], or SHA-256 over tensors in memory.
    pub fn fingerprint(&self) -> crate::Result<String> {
        match &self.source {
            Source::Disk { checkpoint, .. } => Ok(checkpoint.fingerprint()?),
            Source::Memory(tensors) => fingerprint::of_tensors(tensors.iter().map(|(n, t)| (n.as_str(), t))),
            Source::Seeded { shapes, seed } => Ok(format!("{} tensors of seed {seed}", shapes.len())),
        }
    }
}

fn not_in_memory(name: &str) -> crate::Error {
    let (path, name) = (PathBuf::from("(weights in memory)"), name.to_owned());
    WeightsError::NoSuchTensor { path, name }.into()
}
