//! The tensors of a file by key, for a style and a number format.

use std::collections::BTreeMap;
use std::path::Path;

use kernels::{DType, Device, Tensor};
use rayon::prelude::*;

use super::error::AdapterFileError;
use super::spell::{Spelling, spell};
use super::{AdapterFile, Precision, Style};
use crate::Result;
use crate::delta::{Change, DoraPair, LoraPair};

/// Height and width of the patch convolution's kernel, which is one frame deep.
const KERNEL: usize = crate::dit::config::PATCH;

/// The tensors of `adapter` by key.
///
/// # Errors
/// If the style cannot express a change, or the number format cannot represent a value.
pub(super) fn encode(
    path: &Path,
    adapter: &AdapterFile,
    style: Style,
    precision: Precision,
) -> Result<BTreeMap<String, Tensor>> {
    let new = || Encoder { path, style, precision, tensors: BTreeMap::new() };
    let modules = adapter.modules.par_iter().map(|(module, change)| {
        let mut own = new();
        own.change(module, &on_cpu(change)?)?;
        Ok(own.tensors)
    });
    // Collected first, so that the same one of several errors is always reported.
    let mut tensors = BTreeMap::new();
    for own in modules.collect::<Vec<Result<_>>>() {
        tensors.extend(own?);
    }
    let mut out = Encoder { tensors, ..new() };
    for (name, difference) in &adapter.differences {
        out.difference(name, difference)?;
    }
    Ok(out.tensors)
}

struct Encoder<'a> {
    path: &'a Path,
    style: Style,
    precision: Precision,
    tensors: BTreeMap<String, Tensor>,
}

impl Encoder<'_> {
    fn change(&mut self, module: &str, change: &Change) -> Result<()> {
        let spelling = self.spell(module)?;
        let stem = &spelling.stem;
        match change {
            Change::Lora(pair) => self.pair(module, &spelling, pair),
            Change::Dora(DoraPair { pair, magnitude }) => {
                self.pair(module, &spelling, pair)?;
                let (key, lengths) = match (self.style, self.style.is_peft()) {
                    (Style::Diffsynth, _) => {
                        return Err(self.not_said(
                            module,
                            "a DoRA",
                            "write it as comfy, kohya, diffusers or peft",
                        ));
                    }
                    (_, true) => ("lora_magnitude_vector", magnitude.of_merged().cloned()),
                    // A column, as it is broadcast over the rows that it scales.
                    (_, false) => ("dora_scale", magnitude.of_base().map(|m| m.unsqueeze(1)).transpose()?),
                };
                let lengths = lengths.ok_or_else(|| {
                    let way_out = "the programs of this style divide by other lengths, so the base model is needed: \
                                   give it with --base";
                    self.not_said(module, "a DoRA that another program made", way_out)
                })?;
                self.put(module, format!("{stem}.{key}"), &lengths)
            }
            Change::Loha(_) | Change::Lokr(_) => self.product(module, stem, change),
        }
    }

    /// A and B, and alpha where the style has it; else B times the scale.
    fn pair(&mut self, module: &str, spelling: &Spelling, pair: &LoraPair) -> Result<()> {
        let Spelling { stem, down, up } = spelling;
        let is_folded = !self.style.has_alpha() && pair.scale() != 1.0;
        let mut factors =
            [pair.a.clone(), if is_folded { (&pair.b * pair.scale())? } else { pair.b.clone() }];
        if module == "patch_embedding" && pair.a.dim(1)?.is_multiple_of(KERNEL * KERNEL) {
            // Programs in which it is a convolution load it as two convolutions.
            let (rank, columns) = pair.a.dims2()?;
            factors[0] = factors[0].reshape((rank, columns / (KERNEL * KERNEL), 1, KERNEL, KERNEL))?;
            factors[1] = factors[1].reshape((pair.b.dim(0)?, rank, 1, 1, 1))?;
        }
        self.put(module, format!("{stem}{down}"), &factors[0])?;
        self.put(module, format!("{stem}{up}"), &factors[1])?;
        if self.style.has_alpha() {
            let alpha = Tensor::new(pair.alpha.unwrap_or(pair.rank() as f32), &Device::Cpu)?;
            self.tensors.insert(format!("{stem}.alpha"), alpha);
        }
        Ok(())
    }

    /// A LoHa or a LoKr, with the scale in its first factor or in alpha.
    fn product(&mut self, module: &str, stem: &str, change: &Change) -> Result<()> {
        if self.style.is_peft() || self.style == Style::Diffsynth {
            return Err(self.not_said(module, "a LoHa or a LoKr", "write it as comfy or kohya"));
        }
        let (scale, rank) = (scale_of(change), change.rank());
        let alpha = rank.filter(|_| self.style.has_alpha());
        for (i, (name, tensor)) in change.tensors().into_iter().enumerate() {
            let is_folded = i == 0 && alpha.is_none() && scale != 1.0;
            let tensor = if is_folded { (tensor * scale)? } else { tensor.clone() };
            self.put(module, format!("{stem}.{name}"), &tensor)?;
        }
        if let Some(rank) = alpha {
            let alpha = Tensor::new((scale * rank as f64) as f32, &Device::Cpu)?;
            self.tensors.insert(format!("{stem}.alpha"), alpha);
        }
        Ok(())
    }

    /// The difference of the whole tensor `name`.
    fn difference(&mut self, name: &str, difference: &Tensor) -> Result<()> {
        if self.style.is_peft() || self.style == Style::Diffsynth {
            let way_out = "write it as comfy or kohya";
            return Err(self.not_said(name, "the difference", way_out));
        }
        let (module, word) = match (name.strip_suffix(".weight"), name.strip_suffix(".bias")) {
            (Some(module), _) => (module, "diff"),
            (_, Some(module)) => (module, "diff_b"),
            _ => (name, "diff"),
        };
        let Spelling { stem, .. } = self.spell(module)?;
        self.put(name, format!("{stem}.{word}"), &difference.to_device(&Device::Cpu)?)
    }

    fn spell(&self, module: &str) -> Result<Spelling> {
        let none = || AdapterFileError::NoName { path: self.path.to_owned(), module: module.to_owned() };
        Ok(spell(self.style, module).ok_or_else(none)?)
    }

    fn put(&mut self, module: &str, key: String, tensor: &Tensor) -> Result<()> {
        let (dtype, called) = match self.precision {
            Precision::Float32 => (DType::F32, "float32"),
            Precision::Bfloat16 => (DType::BF16, "bfloat16"),
            Precision::Float16 => (DType::F16, "float16"),
        };
        let stored = tensor.to_dtype(dtype)?;
        let numbers: Vec<f32> = stored.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        if !numbers.iter().all(|number| number.is_finite()) {
            let (path, module) = (self.path.to_owned(), module.to_owned());
            return Err(AdapterFileError::NotFinite { path, module, precision: called }.into());
        }
        self.tensors.insert(key, stored);
        Ok(())
    }

    fn not_said(&self, module: &str, what: &'static str, way_out: &'static str) -> crate::Error {
        let (path, module) = (self.path.to_owned(), module.to_owned());
        AdapterFileError::NotInStyle { path, module, what, way_out }.into()
    }
}

fn scale_of(change: &Change) -> f64 {
    match change {
        Change::Lora(pair) | Change::Dora(DoraPair { pair, .. }) => pair.scale(),
        Change::Loha(factors) => factors.scale,
        Change::Lokr(factors) => factors.scale,
    }
}

/// The change in f32 on the CPU, wherever it was trained.
pub(super) fn on_cpu(change: &Change) -> Result<Change> {
    change.map(&mut |t| Ok(t.to_device(&Device::Cpu)?.to_dtype(DType::F32)?))
}
