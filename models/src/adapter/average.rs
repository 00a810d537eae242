//! The average of adapters of one run: of each of their tensors.

use std::collections::BTreeMap;

use kernels::Tensor;

use super::files::AdapterFile;
use crate::delta::Change;
use crate::{Error, Result};

/// The weighted mean of each tensor of `adapters`, which is what an average over steps of training is. The factors of a LoRA are
/// averaged and not their products, so the adapters must be steps of one run: of the same modules, kinds, ranks and scales.
///
/// # Errors
/// No adapter, weights whose sum is not positive, and adapters that differ in more than their numbers.
pub fn average(adapters: &[(AdapterFile, f64)]) -> Result<AdapterFile> {
    let sum: f64 = adapters.iter().map(|(_, weight)| weight).sum();
    let Some((first, _)) = adapters.first().filter(|_| sum > 0.0 && sum.is_finite()) else {
        return Err(Error::Mismatch("the weights of adapters must have a positive sum".into()));
    };
    let shares: Vec<f64> = adapters.iter().map(|(_, weight)| weight / sum).collect();
    let modules = first.modules.keys().map(|module| {
        let of = |(file, _): &(AdapterFile, f64)| {
            file.modules.get(module).cloned().ok_or_else(|| unlike(&format!("only some change {module}")))
        };
        let changes = adapters.iter().map(of).collect::<Result<Vec<_>>>()?;
        Ok((module.clone(), of_changes(module, &changes, &shares)?))
    });
    let modules = modules.collect::<Result<BTreeMap<_, _>>>()?;
    let differences = first.differences.keys().map(|name| {
        let of = |(file, _): &(AdapterFile, f64)| {
            file.differences.get(name).cloned().ok_or_else(|| unlike(&format!("only some change {name}")))
        };
        let tensors = adapters.iter().map(of).collect::<Result<Vec<_>>>()?;
        Ok((name.clone(), mean(name, &tensors, &shares)?))
    });
    let differences = differences.collect::<Result<BTreeMap<_, _>>>()?;
    let has_more = |(file, _): &(AdapterFile, f64)| {
        file.modules.len() != modules.len()
            || file.differences.len() != differences.len()
            || file.expert != first.expert
    };
    if adapters.iter().any(has_more) {
        return Err(unlike("some change modules that others do not, or are of another expert"));
    }
    Ok(AdapterFile { modules, differences, notes: Vec::new(), ..first.clone() })
}

fn unlike(how: &str) -> Error {
    Error::Mismatch(format!("adapters that are averaged must be steps of one run: {how}"))
}

/// The mean of the changes of `module`.
fn of_changes(module: &str, changes: &[Change], shares: &[f64]) -> Result<Change> {
    let first = &changes[0]; // one for each adapter, of which there is one
    let kinds = |change: &Change| (change.kind(), change.rank(), change.scale().to_bits());
    if changes.iter().any(|change| kinds(change) != kinds(first)) {
        return Err(unlike(&format!("{module} has not the same kind, rank and scale in all")));
    }
    let all = changes.iter().map(tensors).collect::<Result<Vec<_>>>()?;
    let mut index = 0;
    first.map(&mut |_| {
        let own = all.iter().map(|tensors| tensors.get(index).cloned());
        let own: Option<Vec<Tensor>> = own.collect();
        index += 1;
        mean(module, &own.ok_or_else(|| unlike(&format!("{module} has other tensors in some")))?, shares)
    })
}

/// All tensors of a change, in the order of [`Change::map`].
fn tensors(change: &Change) -> Result<Vec<Tensor>> {
    let mut all = Vec::new();
    change.map(&mut |tensor| {
        all.push(tensor.clone());
        Ok(tensor.clone())
    })?;
    Ok(all)
}

fn mean(name: &str, tensors: &[Tensor], shares: &[f64]) -> Result<Tensor> {
    if tensors.iter().any(|tensor| tensor.dims() != tensors[0].dims()) {
        return Err(unlike(&format!("{name} has not the same shape in all")));
    }
    let mut sum = (&tensors[0] * shares[0])?;
    for (tensor, share) in tensors.iter().zip(shares).skip(1) {
        sum = (sum + (tensor * *share)?)?;
    }
    Ok(sum)
}
