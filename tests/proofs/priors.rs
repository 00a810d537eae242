//! Priors: the base's own predictions as targets, beside clips, of whole sets, and outside of masks.

use data::{Cursor, SheetStyle, contact_sheet};
use kernels::Tensor;
use models::adapter::{AdapterKind, Adapters, LoraConfig};
use models::dit::{Base, BlockPlan, Role};
use proofs::film::flat;
use proofs::project::{Project, SIZE};
use proofs::small::{adapters, pipeline, trained};
use proofs::{Tolerance, assert_close, assert_same_bits, device, fixture};
use trainer::encode::LatentStore;
use trainer::pipeline::{MicroBatch, Pipeline};
use trainer::plan::{Plan, Planned};
use trainer::train::batch::{Batches, StepData};
use trainer::train::{self, RunFolder};
use trainer::watch::interrupt::Interrupt;
use trainer::watch::ui::{Ui, Voice};

/// Stages sum the same f32 numbers; only what crosses between them could differ.
const SPLIT: Tolerance = Tolerance { absolute: 1e-6, relative: 2e-5 };

fn ui() -> Ui {
    Ui::new(Voice::Json)
}

struct Ready {
    project: Project,
    planned: Planned,
    encoded: LatentStore,
}

fn ready(project: Project) -> Ready {
    let planned = Plan::make(&project.recipe(), &mut |_, _| {}).unwrap();
    let encoded = train::cache(&planned, &Interrupt::default(), &ui()).unwrap();
    Ready { project, planned, encoded }
}

fn with_captions(captions: &[&str], settings: &str) -> Ready {
    ready(Project::new(&fixture(""), captions, settings))
}

impl Ready {
    fn step(&self, step: u64) -> StepData {
        let batches = Batches::new(&self.planned.plan, &self.planned.dataset, &self.encoded).unwrap();
        batches.step(step, Cursor::default(), self.planned.plan.train.accumulate).unwrap()
    }

    /// The model of the project with these adapters, in stages of so many blocks.
    fn pipeline(&self, adapters: &Adapters, split: &[usize]) -> Pipeline {
        let (config, weights) = self.planned.plan.model.open_dit().unwrap();
        pipeline(&config, &weights, adapters, split)
    }

    fn layers(&self) -> usize {
        self.planned.dit.layers
    }

    /// Adapters whose factors are all random.
    fn random(&self) -> Adapters {
        adapters(&self.planned.dit, 4, 1.5)
    }

    /// What the base predicts for `batch`.
    fn of_base(&self, batch: &MicroBatch) -> Tensor {
        let base = self.pipeline(&Adapters::default(), &[self.layers()]);
        base.predict(std::slice::from_ref(&batch.input)).unwrap().remove(0)
    }
}

const CLASS: &str = "trigger = \"sks\"\n[train]\naccumulate = 2\ncaption_dropout = 0.0\nprior = { weight = 0.5, class = \"a man\" }\n";

/// Two captions, of which one has the trigger in it already.
fn of_class() -> Ready {
    with_captions(&["walks", "the hat of Sks"], CLASS)
}

/// A prior is its clip at the same noise, with another text, and its target is what the base says to that.
#[test]
fn a_prior_is_what_the_base_predicts_at_the_same_noise() {
    let ready = of_class();
    let data = ready.step(0);
    assert_eq!(data.micro_batches.len(), 4, "a prior beside each micro-batch");
    let mut pipeline = ready.pipeline(&ready.random(), &[ready.layers()]);
    let taught = pipeline.with_base_targets(&data.micro_batches).unwrap();
    for (pair, item) in taught.chunks(2).zip(&data.items) {
        let [clip, prior] = pair else { panic!("a clip without its prior") };
        let text = if item == "clip00.webp" { "a man, walks" } else { "the hat of a man" };
        let expected = ready.encoded.text(text).unwrap().unsqueeze(0).unwrap();
        assert_same_bits(text, prior.input.cond.require(Role::TEXT).unwrap(), &expected);
        assert_same_bits("noise", &prior.input.x_bcthw, &clip.input.x_bcthw);
        assert_same_bits("base", &prior.target, &ready.of_base(prior));
        assert_eq!(prior.weights, clip.weights.iter().map(|weight| weight * 0.5).collect::<Vec<f32>>());
    }
    let before: Vec<&Tensor> = data.micro_batches.iter().step_by(2).map(|batch| &batch.target).collect();
    taught.iter().step_by(2).zip(before).for_each(|(clip, old)| assert_same_bits("clip", &clip.target, old));
}

/// An adapter without effect is what the base is, so there is nothing to learn of it: not a bit.
#[test]
fn the_prior_of_an_adapter_that_does_nothing_is_nothing() {
    let ready = of_class();
    let priors: Vec<MicroBatch> = ready.step(0).micro_batches.into_iter().skip(1).step_by(2).collect();
    let (config, weights) = ready.planned.plan.model.open_dit().unwrap();
    for kind in [AdapterKind::Lora, AdapterKind::Dora, AdapterKind::Loha, AdapterKind::Lokr] {
        let lora = LoraConfig { kind, rank: Some(2), ..LoraConfig::default() };
        let targets = lora.select(&config.adaptable_modules()).unwrap();
        let fresh = Adapters::fresh(&targets, &lora, 7, &device()).unwrap();
        let split = [(device(), 0..config.layers)];
        let mut pipeline = Pipeline::load(&weights, &config, &split, &fresh, Base::F32).unwrap();
        let taught = pipeline.with_base_targets(&priors).unwrap();
        let (losses, gradients) = trained(&pipeline, &taught, BlockPlan::default());
        assert!(losses.iter().all(|loss| *loss == 0.0), "{kind:?}: {losses:?}");
        assert!(!gradients.is_empty());
        for (name, gradient) in gradients {
            let most: f32 = gradient.abs().unwrap().max_all().unwrap().to_scalar().unwrap();
            assert_eq!(most, 0.0, "{kind:?}: {name}");
        }
    }
}

#[test]
fn a_prior_is_the_same_on_one_stage_and_on_several() {
    let ready = of_class();
    let data = ready.step(1);
    let [one, two] = [vec![ready.layers()], vec![1, ready.layers() - 1]].map(|split| {
        let mut pipeline = ready.pipeline(&ready.random(), &split);
        let taught = pipeline.with_base_targets(&data.micro_batches).unwrap();
        trained(&pipeline, &taught, BlockPlan::default())
    });
    assert_eq!(one.0, two.0);
    for (name, gradient) in &one.1 {
        assert_close(name, &two.1[name], gradient, SPLIT);
    }
}

/// Inside of the mask the clip is learnt, outside what the base predicts; grey is in between.
#[test]
fn outside_of_a_mask_the_target_is_what_the_base_predicts() {
    let settings = "loss_masks = { outside = 0.5, outside_target = \"base\" }\n[train]\ncaption_dropout = 0.0\nbatch = 2\n";
    let project = Project::new(&fixture(""), &["a ball", "two birds"], settings);
    let [width, height] = SIZE;
    let row: Vec<u8> = (0..width).flat_map(|x| [if x < width / 2 { 255 } else { 0 }; 3]).collect();
    let mask = data::Film::new(width, height, row.repeat(height as usize)).unwrap();
    let style = SheetStyle { columns: 1, cell_width: width, gap: 0 };
    contact_sheet(&project.clips().join("clip00.mask.png"), &[mask], style).unwrap();
    let ready = ready(project);
    let data = ready.step(0);
    let mut pipeline = ready.pipeline(&ready.random(), &[ready.layers()]);
    let taught = pipeline.with_base_targets(&data.micro_batches).unwrap().remove(0);
    let (clip, base) = (&data.micro_batches[0].target, ready.of_base(&data.micro_batches[0]));
    for (sample, item) in data.items.iter().enumerate() {
        let of = |x: &Tensor, at: usize| x.get(sample).unwrap().narrow(3, at, 1).unwrap();
        // The mask's edge is between columns of latents; the picture may be coded with a loss beside it.
        for at in [0, 1, 4, 5] {
            let expected = if at < 3 || item == "clip01.webp" { clip } else { &base };
            let tolerance = Tolerance { absolute: 0.03, relative: 0.0 };
            assert_close(item, &of(&taught.target, at), &of(expected, at), tolerance);
        }
    }
}

/// The clips of a regularisation set only give the noise: what is learnt there is the base, and no prior is beside them.
#[test]
fn a_set_may_have_the_base_as_its_target() {
    let project = Project::new(&fixture(""), &["a ball"], "");
    let others = project.root().join("others");
    std::fs::create_dir(&others).unwrap();
    data::write_webp(&others.join("b.webp"), &flat(SIZE[0], SIZE[1], &[9, 90, 30, 60, 120, 10, 10]), 16.0)
        .unwrap();
    std::fs::write(others.join("b.txt"), "a field").unwrap();
    let recipe = std::fs::read_to_string(project.recipe()).unwrap();
    let sets = "[[data.sets]]\nfolder = \"clips\"\n[[data.sets]]\nfolder = \"others\"\ntarget = \"base\"\n";
    let train = "[train]\naccumulate = 2\nbatch = 2\nprior.weight = 1.0\n";
    std::fs::write(project.recipe(), recipe.replace("folder = \"clips\"\n", "") + sets + train).unwrap();
    let ready = ready(project);
    let data = ready.step(0);
    let at = data.items.iter().position(|item| item == "others/b.webp").unwrap();
    assert_eq!(data.micro_batches.len(), 3, "two sets are two batches, and one has a prior");
    let own = data.micro_batches.iter().zip(["clips", "prior", "others"]);
    let order = if at == 0 { [2, 0, 1] } else { [0, 1, 2] };
    let names: Vec<&str> = own.map(|(_, name)| name).collect();
    for (place, expected) in order.into_iter().enumerate() {
        let is_of_base = data.micro_batches[place].objective.of_base.is_some();
        assert_eq!(is_of_base, names[expected] != "clips", "{}", names[expected]);
    }
    assert!(ready.planned.notes.iter().any(|note| note.contains("predictions of the base")));
}

/// How far a trained network is from the base where nothing was to be learnt: at the empty prompt.
fn drift(prior: &str) -> (f64, Vec<serde_json::Value>) {
    let settings = format!(
        "[adapter]\nrank = 4\n[train]\nsteps = 30\naccumulate = 2\ncaption_dropout = 0.0\n{prior}[optimizer]\nlr = 0.02\nwarmup = 0\n"
    );
    let mut ready = with_captions(&["a ball", "two birds"], &settings);
    let folder = RunFolder::begin(&mut ready.planned.plan).unwrap();
    train::train(&ready.planned, &folder, &Interrupt::default(), &ui()).unwrap();
    let log = std::fs::read_to_string(ready.project.run().join("metrics.jsonl")).unwrap();
    let rows: Vec<serde_json::Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|row: &serde_json::Value| row["lr"].is_f64())
        .collect();
    let mut files = std::fs::read_dir(ready.project.run().join("adapters")).unwrap();
    let file = models::adapter::files::read(&files.next().unwrap().unwrap().path()).unwrap();
    let lora = LoraConfig { rank: Some(4), ..LoraConfig::default() };
    let (learnt, _) = Adapters::begun(&ready.planned.targets, &lora, &file, 0, &device()).unwrap();
    let mut batch = ready.step(40).micro_batches.remove(0);
    let text = ready.encoded.text("").unwrap().unsqueeze(0).unwrap();
    batch.input.cond = batch.input.cond.with(Role::TEXT, text);
    let own = ready
        .pipeline(&learnt, &[ready.layers()])
        .predict(std::slice::from_ref(&batch.input))
        .unwrap()
        .remove(0);
    let far = (own - ready.of_base(&batch)).unwrap().sqr().unwrap().mean_all().unwrap();
    (f64::from(far.to_scalar::<f32>().unwrap()), rows)
}

/// In a whole run: what the prior is about stays nearer to the base, and the log tells its loss, which begins at 0.
#[test]
fn a_prior_keeps_what_the_base_knows() {
    let ((without, rows), (with, rows_of_prior)) = (drift(""), drift("prior.weight = 1.0\n"));
    assert!(with < 0.5 * without, "with a prior {with}, without {without}");
    assert!(rows.iter().all(|row| row.get("prior").is_none()));
    let losses: Vec<f64> = rows_of_prior.iter().map(|row| row["prior"].as_f64().unwrap()).collect();
    assert!(losses[0] == 0.0 && losses[1..].iter().all(|loss| *loss > 0.0), "{losses:?}");
}

#[test]
fn priors_that_cannot_be_are_refused_by_name() {
    for (settings, words) in [
        ("[train]\nprior.share = 0.5\n", "train.prior.share"),
        ("[train]\nprior.weight = -1.0\n", "train.prior.weight"),
        ("[train]\nprior = { weight = 1.0, share = 0.0 }\n", "train.prior.share"),
        ("[train]\nprior = { weight = 1.0, class = \"a man\" }\n", "set data.trigger"),
        (
            "trigger = \"sks\"\n[train]\nprior = { weight = 1.0, class = \"a SKS man\" }\n",
            "holds the trigger",
        ),
        ("trigger = \"sks\"\n[train]\nprior.class = \"a man\"\n", "train.prior.weight"),
        ("[train]\nprior.wieght = 1.0\n", "did you mean `weight`"),
        ("loss_masks = { outside = 0, outside_target = \"base\" }\n", "set it above 0"),
        ("loss_masks = { outside_target = \"bases\" }\n", "bases"),
    ] {
        let project = Project::new(&fixture(""), &["a ball"], settings);
        let error = Plan::make(&project.recipe(), &mut |_, _| {}).unwrap_err().to_string();
        assert!(error.contains(words), "{settings}: {error}");
    }
}
