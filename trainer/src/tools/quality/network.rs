//! What a network predicts and how it would learn, on fixed samples: to compare one storage and arithmetic with another.

use std::collections::BTreeMap;
use std::sync::Arc;

use kernels::random::Key;
use kernels::{DType, Device, Tensor};
use models::adapter::Adapters;
use models::dit::{BlockPlan, Keep, KeepPlace, LayerWatch};
use serde::Serialize;

use crate::adapters;
use crate::base::DitFiles;
use crate::error::Result;
use crate::learning::NoiseRange;
use crate::machine::precision::Precision;
use crate::pipeline::{MicroBatch, Pipeline};
use crate::plan::Planned;
use crate::watch::ui::Ui;

/// What came out of a network: on the host, in f32.
pub struct Outcome {
    velocities: Vec<Vec<f32>>,
    losses: Vec<f64>,
    gradients: BTreeMap<String, Vec<f32>>,
}

/// The velocities of one network beside those of another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Velocities {
    /// The mean cosine over samples.
    pub mean_cosine: f64,
    /// The smallest.
    pub worst_cosine: f64,
    /// The mean loss less the other's, over the other's.
    pub loss_change: f64,
}

/// The gradients of one network's adapters beside those of another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GradientTable {
    /// The tensor with the smallest cosine.
    pub worst: String,
    /// Its cosine.
    pub worst_cosine: f64,
    /// The smallest and the largest ratio of norms.
    pub norm_ratios: [f64; 2],
}

/// The network of `range` of a plan, and the adapters whose gradients are compared.
pub struct Network<'a> {
    planned: &'a Planned,
    files: &'a DitFiles,
    adapters: Adapters,
}

impl<'a> Network<'a> {
    /// That of `range`, with the plan's adapters. Their factors that begin at zero are random here, so that every gradient says
    /// something.
    ///
    /// # Errors
    /// An adapter to begin from that cannot be read.
    pub fn new(planned: &'a Planned, range: NoiseRange, ui: &Ui) -> Result<Self> {
        let plan = &planned.plan;
        let expert = range.expert().unwrap_or(models::expert::Expert::High);
        let file = plan.adapter.begins_with(range.expert());
        let mut adapters = adapters::beginning(&plan.adapter, file, &planned.targets, plan.run.seed, ui)?;
        let mut parameters = adapters.parameters();
        for (name, tensor) in &mut parameters {
            if tensor.sqr()?.sum_all()?.to_scalar::<f32>()? == 0.0 {
                let numbers = Key::new(plan.run.seed, name, &[]).normals(tensor.elem_count());
                let random = Tensor::from_vec(numbers, tensor.shape(), &Device::Cpu)?;
                *tensor = (random * 0.02)?;
            }
        }
        adapters.set_parameters(&parameters);
        Ok(Self { planned, files: plan.model.dits.of(expert), adapters })
    }

    /// What it makes of `batches` with `precision`, every layer of its backwards shown to `watch`.
    ///
    /// # Errors
    /// Files that cannot be read, and memory that runs out.
    pub fn outcome(
        &self,
        precision: Precision,
        batches: &[MicroBatch],
        watch: Option<&Arc<dyn LayerWatch>>,
    ) -> Result<Outcome> {
        let plan = &self.planned.plan;
        let (dit, weights) = self.files.open()?;
        let split = plan.devices.open_within(&self.planned.limits)?;
        let mut pipeline = Pipeline::load(&weights, &dit, &split, &self.adapters, precision.dit())?;
        pipeline.set_ffn_tokens(plan.memory.ffn_tokens);
        let inputs = batches.iter().map(|batch| batch.input.clone()).collect::<Vec<_>>();
        let velocities = pipeline.predict(&inputs)?.iter().map(numbers).collect::<Result<_>>()?;
        if let Some(watch) = watch {
            pipeline.watch_layers(watch);
        }
        let recomputed = BlockPlan { keep: Keep::Input, place: KeepPlace::Device };
        let plans = pipeline.layers().into_iter().map(|id| (id, recomputed)).collect();
        let step = pipeline.train(batches, &plans)?;
        let losses = step.losses.iter().map(|loss| Ok(f64::from(loss.to_scalar::<f32>()?)));
        let gradients = step.gradients.iter().map(|(name, x)| Ok((name.to_owned(), numbers(x)?)));
        Ok(Outcome {
            velocities,
            losses: losses.collect::<Result<_>>()?,
            gradients: gradients.collect::<Result<_>>()?,
        })
    }
}

impl Outcome {
    /// Its velocities beside those of `exact`, and its loss beside that of `usual`.
    pub fn velocities(&self, exact: &Self, usual: &Self) -> Velocities {
        let pairs = self.velocities.iter().zip(&exact.velocities);
        let cosines: Vec<f64> = pairs.map(|(own, exact)| cosine(own, exact)).collect();
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        Velocities {
            mean_cosine: mean(&cosines),
            worst_cosine: cosines.iter().copied().fold(f64::INFINITY, f64::min),
            loss_change: mean(&self.losses) / mean(&usual.losses) - 1.0,
        }
    }

    /// Its gradients beside those of `usual`.
    pub fn gradients(&self, usual: &Self) -> GradientTable {
        let mut table = GradientTable {
            worst: String::new(),
            worst_cosine: f64::INFINITY,
            norm_ratios: [f64::INFINITY, 0.0],
        };
        for (name, gradient) in &self.gradients {
            let Some(other) = usual.gradients.get(name) else { continue };
            let (found, ratio) = (cosine(gradient, other), norm(gradient) / norm(other));
            if found < table.worst_cosine {
                (table.worst, table.worst_cosine) = (name.clone(), found);
            }
            table.norm_ratios = [table.norm_ratios[0].min(ratio), table.norm_ratios[1].max(ratio)];
        }
        table
    }
}

fn numbers(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?)
}

fn norm(x: &[f32]) -> f64 {
    x.iter().map(|number| f64::from(*number).powi(2)).sum::<f64>().sqrt()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot: f64 = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    dot / (norm(a) * norm(b))
}
