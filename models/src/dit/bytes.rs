//! Bytes of the frozen weights of a model.

use std::ops::Range;

use kernels::DType;

use super::architecture::Architecture;
use super::base::Base;
use super::layer_id::LayerId;
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
    /// Scales of quantised matrices stay.
    pub fn matrix_bytes(self, model: &dyn Architecture, range: &Range<usize>) -> u64 {
        let layers = range.clone().flat_map(|n| model.layers(n));
        let matrices = layers.flat_map(|id| model.layer_tensors(id)).filter_map(|spec| spec.adaptable());
        matrices.map(|(_, out, input)| self.frozen.stored_bytes(out, input)).sum()
    }

    /// The part of [`Self::matrix_bytes`] that stays in host memory.
    pub fn streamed_bytes(self, model: &dyn Architecture, range: &Range<usize>) -> u64 {
        let streamed = range.clone().filter(|n| self.streamed.has(*n)).flat_map(|n| {
            model.layers(n).into_iter().filter(|id| *id == LayerId::block(n)).collect::<Vec<_>>()
        });
        let matrices = streamed.flat_map(|id| model.layer_tensors(id)).filter_map(|spec| spec.adaptable());
        matrices.map(|(_, out, input)| self.frozen.stored_bytes(out, input)).sum()
    }

    /// Bytes of one tensor of the model.
    fn bytes_of(self, spec: &TensorSpec) -> u64 {
        let numbers = spec.shape.iter().product::<usize>() as u64;
        match (spec.class, spec.shape.as_slice()) {
            (class, &[out, input]) if class.is_matrix() => self.frozen.bytes(out, input),
            (TensorClass::Full, _) => numbers * DType::F32.size_in_bytes() as u64,
            _ => numbers * self.frozen.compute.size_in_bytes() as u64,
        }
    }
}
