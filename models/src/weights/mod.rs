//! Checkpoints on disk: opened, checked against what a model expects, read tensor by tensor.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

/// A tensor that a model expects: its name in the model's own (official) words and its shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Official name.
    pub name: String,
    /// Exact shape.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// A tensor named `name` of shape `shape`.
    pub fn new(name: impl Into<String>, shape: impl Into<Vec<usize>>) -> Self {
        Self { name: name.into(), shape: shape.into() }
    }
}

/// Why a checkpoint was refused.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// Placeholder.
    #[error("{0}")]
    Other(String),
}

/// The tensors of one model, checked against its specs and ready to be read.
pub struct Weights {
    tensors: BTreeMap<String, Tensor>,
}

impl Weights {
    /// Opens `path` and matches it to `specs`. `to_file_name` gives the name in the file of a spec's name.
    pub fn open(
        path: &Path,
        specs: &[TensorSpec],
        to_file_name: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, WeightsError> {
        let file = candle_core::safetensors::load(path, &Device::Cpu)
            .map_err(|e| WeightsError::Other(e.to_string()))?;
        let mut tensors = BTreeMap::new();
        for spec in specs {
            let name = to_file_name(&spec.name).unwrap_or_else(|| spec.name.clone());
            let tensor = file.get(&name).ok_or_else(|| WeightsError::Other(format!("{name} missing")))?;
            tensors.insert(spec.name.clone(), tensor.clone());
        }
        Ok(Self { tensors })
    }

    /// Reads one tensor by its official name, converted to `dtype`, on `device`.
    pub fn tensor(&self, name: &str, dtype: DType, device: &Device) -> crate::Result<Tensor> {
        let tensor = self.tensors.get(name).ok_or_else(|| WeightsError::Other(name.to_owned()))?;
        Ok(tensor.to_dtype(dtype)?.to_device(device)?)
    }
}
