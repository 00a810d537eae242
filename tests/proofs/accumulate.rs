//! Micro-batches: however the samples of a step are cut, the loss and the gradients are those of one batch.

use std::collections::BTreeMap;

use data::Cursor;
use kernels::Tensor;
use models::dit::{BlockPlan, Role};
use proofs::project::Project;
use proofs::small::{adapters, pipeline, trained};
use proofs::{Tolerance, assert_close};
use trainer::encode::LatentStore;
use trainer::pipeline::{MicroBatch, Pipeline};
use trainer::plan::{Plan, Planned};
use trainer::train;
use trainer::train::batch::{Batches, StepData};
use trainer::watch::interrupt::Interrupt;
use trainer::watch::ui::{Ui, Voice};

/// The same f32 sums in another order; gradients are sums over some hundred products of size 1.
const ORDER: Tolerance = Tolerance { absolute: 1e-6, relative: 2e-5 };

const CAPTIONS: [&str; 4] = [
    "a ball",
    "a small red ball rolls slowly from the left to the right over a green field",
    "two birds fly",
    "a fox",
];

/// A project that is cached, with the pipeline that it trains on.
struct Ready {
    _project: Project,
    planned: Planned,
    encoded: LatentStore,
    pipeline: Pipeline,
}

fn ready(captions: &[&str], settings: &str) -> Ready {
    let project = Project::new(&proofs::fixture(""), captions, settings);
    let planned = Plan::make(&project.recipe(), &mut |_, _| {}).unwrap();
    let encoded = train::cache(&planned, &Interrupt::default(), &Ui::new(Voice::Json)).unwrap();
    let (config, weights) = planned.plan.model.open_dit().unwrap();
    let pipeline = pipeline(&config, &weights, &adapters(&config, 4, 1.5), &[config.layers]);
    Ready { _project: project, planned, encoded, pipeline }
}

impl Ready {
    /// Step `step` with `accumulate` micro-batches of `batch`, and the seed `seed`.
    fn step(&self, seed: u64, step: u64, batch: usize, accumulate: usize) -> StepData {
        let mut plan = self.planned.plan.clone();
        (plan.run.seed, plan.train.batch) = (seed, batch);
        let batches = Batches::new(&plan, &self.planned.dataset, &self.encoded).unwrap();
        batches.step(step, Cursor::default(), accumulate).unwrap()
    }

    /// A seed whose first epoch has the same order in batches of one as in one batch, which shuffles once less: then
    /// the same samples stand in the same slots.
    fn agreeing_seed(&self) -> u64 {
        let items = CAPTIONS.len();
        let agrees = |&seed: &u64| self.step(seed, 0, 1, items).items == self.step(seed, 0, items, 1).items;
        (0..1000).find(agrees).unwrap()
    }

    fn trained(&self, data: &StepData) -> (f64, BTreeMap<String, Tensor>) {
        let (losses, gradients) = trained(&self.pipeline, &data.micro_batches, BlockPlan::default());
        (losses.into_iter().map(f64::from).sum(), gradients)
    }
}

#[track_caller]
fn assert_same_step(what: &str, ready: &Ready, got: &StepData, expected: &StepData) {
    assert_eq!((&got.items, &got.sigmas), (&expected.items, &expected.sigmas), "{what}: other samples");
    let ((loss, gradients), (expected_loss, expected)) = (ready.trained(got), ready.trained(expected));
    assert!((loss / expected_loss - 1.0).abs() < 1e-5, "{what}: loss {loss}, expected {expected_loss}");
    for (name, gradient) in &expected {
        assert_close(&format!("{what}: {name}"), &gradients[name], gradient, ORDER);
    }
}

fn rows_of_text(batch: &MicroBatch) -> usize {
    batch.input.cond.require(Role::TEXT).unwrap().dim(1).unwrap()
}

#[test]
fn micro_batches_equal_one_batch() {
    for weighting in [
        "timesteps.weighting = \"none\"",
        "timesteps.weighting = \"bsmntw\"",
        "timesteps.stratified = true\nloss.kind = \"huber\"\nloss.c = 0.5",
        "timesteps.distribution = \"flux-shift\"\nloss = { kind = \"pseudo-huber\", c = 0.1, c_schedule = \"snr\", scale = \"2c\" }",
    ] {
        let settings = format!("[adapter]\ndropout = 0.2\n[train]\ncaption_dropout = 0.0\n{weighting}\n");
        let ready = ready(&CAPTIONS, &settings);
        let seed = ready.agreeing_seed();
        let whole = ready.step(seed, 0, 4, 1);
        let rows = rows_of_text(&whole.micro_batches[0]);
        let singles = ready.step(seed, 0, 1, 4);
        let lengths: Vec<usize> = singles.micro_batches.iter().map(rows_of_text).collect();
        assert!(lengths.iter().any(|&length| length < rows), "no text of this batch is padded: {lengths:?}");
        assert_same_step(weighting, &ready, &singles, &whole);
    }
}

/// The loss of a step is the weighted mean over its samples, one by one: not a sum that grows with the batch, nor one
/// that shrinks.
#[test]
fn the_loss_of_a_step_is_the_mean_of_its_samples() {
    let ready = ready(&CAPTIONS, "[train.timesteps]\nweighting = \"bsmntw\"\n");
    for (batch, accumulate) in [(4, 1), (1, 4), (2, 2), (2, 1)] {
        let data = ready.step(3, 0, batch, accumulate);
        let mut errors = Vec::new();
        for micro_batch in &data.micro_batches {
            let velocity =
                ready.pipeline.predict(std::slice::from_ref(&micro_batch.input)).unwrap().remove(0);
            let target = micro_batch.target.to_device(velocity.device()).unwrap();
            let squares = (velocity - target).unwrap().sqr().unwrap();
            for i in 0..squares.dim(0).unwrap() {
                let mean = squares.get(i).unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
                errors.push(f64::from(mean));
            }
        }
        let weighted =
            errors.iter().zip(&data.sigmas).map(|(e, &sigma)| e * trainer::learning::noise::bsmntw(sigma));
        let expected = weighted.sum::<f64>() / errors.len() as f64;
        let (loss, _) = ready.trained(&data);
        assert!((loss / expected - 1.0).abs() < 1e-5, "{batch} x {accumulate}: {loss}, expected {expected}");
    }
}

/// A loss of the recipe, in plain numbers of the network's own errors: c and its factor follow the sigma of each sample.
#[test]
fn the_loss_is_the_one_that_the_recipe_names() {
    let ready = ready(&CAPTIONS, "");
    for (settings, of) in [
        ("kind = \"l1\"", (|e, _| e.abs()) as fn(f64, f64) -> f64),
        ("kind = \"smooth-l1\"\nc = 0.5", |e, _| if e.abs() < 0.5 { e * e } else { e.abs() - 0.25 }),
        ("kind = \"pseudo-huber\"\nc = 0.1\nc_schedule = \"snr\"\nscale = \"2c\"", |e, sigma| {
            let c = 0.9 * (1.0 - sigma) * (1.0 - sigma) + 0.1;
            2.0 * c * ((e * e + c * c).sqrt() - c)
        }),
    ] {
        let mut plan = ready.planned.plan.clone();
        (plan.train.loss, plan.train.batch) = (toml::from_str(settings).unwrap(), 2);
        let batches = Batches::new(&plan, &ready.planned.dataset, &ready.encoded).unwrap();
        let data = batches.step(0, Cursor::default(), 2).unwrap();
        let (mut expected, mut sigmas) = (0.0, data.sigmas.iter());
        for batch in &data.micro_batches {
            let velocity = ready.pipeline.predict(std::slice::from_ref(&batch.input)).unwrap().remove(0);
            let errors = (velocity - batch.target.to_device(&proofs::device()).unwrap()).unwrap();
            for i in 0..errors.dim(0).unwrap() {
                let (sigma, errors) = (sigmas.next().unwrap(), errors.get(i).unwrap().flatten_all().unwrap());
                let errors: Vec<f32> = errors.to_vec1().unwrap();
                let sum: f64 = errors.iter().map(|e| of(f64::from(*e), *sigma)).sum();
                expected += sum / errors.len() as f64 / data.sigmas.len() as f64;
            }
        }
        let (loss, _) = ready.trained(&data);
        assert!((loss / expected - 1.0).abs() < 1e-5, "{settings}: {loss}, expected {expected}");
    }
}

/// Five clips in batches of two: the last batch of an epoch holds one. It is trained, and its sample counts in a step
/// for as much as every other.
#[test]
fn the_short_batch_at_the_end_of_an_epoch_counts_by_its_samples() {
    let captions = ["one", "two", "three", "four", "five"];
    let ready = ready(&captions, "[train]\ncaption_dropout = 0.0\n");
    let epoch = ready.step(11, 0, 2, 3);
    let mut sizes: Vec<usize> = epoch.micro_batches.iter().map(|batch| batch.weights.len()).collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [1, 2, 2]);
    let mut items = epoch.items.clone();
    items.sort();
    items.dedup();
    assert_eq!(items.len(), captions.len(), "an epoch shows every clip once");
    assert_eq!((epoch.cursor.epoch, epoch.cursor.position), (1, 0));

    // Each sample alone, as a micro-batch of its own that counts for a fifth.
    let alone = epoch.micro_batches.iter().flat_map(|batch| {
        (0..batch.weights.len()).map(|i| {
            let one = |t: &Tensor| t.narrow(0, i, 1).unwrap();
            let mut single = batch.clone();
            single.input.x_bcthw = one(&batch.input.x_bcthw);
            single.input.cond = batch.input.cond.clone().try_map(|_, t| t.narrow(0, i, 1)).unwrap();
            single.target = one(&batch.target);
            single.weights = vec![0.2];
            single
        })
    });
    let alone = StepData { micro_batches: alone.collect(), ..ready.step(11, 0, 2, 3) };
    assert_same_step("five samples", &ready, &epoch, &alone);
}
