//! How the frozen weights of a network are held.

use kernels::weight::{Coded, Format, Weight};
use kernels::{DType, Device, Tensor};

use super::Weights;
use super::checkpoint::StoredCodes;
use super::dtype::StoredDType;
use super::error::WeightsError;
use crate::Result;

/// How the frozen weights of a network are held, and what it computes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frozen {
    /// The dtype of matrix products, of what goes through them, and of the weights that are not coded.
    pub compute: DType,
    /// The matrices of the layers that the network repeats. Norms, embeddings and heads are never coded.
    pub storage: Storage,
}

/// How a matrix is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// In the dtype that it is computed with.
    Dense,
    /// One byte a number and a scale for each row.
    Coded(Format),
    /// One byte a number and a scale for each block of this many numbers of a row, as a file has it.
    Blocks(Format, usize),
}

impl Frozen {
    /// Everything in f32.
    pub const F32: Self = Self::dense(DType::F32);

    /// Nothing coded, everything in `compute`.
    pub const fn dense(compute: DType) -> Self {
        Self { compute, storage: Storage::Dense }
    }

    /// Whether a product needs the matrix decoded before it.
    pub const fn is_coded(self) -> bool {
        matches!(self.storage, Storage::Coded(_) | Storage::Blocks(..))
    }

    /// Bytes of a matrix [out, in], scales included.
    pub fn bytes(self, out: usize, input: usize) -> u64 {
        let (rows, numbers) = (out as u64, (out * input) as u64);
        let scales = match self.storage {
            Storage::Dense => 0,
            Storage::Coded(_) => rows,
            Storage::Blocks(_, block) => numbers / block as u64,
        };
        self.stored_bytes(out, input) + scales * DType::F32.size_in_bytes() as u64
    }

    /// Of [`Self::bytes`] those of the numbers, or of the codes without their scales.
    pub fn stored_bytes(self, out: usize, input: usize) -> u64 {
        let of_number = if self.is_coded() { 1 } else { self.compute.size_in_bytes() };
        (out * input * of_number) as u64
    }
}

impl Weights {
    /// Reads the matrix `name` [out, in] onto `device` in the form that `frozen` says.
    ///
    /// What is to be coded goes to the device as it is stored, is coded there and dropped: neither side holds more than
    /// this one tensor besides the result. What a file holds in these codes is used as it is, with its own scales.
    ///
    /// # Errors
    /// See [`Weights::tensor`], and 8-bit floats of another kind than the codes that are wanted.
    pub fn matrix(&self, name: &str, frozen: Frozen, device: &Device) -> Result<Weight> {
        match frozen.storage {
            Storage::Dense => Ok(Weight::Dense(self.tensor(name, frozen.compute, device)?)),
            Storage::Coded(format) | Storage::Blocks(format, _) => {
                if let Some(coded) = self.stored(name, format, frozen.compute, device)? {
                    return Ok(Weight::Coded(coded));
                }
                let dense = self.tensor(name, self.float_dtype(name), device)?;
                Ok(Weight::quantise(&dense, format, frozen.compute)?)
            }
        }
    }

    /// The matrix as its file codes it, where that is the wanted way.
    fn stored(&self, name: &str, format: Format, compute: DType, device: &Device) -> Result<Option<Coded>> {
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
        Ok(Some(Coded { format, codes, scale, compute }))
    }
}
