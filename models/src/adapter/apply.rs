//! Adapters put to a model: beside its weights, or into them.
//!
//! Beside: the factors of layers inside the blocks go along as thin products. Everything else that files may hold
//! (embeddings, head, norms, biases, differences of whole tensors) goes into the weights while they are read.

use std::sync::Arc;

use kernels::{DType, Device, Tensor};

use super::files::AdapterFile;
use crate::delta::{Adapter, Adapters, Change, Delta};
use crate::dit::DitConfig;
use crate::weights::{Patch, Patches, Weights};
use crate::{Error, Result};

/// An adapter that is to be used.
#[derive(Debug, Clone)]
pub struct Source {
    /// What messages call it: its path.
    pub name: String,
    /// What it holds.
    pub file: AdapterFile,
    /// What its changes are multiplied by.
    pub strength: f64,
}

/// How adapters of the layers' matrices are applied. Whatever else an adapter changes is always merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ApplyMode {
    /// Their factors stay beside the weights, which stay as they are.
    Unmerged,
    /// What they add goes into the weights.
    Merged,
}

/// Adapters, ready for a model.
#[derive(Debug, Default)]
pub struct Applied {
    /// What goes beside the weights, frozen.
    pub adapters: Adapters,
    /// What goes into them.
    pub patches: Patches,
    /// Names that the model has no place for, with the adapter that has them: keys of an image branch, in a model without one.
    pub left_out: Vec<(String, String)>,
}

/// Applies `sources` to a model of the sizes `config`.
///
/// # Errors
/// Modules that the model lacks, other than those of an image branch, and adapters for another width.
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

/// Gives every DoRA of `file` the lengths of both rules, for the base that `weights` are.
///
/// # Errors
/// A module that the base lacks, or has in another width.
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

/// What a model has.
struct Model {
    shapes: std::collections::BTreeMap<String, Vec<usize>>,
    adaptable: std::collections::BTreeSet<String>,
}

impl Model {
    /// The shape of the tensor `name`; `None`, and a note, where it belongs to an image branch that the model lacks.
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

/// A change of a module that goes into its weight.
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
