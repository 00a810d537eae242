//! Sliders: the target is the base's prediction, moved along a direction between prompts, and the tiny model moves along it.

use data::{Cursor, DataConfig};
use kernels::Tensor;
use models::adapter::{Adapters, LoraConfig};
use models::dit::{BlockPlan, Role};
use proofs::project::Project;
use proofs::small::{adapters, pipeline, trained};
use proofs::{Tolerance, assert_close, device, fixture};
use trainer::encode::LatentStore;
use trainer::learning::slider;
use trainer::pipeline::{MicroBatch, Pipeline};
use trainer::plan::{Plan, Planned};
use trainer::recipe::TrainConfig;
use trainer::train::batch::{Batches, StepData};
use trainer::train::{self, RunFolder};
use trainer::watch::interrupt::Interrupt;
use trainer::watch::ui::{Ui, Voice};

/// Sums of three predictions of size 1.
const SUM: Tolerance = Tolerance { absolute: 1e-5, relative: 1e-5 };

const PROMPT: &str = "a person";
const POSITIVE: &str = "a smiling person in the sun";
const NEGATIVE: &str = "rain";
const SLIDER: &str = "sliders = [{ prompt = \"a person\", positive = \"a smiling person in the sun\", negative = \"rain\", scale = 1.5 }]\n";

struct Ready {
    project: Project,
    planned: Planned,
    encoded: LatentStore,
}

fn ready(settings: &str) -> Ready {
    let project = Project::new(&fixture(""), &["a ball", "two birds"], settings);
    let planned = Plan::make(&project.recipe(), &mut |_, _| {}).unwrap();
    let encoded = train::cache(&planned, &Interrupt::default(), &Ui::new(Voice::Json)).unwrap();
    Ready { project, planned, encoded }
}

impl Ready {
    fn step(&self, step: u64) -> StepData {
        let batches = Batches::new(&self.planned.plan, &self.planned.dataset, &self.encoded).unwrap();
        batches.step(step, Cursor::default(), self.planned.plan.train.accumulate).unwrap()
    }

    fn pipeline(&self, adapters: &Adapters, split: &[usize]) -> Pipeline {
        let (config, weights) = self.planned.plan.model.open_dit().unwrap();
        pipeline(&config, &weights, adapters, split)
    }

    /// What the network with `adapters` predicts for the samples of `batch` with `text`.
    fn predicted(&self, adapters: &Adapters, batch: &MicroBatch, text: &str) -> Tensor {
        let rows = batch.input.x_bcthw.dim(0).unwrap();
        let text = self.encoded.text(text).unwrap();
        let text = Tensor::stack(&vec![text; rows], 0).unwrap();
        let mut input = batch.input.clone();
        input.cond = input.cond.with(Role::TEXT, text);
        let pipeline = self.pipeline(adapters, &[self.planned.dit.layers]);
        pipeline.predict(&[input]).unwrap().remove(0)
    }

    /// What the base changes from one prompt to the other.
    fn direction(&self, batch: &MicroBatch) -> Tensor {
        let base = Adapters::default();
        (self.predicted(&base, batch, POSITIVE) - self.predicted(&base, batch, NEGATIVE)).unwrap()
    }
}

#[test]
fn the_target_of_a_slider_is_the_base_moved_along_its_direction() {
    let ready = ready(&format!("[train]\nbatch = 2\naccumulate = 2\nprior.weight = 1.0\n{SLIDER}"));
    let data = ready.step(0);
    let random = adapters(&ready.planned.dit, 4, 1.5);
    let layers = ready.planned.dit.layers;
    let [one, two] = [vec![layers], vec![1, layers - 1]].map(|split| {
        let mut pipeline = ready.pipeline(&random, &split);
        let taught = pipeline.with_base_targets(&data.micro_batches).unwrap();
        (trained(&pipeline, &taught, BlockPlan::default()).0, taught)
    });
    assert_eq!(one.0, two.0, "losses of one stage and of two");
    for pair in one.1.chunks(2) {
        let [slider, prior] = pair else { panic!("a slider without its prior") };
        let base = ready.predicted(&Adapters::default(), slider, PROMPT);
        let moved = (base + (ready.direction(slider) * 1.5).unwrap()).unwrap();
        assert_close("slider", &slider.target, &moved, SUM);
        let own = ready.predicted(&Adapters::default(), prior, "");
        assert_close("its prior", &prior.target, &own, SUM);
    }
}

/// How far the change of a network points along a direction: the cosine of the angle between them.
fn along(change: &Tensor, direction: &Tensor) -> f64 {
    let sum = |a: &Tensor, b: &Tensor| -> f64 {
        f64::from((a * b).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap())
    };
    sum(change, direction) / (sum(change, change) * sum(direction, direction)).sqrt()
}

/// At noise that it was not trained on, the prompt moves towards the positive end, with a negative strength towards the other one, and
/// further with more strength.
#[test]
fn a_trained_slider_moves_the_model_along_its_direction() {
    let settings = format!(
        "[adapter]\nrank = 8\n[train]\nsteps = 60\nbatch = 2\n{SLIDER}[optimizer]\nlr = 0.01\nwarmup = 0\n[export]\nprecision = \"float32\"\n"
    );
    let mut ready = ready(&settings);
    let folder = RunFolder::begin(&mut ready.planned.plan).unwrap();
    train::train(&ready.planned, &folder, &Interrupt::default(), &Ui::new(Voice::Json)).unwrap();
    let mut files = std::fs::read_dir(ready.project.run().join("adapters")).unwrap();
    let file = models::adapter::files::read(&files.next().unwrap().unwrap().path()).unwrap();
    let lora = LoraConfig { rank: Some(8), ..LoraConfig::default() };
    let batch = ready.step(1000).micro_batches.remove(0);
    let direction = ready.direction(&batch);
    let base = ready.predicted(&Adapters::default(), &batch, PROMPT);
    let change = |alpha: f64| -> Tensor {
        // Half and negative strengths are other scales of the same factors.
        let mut file = file.clone();
        for change in file.modules.values_mut() {
            let models::adapter::Change::Lora(pair) = change else { panic!("no LoRA") };
            pair.b = (&pair.b * alpha).unwrap();
        }
        let (adapters, _) = Adapters::begun(&ready.planned.targets, &lora, &file, 0, &device()).unwrap();
        (ready.predicted(&adapters, &batch, PROMPT) - &base).unwrap()
    };
    let (half, whole, back) = (change(0.5), change(1.0), change(-1.0));
    let told =
        format!("{}, {}, {}", along(&half, &direction), along(&whole, &direction), along(&back, &direction));
    assert!(along(&half, &direction) > 0.5 && along(&whole, &direction) > 0.5, "{told}");
    assert!(along(&back, &direction) < -0.3, "{told}");
    let length = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    assert!(length(&half) < length(&whole));
}

#[test]
fn sliders_that_cannot_be_are_refused_by_name() {
    let base = "prompt = \"a\", positive = \"b\"";
    for (settings, words) in [
        (format!("[train]\nsliders = [{{ {base}, negative = \"b\" }}]\n"), "there is no direction"),
        (format!("[train]\nsliders = [{{ {base}, negative = \"c\", scale = 0.0 }}]\n"), "scale is 0"),
        (format!("[train]\nsliders = [{{ {base} }}]\n"), "negative"),
        (
            format!("[train]\nsliders = [{{ {base}, negative = \"c\", weight = 1 }}]\n"),
            "unknown field `weight`",
        ),
        (
            format!("trigger = \"sks\"\n[train]\nprior = {{ weight = 1.0, class = \"a man\" }}\n{SLIDER}"),
            "train.prior.class",
        ),
    ] {
        let project = Project::new(&fixture(""), &["a ball"], &settings);
        let error = Plan::make(&project.recipe(), &mut |_, _| {}).unwrap_err().to_string();
        assert!(error.contains(words), "{settings}: {error}");
    }
    let train: TrainConfig = toml::from_str(SLIDER).unwrap();
    for data in [
        r#"{ "folder": "clips", "loss_masks": { "outside_target": "base" } }"#,
        r#"{ "sets": [{ "folder": "clips" }, { "folder": "others", "target": "base" }] }"#,
    ] {
        let data: DataConfig = serde_json::from_str(data).unwrap();
        let error = slider::check(&train.sliders, &train.prior, &data).unwrap_err().to_string();
        assert!(error.contains("have targets of their own"), "{error}");
    }
}
