//! Applying adapters to a model: unmerged, or merged into its weights.
//!
//! Unmerged, the factors of layers inside the blocks are applied as low-rank products. Everything else that files may contain
//! (embeddings, head, norms, biases, differences of whole tensors) is merged into the weights while they are loaded.

use std::sync::Arc;

use kernels::{DType, Device, Tensor};

use super::files::AdapterFile;
use crate::delta::{Adapter, Adapters, Change, Delta};
use crate::dit::DitConfig;
use crate::weights::{Patch, Patches, Weights};
use crate::{Error, Result};

/// An adapter to apply.
#[derive(Debug, Clone)]
pub struct Source {
    /// Its path, for messages.
    pub name: String,
    /// Its contents.
    pub file: AdapterFile,
    /// The factor of its changes.
    pub strength: f64,
}

/// How adapters of the layers' matrices are applied. Everything else that an adapter changes is always merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ApplyMode {
    /// As low-rank products; the weights are unchanged.
    Unmerged,
    /// Added to the weights.
    Merged,
}

/// Adapters, ready for a model.
#[derive(Debug, Default)]
pub struct Applied {
    /// The unmerged adapters, frozen.
    pub adapters: Adapters,
    /// The changes to merge into weights.
    pub patches: Patches,
    /// Modules of an image branch that the model lacks, each with the adapter that changes it.
    pub left_out: Vec<(String, String)>,
}

/// Applies `sources` to a model of the sizes `config`.
///
/// # Errors
/// If the model lacks a module (other than one of an image branch), or has it in another width.
pub fn apply(sources: &[Source], config: &DitConfig, mode: ApplyMode) -> Result<Applied> {
    let mut applied = Applied::default();
    let shapes = config.tensors().into_iter().map(|spec| (spec.name, spec.shape)).collect();
    let adaptable = config.adaptable_modules().into_iter().map(|(module, ..)| module).collect();
    let model = Model { shapes, adaptable };
    for source in sources {
        for (module, change) in &source.file.modules {
            let Some(shape) = model.shape(&format!("{module}.weight"), source, &mut applied)? else {
                continue;
            };
            let (out, input) = (shape[0], shape[1..].iter().product::<usize>());
            if change.dims()? != (out, input) {
                return Err(foreign(source, module, change.dims()?, &format!("has it {out} x {input}")));
            }
            if mode == ApplyMode::Unmerged && model.adaptable.contains(module) {
                applied
                    .adapters
                    .attach(module.clone(), Adapter::frozen(Delta::new(change, source.strength)?));
            } else {
                let merged = Merged { change: Arc::new(change.clone()), strength: source.strength };
                applied.patches.add(format!("{module}.weight"), merged);
            }
        }
        for (name, difference) in &source.file.differences {
            let Some(shape) = model.shape(name, source, &mut applied)? else { continue };
            if shape.iter().product::<usize>() != difference.elem_count() {
                return Err(Error::Mismatch(format!(
                    "{}: it adds a tensor of shape {:?} to {name}, and the model has it in {shape:?}; \
                     it was made for a model of other sizes",
                    source.name,
                    difference.dims()
                )));
            }
            applied
                .patches
                .add(name.clone(), Added { difference: difference.clone(), strength: source.strength });
        }
    }
    Ok(applied)
}

/// Gives every DoRA of `file` the magnitudes of both conventions, computed with the base model `weights`.
///
/// # Errors
/// If the base lacks a module, or has it in another width.
pub fn complete(file: &mut AdapterFile, weights: &Weights) -> Result<()> {
    for (module, change) in &mut file.modules {
        if let Change::Dora(dora) = change {
            let weight =
                weights.tensor(&format!("{module}.weight"), DType::F32, &Device::Cpu)?.flatten_from(1)?;
            let dims = (dora.pair.b.dim(0)?, dora.pair.a.dim(1)?);
            if weight.dims2()? != dims {
                let shape = weight.dims();
                return Err(Error::Mismatch(format!(
                    "{module} is {dims:?} in the adapter and {shape:?} in the base"
                )));
            }
            *change = Change::Dora(dora.clone().with_base(&weight)?);
        }
    }
    Ok(())
}

/// The tensors of a model.
struct Model {
    shapes: std::collections::BTreeMap<String, Vec<usize>>,
    adaptable: std::collections::BTreeSet<String>,
}

impl Model {
    /// The shape of the tensor `name`; `None`, with a note, if it belongs to an image branch that the model lacks.
    fn shape(&self, name: &str, source: &Source, applied: &mut Applied) -> Result<Option<&[usize]>> {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        match self.shapes.get(name) {
            Some(shape) => Ok(Some(shape)),
            None if module.contains("_img") || module.starts_with("img_emb") => {
                applied.left_out.push((source.name.clone(), module.to_owned()));
                Ok(None)
            }
            None => {
                let dims = source.file.modules.get(module).map(Change::dims).transpose()?.unwrap_or_default();
                Err(foreign(source, module, dims, "lacks it"))
            }
        }
    }
}

fn foreign(source: &Source, module: &str, (out, input): (usize, usize), model: &str) -> Error {
    Error::Mismatch(format!(
        "{}: it changes {module} ({out} x {input}), and the model {model}; it was made for another model",
        source.name
    ))
}

/// A change that is merged into the weight of its module.
#[derive(Debug)]
struct Merged {
    change: Arc<Change>,
    strength: f64,
}

impl Patch for Merged {
    fn patched(&self, weight: Tensor) -> Result<Tensor> {
        self.change.merged(&weight, self.strength)
    }
}

/// A difference that is added.
#[derive(Debug)]
struct Added {
    difference: Tensor,
    strength: f64,
}

impl Patch for Added {
    fn patched(&self, weight: Tensor) -> Result<Tensor> {
        let difference = (self.difference.reshape(weight.shape())? * self.strength)?;
        Ok((weight + difference)?)
    }
}
