//! Whole runs with each arithmetic from the same seeds: whether what int8 changes is less than what a seed changes.

use std::path::Path;

use serde::Serialize;

use super::Variant;
use crate::error::{Error, Result};
use crate::plan::{Overrides, Plan};
use crate::recipe::Assignment;
use crate::train::{self, Ending, RunFolder};
use crate::watch::interrupt::Interrupt;
use crate::watch::ui::Ui;

/// The share of a run's steps, at its end, over which its loss is averaged.
const END: f64 = 0.25;

/// The runs of one seed: the mean loss at the end of each, in the order of [`Variant::ALL`].
#[derive(Debug, Clone, Serialize)]
pub struct OfSeed {
    /// The seed.
    pub seed: u64,
    /// The loss on what is trained, over the last quarter of the steps.
    pub losses: Vec<f64>,
    /// The loss on what is held out, at the end; empty where nothing is.
    pub held_out: Vec<f64>,
}

/// Trains the recipe at `path` from each of `seeds` with each variant, in folders below `scratch`.
///
/// # Errors
/// What the plan refuses and what stops a run.
pub fn runs(
    (path, overrides): (&Path, &Overrides),
    seeds: u64,
    scratch: &Path,
    interrupt: &Interrupt,
    ui: &Ui,
) -> Result<Vec<OfSeed>> {
    let mut all = Vec::new();
    for seed in 1..=seeds {
        let mut of_seed = OfSeed { seed, losses: Vec::new(), held_out: Vec::new() };
        for variant in Variant::ALL {
            ui.say(&format!("seed {seed}, {}", variant.name()));
            let folder = scratch.join(format!("{}-{seed}", variant.key()));
            let settings = variant.settings().into_iter().chain([
                ("run.seed", toml::Value::Integer(seed as i64)),
                ("run.folder", toml::Value::String(folder.display().to_string())),
            ]);
            let mut overrides = overrides.clone();
            let assigned = settings.map(|(key, value)| Assignment { key: key.to_owned(), value });
            overrides.settings.extend(assigned);
            let mut planned = Plan::make_with(path, &overrides, &mut |_, _| {})?;
            let folder = RunFolder::begin(&mut planned.plan)?;
            if let Ending::Interrupted = train::train(&planned, &folder, interrupt, ui)? {
                return Err(Error::Interrupted);
            }
            let losses = train::losses(&folder)?;
            let count = ((losses.len() as f64 * END) as usize).max(1);
            let end = &losses[losses.len().saturating_sub(count)..];
            of_seed.losses.push(end.iter().sum::<f64>() / end.len().max(1) as f64);
            of_seed.held_out.extend(train::held_out_losses(&folder)?.last());
        }
        all.push(of_seed);
    }
    Ok(all)
}

/// The losses of `variant` in each of `all`, and whether they are within those of the unquantised base over all seeds.
pub fn is_within(all: &[OfSeed], variant: usize, losses: impl Fn(&OfSeed) -> &[f64]) -> Option<bool> {
    let of = |variant: usize| {
        all.iter().filter_map(|seed| losses(seed).get(variant).copied()).collect::<Vec<f64>>()
    };
    let (own, band) = (of(variant), of(0));
    if band.len() < 2 || own.is_empty() {
        return None;
    }
    let low = band.iter().copied().fold(f64::INFINITY, f64::min);
    let high = band.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mean = own.iter().sum::<f64>() / own.len() as f64;
    Some((low..=high).contains(&mean))
}
