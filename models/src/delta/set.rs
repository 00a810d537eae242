//! The adapters of a model in memory, by the module that each is attached to.

use std::collections::BTreeMap;

use kernels::weight::Weight;
use kernels::{Device, Tensor};

use super::on_device::Delta;
use crate::{Error, Result};

/// An adapter that is attached to a module.
#[derive(Debug, Clone)]
pub struct Adapter {
    delta: Delta,
    trainable: bool,
}

impl Adapter {
    /// An adapter that is only applied.
    pub fn frozen(delta: impl Into<Delta>) -> Self {
        Self { delta: delta.into(), trainable: false }
    }

    /// An adapter that is trained.
    pub fn trainable(delta: impl Into<Delta>) -> Self {
        Self { delta: delta.into(), trainable: true }
    }

    /// Its contribution.
    pub fn delta(&self) -> &Delta {
        &self.delta
    }

    /// Whether it is trained.
    pub fn is_trainable(&self) -> bool {
        self.trainable
    }
}

/// The adapters of a model, or of its part on one device, by official module name.
///
/// A module has at most one trainable adapter and any number of frozen ones.
#[derive(Debug, Clone, Default)]
pub struct Adapters {
    by_module: BTreeMap<String, Vec<Adapter>>,
}

impl Adapters {
    /// Adds `adapter` to the module of the official name `module`.
    pub fn attach(&mut self, module: String, adapter: Adapter) {
        self.by_module.entry(module).or_default().push(adapter);
    }

    /// Appends all of `others`.
    pub fn extend(&mut self, others: Self) {
        for (module, adapters) in others.by_module {
            self.by_module.entry(module).or_default().extend(adapters);
        }
    }

    /// Removes those that are only applied.
    pub fn drop_frozen(&mut self) {
        self.by_module.values_mut().for_each(|adapters| adapters.retain(Adapter::is_trainable));
        self.by_module.retain(|_, adapters| !adapters.is_empty());
    }

    /// The same where those that are trained have no effect ([`Delta::without_effect`]).
    #[must_use]
    pub fn trained_off(&self) -> Self {
        let mut all = self.clone();
        for adapter in all.by_module.values_mut().flatten().filter(|adapter| adapter.trainable) {
            adapter.delta = adapter.delta.without_effect();
        }
        all
    }

    /// The adapters of one module.
    pub fn of(&self, module: &str) -> &[Adapter] {
        self.by_module.get(module).map_or(&[], Vec::as_slice)
    }

    /// Every module with its adapters, ordered by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[Adapter])> {
        self.by_module.iter().map(|(module, adapters)| (module.as_str(), adapters.as_slice()))
    }

    /// The part whose modules `keep` accepts, on `device`.
    pub fn part(&self, device: &Device, keep: impl Fn(&str) -> bool) -> Result<Self> {
        let mut part = Self::default();
        for (module, adapters) in self.iter().filter(|(module, _)| keep(module)) {
            for Adapter { delta, trainable } in adapters {
                let delta = delta.to_device(device)?;
                part.attach(module.to_owned(), Adapter { delta, trainable: *trainable });
            }
        }
        Ok(part)
    }

    /// Whether [`Self::settle`] reads the weights of the layers.
    pub fn wants_weights(&self) -> bool {
        self.by_module.values().flatten().any(|adapter| adapter.delta.wants_product())
    }

    /// Calls [`Delta::settle`] on every adapter with the frozen weight of its layer, which `weight_of` gives by module name. Must
    /// be called before the first pass.
    ///
    /// # Errors
    /// A module without a weight.
    pub fn settle<'a>(&mut self, weight_of: impl Fn(&str) -> Option<&'a Weight>) -> Result<()> {
        for (module, adapters) in &mut self.by_module {
            let weight = weight_of(module)
                .ok_or_else(|| Error::Mismatch(format!("there is no layer {module} for its adapter")))?;
            adapters.iter_mut().try_for_each(|adapter| adapter.delta.settle(weight))?;
        }
        Ok(())
    }

    /// The trainable tensors by official name (`<module>.lora_A.weight`, `<module>.magnitude`), ordered by name.
    pub fn parameters(&self) -> BTreeMap<String, Tensor> {
        let mut parameters = BTreeMap::new();
        for (module, adapters) in self.iter() {
            for adapter in adapters.iter().filter(|adapter| adapter.trainable) {
                let named = adapter.delta.tensors().into_iter();
                parameters.extend(named.map(|(name, tensor)| (format!("{module}.{name}"), tensor.clone())));
            }
        }
        parameters
    }

    /// Replaces the trainable tensors; those without a new value stay unchanged.
    pub fn set_parameters(&mut self, parameters: &BTreeMap<String, Tensor>) {
        for (module, adapters) in &mut self.by_module {
            for adapter in adapters.iter_mut().filter(|adapter| adapter.trainable) {
                adapter.delta.replace(|name| parameters.get(&format!("{module}.{name}")).cloned());
            }
        }
    }
}
