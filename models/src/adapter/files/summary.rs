//! The contents of a file, without reading its factors.

use std::collections::BTreeMap;
use std::path::Path;

use super::error::AdapterFileError;
use super::keys::{KeyStyle, Part};
use super::read::read_alpha;
use super::sort::{Keys, Sorted, sort};
use crate::delta::AdapterKind;
use crate::weights::{Checkpoint, StoredDType};
use crate::{Expert, Result};

/// One module of an adapter file, by the header alone.
#[derive(Debug, Clone, PartialEq)]
pub struct ModuleSummary {
    /// Its kind; `None` for the difference of a whole tensor.
    pub kind: Option<AdapterKind>,
    /// Width of its input.
    pub input: usize,
    /// Width of its output.
    pub output: usize,
    /// Rank of its factors; 0 without factors.
    pub rank: usize,
    /// Alpha, where the file stores it.
    pub alpha: Option<f32>,
    /// The number format of its factors.
    pub dtype: StoredDType,
}

/// An adapter file, by its header alone.
#[derive(Debug, Clone)]
pub struct AdapterSummary {
    /// How its keys are spelt.
    pub style: KeyStyle,
    /// The expert that its keys name.
    pub expert: Option<Expert>,
    /// Its modules by official name.
    pub modules: BTreeMap<String, ModuleSummary>,
}

/// Summarises `file`. Of its tensors only the alphas are read, which are single numbers.
///
/// # Errors
/// Those of [`super::read`] that the header shows: unknown keys, half pairs.
pub fn summary(path: &Path, file: &Checkpoint) -> Result<AdapterSummary> {
    let Sorted { modules: found, style, expert } = sort(path, file)?;
    let mut modules = BTreeMap::new();
    for (module, keys) in found {
        check_whole(path, file, &module, &keys)?;
        let alpha =
            keys.get(&Part::Alpha).map(|key| read_alpha(path, file, key, style)).transpose()?.flatten();
        let of = sizes(file, &keys);
        modules.insert(module, ModuleSummary { alpha, ..of });
    }
    Ok(AdapterSummary { style, expert, modules })
}

/// Kind, widths, rank and number format of one module.
fn sizes(file: &Checkpoint, keys: &Keys) -> ModuleSummary {
    let shape = |part: Part| keys.get(&part).and_then(|key| file.shape(key));
    let axis = |part: Part, axis: usize| shape(part).and_then(|shape| shape.get(axis)).copied().unwrap_or(0);
    let inputs = |part: Part| shape(part).map_or(0, |shape| shape[1.min(shape.len())..].iter().product());
    let (kind, output, input, rank, of) = if keys.contains_key(&Part::Down) && keys.contains_key(&Part::Up) {
        let is_dora = keys.contains_key(&Part::DoraScale) || keys.contains_key(&Part::MagnitudeVector);
        let kind = if is_dora { AdapterKind::Dora } else { AdapterKind::Lora };
        (Some(kind), axis(Part::Up, 0), inputs(Part::Down), axis(Part::Down, 0), Part::Down)
    } else {
        other(keys, &axis)
    };
    let dtype = keys.get(&of).and_then(|key| file.dtype(key)).unwrap_or(StoredDType::F32);
    ModuleSummary { kind, input, output, rank, alpha: None, dtype }
}

/// Parts that require each other, with the name of the required one.
const TOGETHER: [(Part, &[Part], &str); 9] = [
    (Part::Down, &[Part::Up], "up factor (lora_B or lora_up)"),
    (Part::Up, &[Part::Down], "down factor (lora_A or lora_down)"),
    (Part::HadaW1A, &[Part::HadaW1B], "hada_w1_b"),
    (Part::HadaW1A, &[Part::HadaW2A], "hada_w2_a"),
    (Part::HadaW1A, &[Part::HadaW2B], "hada_w2_b"),
    (Part::HadaW2A, &[Part::HadaW1A], "hada_w1_a"),
    (Part::LokrW1, &[Part::LokrW2, Part::LokrW2A], "lokr_w2, whole or as a and b"),
    (Part::LokrW2, &[Part::LokrW1, Part::LokrW1A], "lokr_w1, whole or as a and b"),
    (
        Part::Alpha,
        &[Part::Down, Part::Up, Part::HadaW1A, Part::HadaW2A, Part::LokrW1, Part::LokrW1A],
        "factors",
    ),
];

/// Refuses half pairs, and factors of two ranks.
fn check_whole(path: &Path, file: &Checkpoint, module: &str, keys: &Keys) -> Result<(), AdapterFileError> {
    let (path, module) = (path.to_owned(), module.to_owned());
    for (part, others, missing) in TOGETHER {
        if let Some(found) = keys.get(&part).filter(|_| !others.iter().any(|other| keys.contains_key(other)))
        {
            return Err(AdapterFileError::HalfPair { path, module, found: found.clone(), missing });
        }
    }
    let shape = |part: Part| keys.get(&part).and_then(|key| file.shape(key)).map(<[usize]>::to_vec);
    match (shape(Part::Down), shape(Part::Up)) {
        (Some(a), Some(b)) if a.first() != b.get(1) || a.contains(&0) || b.contains(&0) => {
            Err(AdapterFileError::RankMismatch { path, module, a, b })
        }
        _ => Ok(()),
    }
}

/// Kind, out, in, rank and one part of a change that is not a pair.
fn other(
    keys: &Keys,
    axis: &dyn Fn(Part, usize) -> usize,
) -> (Option<AdapterKind>, usize, usize, usize, Part) {
    if keys.contains_key(&Part::HadaW1A) {
        let rank = axis(Part::HadaW1B, 0);
        return (
            Some(AdapterKind::Loha),
            axis(Part::HadaW1A, 0),
            axis(Part::HadaW1B, 1),
            rank,
            Part::HadaW1A,
        );
    }
    let half = |[whole, a, b]: [Part; 3]| match keys.contains_key(&whole) {
        true => (axis(whole, 0), axis(whole, 1), 0, whole),
        false => (axis(a, 0), axis(b, 1), axis(a, 1), a),
    };
    let (o1, i1, r1, _) = half([Part::LokrW1, Part::LokrW1A, Part::LokrW1B]);
    let (o2, i2, r2, of) = half([Part::LokrW2, Part::LokrW2A, Part::LokrW2B]);
    if o1 * o2 > 0 {
        return (Some(AdapterKind::Lokr), o1 * o2, i1 * i2, r2.max(r1), of);
    }
    let of = if keys.contains_key(&Part::Diff) { Part::Diff } else { Part::DiffBias };
    (None, axis(of, 0), axis(of, 1), 0, of)
}
