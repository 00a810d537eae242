//! Changes of tensors that are applied while they are read, transparently to the models.

use std::collections::BTreeMap;
use std::sync::Arc;

use kernels::{DType, Device, Tensor};

use crate::Result;

/// A change of one tensor.
pub trait Patch: std::fmt::Debug + Send + Sync {
    /// The tensor `weight`, f32 on the CPU, with the change applied, in the same shape.
    fn patched(&self, weight: Tensor) -> Result<Tensor>;
}

/// Changes by official tensor name, each list in the order in which they are applied.
#[derive(Debug, Clone, Default)]
pub struct Patches(BTreeMap<String, Vec<Arc<dyn Patch>>>);

impl Patches {
    /// Appends a change of the tensor `name`.
    pub fn add(&mut self, name: String, patch: impl Patch + 'static) {
        self.0.entry(name).or_default().push(Arc::new(patch));
    }

    /// These, and then those of `later`.
    #[must_use]
    pub(super) fn then(mut self, later: Self) -> Self {
        for (name, patches) in later.0 {
            self.0.entry(name).or_default().extend(patches);
        }
        self
    }

    /// The tensors that are changed.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Whether the tensor `name` is changed.
    pub fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The tensor that `read` returns in a dtype on a device, with the changes of `name` applied in f32 and the sum rounded
    /// once.
    pub(super) fn applied(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
        read: impl Fn(DType, &Device) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let Some(patches) = self.0.get(name) else { return read(dtype, device) };
        let weight = read(DType::F32, &Device::Cpu)?;
        let changed = patches.iter().try_fold(weight, |weight, patch| patch.patched(weight))?;
        Ok(changed.to_dtype(dtype)?.to_device(device)?)
    }
}
