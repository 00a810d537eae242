//! `tandem bench quality`: what int8 arithmetic changes, layer by layer, in the whole network, in the gradients of a step, and in whole
//! runs, on the user's own model and clips.

mod layers;
mod network;
mod training;

use std::path::Path;
use std::sync::Arc;

use models::dit::LayerWatch;
use serde_json::{Value, json};

use self::layers::{BOUNDS, Layers};
use self::network::Network;
use crate::error::{Error, Result};
use crate::machine::precision::{Arithmetic, Precision, WeightFormat};
use crate::pipeline::MicroBatch;
use crate::plan::{Overrides, Plan};
use crate::train::{self, batch::Batches};
use crate::watch::interrupt::Interrupt;
use crate::watch::ui::Ui;

/// The smallest mean and the smallest single cosine of velocities that pass.
const VELOCITIES: [f64; 2] = [0.999, 0.995];
/// The largest relative change of the loss that passes.
const LOSS: f64 = 0.005;
/// The smallest cosine of a tensor's gradient, and the ratios of its norm, that pass.
const GRADIENT: f64 = 0.99;
const NORMS: [f64; 2] = [0.97, 1.03];
/// Layers that are listed.
const LISTED: usize = 5;

/// A storage and an arithmetic of the frozen network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// Not quantised.
    Exact,
    /// Matrices in int8, products in floats.
    WeightOnly,
    /// Products in int8.
    Integers,
}

impl Variant {
    /// All of them; [`Self::Exact`] is the first.
    pub const ALL: [Self; 3] = [Self::Exact, Self::WeightOnly, Self::Integers];

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "not quantised",
            Self::WeightOnly => "int8 weights",
            Self::Integers => "int8 products",
        }
    }

    /// In names of folders and fields.
    fn key(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::WeightOnly => "weight_only",
            Self::Integers => "int8",
        }
    }

    fn parts(self) -> (WeightFormat, Arithmetic) {
        match self {
            Self::Exact => (WeightFormat::Bf16, Arithmetic::Bf16),
            Self::WeightOnly => (WeightFormat::Int8, Arithmetic::Bf16),
            Self::Integers => (WeightFormat::Int8, Arithmetic::Int8),
        }
    }

    /// The recipe's settings for it.
    fn settings(self) -> [(&'static str, toml::Value); 2] {
        let (base, arithmetic) = self.parts();
        let text = |text: &str| toml::Value::String(text.to_owned());
        [("model.base", text(base.name())), ("model.arithmetic", text(arithmetic.name()))]
    }

    /// `precision` with it; where floats are f32, as on a CPU, an unquantised network is.
    fn over(self, precision: Precision) -> Precision {
        let (base, arithmetic) = self.parts();
        let base = base.with_compute(precision.compute);
        Precision { base, arithmetic, base_block: None, ..precision }
    }
}

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub struct QualityBench<'a> {
    /// The recipe with the model and the clips.
    pub recipe: &'a Path,
    /// What the command line says in place of the recipe.
    pub overrides: &'a Overrides,
    /// Clips that are looked at, each at nine noise levels.
    pub items: usize,
    /// Whole runs with each variant: from so many seeds.
    pub seeds: u64,
    /// Folder for these runs.
    pub scratch: &'a Path,
}

/// Measures, and reports as one object with `passes` for each gate.
///
/// # Errors
/// What the plan refuses, files that cannot be read, and memory that runs out.
pub fn quality(bench: &QualityBench, interrupt: &Interrupt, ui: &Ui) -> Result<Value> {
    let planned = ui.phase("planning", || Plan::make_with(bench.recipe, bench.overrides, &mut |_, _| {}))?;
    let plan = &planned.plan;
    let encoded = train::cache(&planned, interrupt, ui)?;
    let batches = Batches::new(plan, &planned.dataset, &encoded)?;
    let mut networks = Vec::new();
    for range in plan.trained_ranges() {
        let samples: Vec<MicroBatch> = batches.at_levels(range, bench.items).collect::<Result<_>>()?;
        if samples.is_empty() {
            return Err(Error::Setting {
                key: "data.folder".into(),
                why: "has no clips to measure with".into(),
            });
        }
        let network = Network::new(&planned, range, ui)?;
        let layers = Arc::new(Layers::default());
        let mut outcomes = Vec::new();
        for variant in Variant::ALL {
            let watch: Arc<dyn LayerWatch> = layers.clone();
            let watch = Some(&watch).filter(|_| variant == Variant::Exact);
            let precision = variant.over(plan.model.precision);
            outcomes.push(ui.phase(variant.name(), || network.outcome(precision, &samples, watch))?);
        }
        let [exact, weight_only, integers] = &outcomes[..] else { continue };
        let velocities = integers.velocities(exact, weight_only);
        let gradients = integers.gradients(weight_only);
        networks.push(json!({
            "network": range.expert().map(|expert| expert.to_string()),
            "samples": samples.len(),
            "layers": of_layers(&layers),
            "velocities": {
                "mean_cosine": velocities.mean_cosine, "worst_cosine": velocities.worst_cosine,
                "loss_change": velocities.loss_change,
                "passes": velocities.mean_cosine >= VELOCITIES[0] && velocities.worst_cosine >= VELOCITIES[1]
                    && velocities.loss_change.abs() <= LOSS,
            },
            "gradients": {
                "worst": gradients.worst, "worst_cosine": gradients.worst_cosine,
                "norm_ratios": gradients.norm_ratios,
                "passes": gradients.worst_cosine >= GRADIENT && gradients.norm_ratios[0] >= NORMS[0]
                    && gradients.norm_ratios[1] <= NORMS[1],
            },
            "weight_only": weight_only.velocities(exact, exact),
        }));
    }
    let runs = match bench.seeds {
        0 => Value::Null,
        seeds => {
            of_runs(&training::runs((bench.recipe, bench.overrides), seeds, bench.scratch, interrupt, ui)?)
        }
    };
    Ok(json!({ "what": "quality", "model": plan.model.name, "networks": networks, "training": runs }))
}

/// The worst layers, and all that are beyond the bounds.
fn of_layers(layers: &Layers) -> Value {
    let found = layers.found();
    let mut names: Vec<&String> = found.keys().collect();
    let beyond = |name: &String| (found[name].y / BOUNDS.y).max(found[name].dx / BOUNDS.dx);
    names.sort_by(|a, b| beyond(b).total_cmp(&beyond(a)));
    let failing: Vec<_> = names.iter().filter(|name| beyond(name) > 1.0).collect();
    let worst: Vec<Value> =
        names.iter().take(LISTED).map(|name| json!({ "layer": name, "deviation": found[*name] })).collect();
    let mean =
        |of: &dyn Fn(&String) -> f64| names.iter().map(|name| of(name)).sum::<f64>() / names.len() as f64;
    json!({
        "layers": names.len(), "bounds": BOUNDS,
        "mean": { "y": mean(&|name| found[name].y), "dx": mean(&|name| found[name].dx) },
        "worst": worst, "beyond": failing, "passes": failing.is_empty(),
    })
}

fn of_runs(all: &[training::OfSeed]) -> Value {
    let verdict = |variant: usize| {
        json!({
            "loss_within_seeds": training::is_within(all, variant, |seed| &seed.losses),
            "held_out_within_seeds": training::is_within(all, variant, |seed| &seed.held_out),
        })
    };
    json!({
        "variants": Variant::ALL.map(Variant::name), "runs": all,
        "weight_only": verdict(1), "int8": verdict(2),
    })
}
