//! The storage and the dtypes of the frozen weights of a network.

use kernels::weight::{Format, Quantised, Weight};
use kernels::{DType, Device, Tensor};

use super::Weights;
use super::checkpoint::StoredCodes;
use super::dtype::StoredDType;
use super::error::WeightsError;
use super::loader::TensorClass;
use crate::Result;

/// How the frozen weights of a network are stored, and the dtype that it computes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frozen {
    /// The dtype of matrix products, of their inputs, and of the weights that are not quantised.
    pub compute: DType,
    /// The storage of the matrices of the repeated layers. Norms, embeddings and heads are never quantised.
    pub storage: Storage,
}

/// How a matrix is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// In the dtype that it is computed with.
    Dense,
    /// Quantised to 8 bits, with a scale for each row.
    Quantised(Format),
    /// Quantised to 8 bits, with a scale for each block of this many numbers of a row, as in the file.
    Blocks(Format, usize),
}

impl Frozen {
    /// Everything in f32.
    pub const F32: Self = Self::dense(DType::F32);

    /// Nothing quantised, everything in `compute`.
    pub const fn dense(compute: DType) -> Self {
        Self { compute, storage: Storage::Dense }
    }

    /// How a matrix of `class` is stored.
    pub fn of_class(self, class: TensorClass) -> Self {
        match self.storage {
            Storage::Quantised(format) => Self { storage: Storage::Quantised(class.format(format)), ..self },
            Storage::Dense | Storage::Blocks(..) => self,
        }
    }

    /// How `weight` is stored, one of the matrices stored as this says.
    pub fn of_weight(self, weight: &Weight) -> Self {
        match (self.storage, weight) {
            (Storage::Quantised(_), Weight::Quantised(quantised)) => {
                Self { storage: Storage::Quantised(quantised.format), ..self }
            }
            _ => self,
        }
    }

    /// Whether a matrix is stored in 8 bits a number.
    pub const fn is_quantised(self) -> bool {
        matches!(self.storage, Storage::Quantised(_) | Storage::Blocks(..))
    }

    /// Bytes of a matrix [out, in], scales included.
    pub fn bytes(self, out: usize, input: usize) -> u64 {
        let (rows, numbers) = (out as u64, (out * input) as u64);
        let scales = match self.storage {
            Storage::Dense => 0,
            Storage::Quantised(_) => rows,
            Storage::Blocks(_, block) => numbers / block as u64,
        };
        self.stored_bytes(out, input) + scales * DType::F32.size_in_bytes() as u64
    }

    /// The part of [`Self::bytes`] without scales: the numbers, or the codes.
    pub fn stored_bytes(self, out: usize, input: usize) -> u64 {
        let of_number = if self.is_quantised() { 1 } else { self.compute.size_in_bytes() };
        (out * input * of_number) as u64
    }
}

impl Weights {
    /// Loads the matrix `name` [out, in] onto `device`, stored as `frozen` says.
    ///
    /// A matrix to quantise is copied to the device as stored, quantised there and dropped: neither side has more than this one
    /// tensor in memory besides the result. A matrix that the file stores in this format is used as it is, with its own scales; one
    /// that was quantised before is read from its cache ([`Self::cached_in`]).
    ///
    /// # Errors
    /// See [`Weights::tensor`], and 8-bit floats of another format than the requested one.
    pub fn matrix(&self, name: &str, frozen: Frozen, device: &Device) -> Result<Weight> {
        match frozen.storage {
            Storage::Dense => Ok(Weight::Dense(self.tensor(name, frozen.compute, device)?)),
            Storage::Quantised(format) | Storage::Blocks(format, _) => {
                if let Some(quantised) = self.stored(name, format, frozen.compute, device)? {
                    return Ok(Weight::Quantised(quantised));
                }
                let cache = self.cache(name, format);
                if let Some(cache) = cache
                    && let Some(quantised) = cache.matrix(name, frozen.compute, device)?
                {
                    return Ok(Weight::Quantised(quantised));
                }
                let dense = self.tensor(name, self.float_dtype(name), device)?;
                let weight = Weight::quantise(&dense, format, frozen.compute)?;
                if let (Some(cache), Weight::Quantised(quantised)) = (cache, &weight) {
                    cache.write(name, quantised)?;
                }
                Ok(weight)
            }
        }
    }

    /// The quantised matrix as stored in the file, if it has the requested format.
    fn stored(
        &self,
        name: &str,
        format: Format,
        compute: DType,
        device: &Device,
    ) -> Result<Option<Quantised>> {
        let kept = self.stored_name(name).filter(|_| !self.is_patched(name));
        let (Some((checkpoint, name)), Format::E4m3) = (kept, format) else {
            return Ok(None);
        };
        if checkpoint.dtype(name) == Some(StoredDType::F8E5M2) {
            let (path, name) = (checkpoint.path().to_owned(), name.to_owned());
            let (stored, wanted) = (StoredDType::F8E5M2, "e4m3 codes; set model.base to \"bf16\"".to_owned());
            return Err(WeightsError::Conversion { path, name, stored, wanted }.into());
        }
        let Some(StoredCodes { codes, scales }) = checkpoint.codes(name, device)? else { return Ok(None) };
        let rows = codes.dim(0)?;
        let scale = match scales.len() / rows {
            1 => Tensor::from_vec(scales, rows, device)?,
            blocks => Tensor::from_vec(scales, (rows, blocks), device)?,
        };
        Ok(Some(Quantised { format, codes, scale, compute }))
    }
}
