//! Bytes of the frozen weights of a model.

use std::ops::Range;

use kernels::DType;

use super::architecture::Architecture;
use super::base::Base;
use crate::weights::{TensorClass, TensorSpec};

impl Base {
    /// Bytes of the weights of the blocks `range` and the layers that follow them, with the embeddings if it starts at the first
    /// block and the head if it ends at the last.
    pub fn bytes(self, model: &dyn Architecture, range: &Range<usize>) -> u64 {
        let is_here = |spec: &TensorSpec| match spec.name.starts_with("head.") {
            true => range.end == model.config().layers,
            false => range.start == 0,
        };
        let ends = model.outside_tensors().into_iter().filter(is_here);
        let layers = range.clone().flat_map(|n| model.layers(n)).flat_map(|id| model.layer_tensors(id));
        ends.chain(layers).map(|spec| self.bytes_of(&spec)).sum()
    }

    /// The part of [`Self::bytes`] in matrices of linear layers, which can be parked in host memory while the model is not used.
    pub fn matrix_bytes(self, model: &dyn Architecture, range: &Range<usize>) -> u64 {
        range.clone().flat_map(|n| self.matrices(model, n)).sum()
    }

    /// Bytes of each of those matrices of block `n` and the layers that follow it: they are parked one by one. Scales of
    /// quantised matrices stay.
    pub fn matrices(self, model: &dyn Architecture, n: usize) -> Vec<u64> {
        let tensors = model.layers(n).into_iter().flat_map(|id| model.layer_tensors(id));
        let matrices = tensors.filter_map(|spec| spec.adaptable());
        matrices.map(|(_, out, input)| self.frozen.stored_bytes(out, input)).collect()
    }

    /// Bytes of one tensor of the model.
    fn bytes_of(self, spec: &TensorSpec) -> u64 {
        let numbers = spec.shape.iter().product::<usize>() as u64;
        match (spec.class, spec.shape.as_slice()) {
            (TensorClass::Matrix, &[out, input]) => self.frozen.bytes(out, input),
            (TensorClass::Full, _) => numbers * DType::F32.size_in_bytes() as u64,
            _ => numbers * self.frozen.compute.size_in_bytes() as u64,
        }
    }
}
