//! Loads modules by their descriptions.

use kernels::weight::Weight;
use kernels::{DType, Device, Tensor};

use super::layer_id::LayerId;
use super::linear::Linear;
use super::modules::{BEFORE_HINTS, BLOCK, Module, OUTSIDE};
use crate::weights::{Frozen, TensorClass, Weights};
use crate::{Error, Result};

/// Loads modules by their descriptions: those of a layer, or those outside the layers.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    weights: &'a Weights,
    prefix: String,
    modules: &'static [Module],
    frozen: Frozen,
    device: &'a Device,
}

impl<'a> Reader<'a> {
    /// For the transformer block in the layer `id`.
    pub fn block(weights: &'a Weights, id: LayerId, frozen: Frozen, device: &'a Device) -> Self {
        Self { weights, prefix: format!("{id}."), modules: BLOCK, frozen, device }
    }

    /// For the modules outside the layers.
    pub fn outside(weights: &'a Weights, frozen: Frozen, device: &'a Device) -> Self {
        Self { weights, prefix: String::new(), modules: OUTSIDE, frozen, device }
    }

    /// Weight and bias of what the context of the side chain goes through before its first block.
    ///
    /// # Errors
    /// If the weights cannot be read.
    pub fn before_side_chain(&self) -> Result<(Weight, Tensor)> {
        let tensor = |end: &str| {
            let name = format!("{}.{}.{end}", LayerId::side(0), BEFORE_HINTS.official);
            self.weights.tensor(&name, self.frozen.compute, self.device)
        };
        Ok((Weight::Dense(tensor("weight")?), tensor("bias")?))
    }

    /// The tensor `name`, of which there is no description since how many there are depends on sizes.
    ///
    /// # Errors
    /// If the weights cannot be read.
    pub fn undescribed(&self, name: &str, dtype: DType) -> Result<Tensor> {
        self.weights.tensor(name, dtype, self.device)
    }

    /// Weight and bias of a linear layer `name` that is not described.
    ///
    /// # Errors
    /// If the weights cannot be read.
    pub fn undescribed_linear(&self, name: &str) -> Result<(Weight, Tensor)> {
        let tensor = |end: &str| self.undescribed(&format!("{name}.{end}"), self.frozen.compute);
        Ok((Weight::Dense(tensor("weight")?), tensor("bias")?))
    }

    /// The linear layer `module` of a block.
    ///
    /// # Errors
    /// If the weights cannot be read, or the module is not described as such a layer.
    pub fn linear(&self, module: &str) -> Result<Linear> {
        match self.described(module)?.class {
            class if class.is_matrix() => {
                let frozen = self.frozen.of_class(class);
                Linear::load(self.weights, format!("{}{module}", self.prefix), frozen, self.device)
            }
            class => Err(Error::Mismatch(format!("{}{module} is not a matrix, but {class:?}", self.prefix))),
        }
    }

    /// Weight and bias of `module`, which is not a linear layer of a block; a weight of more than two axes is flattened to a
    /// matrix.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    pub fn dense(&self, module: &str) -> Result<(Weight, Tensor)> {
        let weight = self.tensor(module, ".weight")?.flatten_from(1)?;
        Ok((Weight::Dense(weight), self.tensor(module, ".bias")?))
    }

    /// The tensor of `module` whose name is the module's followed by `end`.
    ///
    /// # Errors
    /// If the weights cannot be read, or the module is not described.
    pub fn tensor(&self, module: &str, end: &str) -> Result<Tensor> {
        let dtype = match self.described(module)?.class {
            TensorClass::Full => DType::F32,
            _ => self.frozen.compute,
        };
        self.weights.tensor(&format!("{}{module}{end}", self.prefix), dtype, self.device)
    }

    fn described(&self, module: &str) -> Result<&'static Module> {
        let found = self.modules.iter().find(|described| described.official == module);
        found.ok_or_else(|| Error::Mismatch(format!("there is no description of {}{module}", self.prefix)))
    }
}
