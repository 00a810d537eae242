//! One tensor of a checkpoint, known from headers alone.

use super::dtype::StoredDType;

/// The location, type and shape of a tensor. Checked against the length of its file when the file was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Element type in the file.
    pub dtype: StoredDType,
    /// Shape.
    pub shape: Vec<usize>,
    /// Which file of the checkpoint.
    pub(crate) file: usize,
    /// Absolute offset of the first element, in bytes.
    pub(crate) offset: u64,
    /// Strides in elements, where the elements are not in row-major order (`.pth` only).
    pub(crate) strides: Option<Vec<usize>>,
}

impl Entry {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of the elements, in the stored type.
    pub fn bytes(&self) -> usize {
        self.elements() * self.dtype.size()
    }

    /// Bytes from the first element to the end of the last in the file.
    pub(crate) fn span_bytes(&self) -> usize {
        match &self.strides {
            None => self.bytes(),
            Some(strides) => span(&self.shape, strides).unwrap_or(0) * self.dtype.size(),
        }
    }
}

/// Number of elements of `shape`, or `None` if it overflows.
pub(crate) fn checked_elements(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
}

/// Elements from the first to the last one of a strided view, inclusive, or `None` if it overflows.
pub(crate) fn span(shape: &[usize], strides: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    let last =
        shape.iter().zip(strides).try_fold(0usize, |n, (&d, &s)| n.checked_add((d - 1).checked_mul(s)?))?;
    last.checked_add(1)
}

/// Whether `strides` describe row-major order of `shape`.
pub(crate) fn is_row_major(shape: &[usize], strides: &[usize]) -> bool {
    if shape.contains(&0) {
        return true;
    }
    let mut expected = 1usize;
    for (&d, &s) in shape.iter().zip(strides).rev() {
        // The stride of an axis of length one is never used: PyTorch leaves anything there.
        if d != 1 && s != expected {
            return false;
        }
        expected = expected.wrapping_mul(d);
    }
    true
}
