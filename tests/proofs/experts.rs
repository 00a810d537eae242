//! Two experts in one run: each sees its own noise levels, in the share that was set, and becomes what it would have become in
//! a run of its own; where one rests while the other works, not a bit is different.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use data::Cursor;
use kernels::Tensor;
use kernels::optimiser::State;
use models::adapter::AdapterKind;
use models::dit::{Base, BlockPlan, DitConfig};
use models::expert::Expert;
use proofs::project::{Project, SIZE};
use proofs::small::{adapters, config, pipeline, weights};
use proofs::{assert_same_bits, device, fixture, randn};
use trainer::adapters::beginning;
use trainer::encode::LatentStore;
use trainer::learning::NoiseRange;
use trainer::learning::ema::EmaConfig;
use trainer::learning::noise::{Streams, TimestepConfig};
use trainer::learning::optim::{Optimizer, OptimizerConfig, Saved, Step, checked_norm, clip_factor};
use trainer::machine::forecast::{
    Decoding, Engine, Forecaster, LossTask, Neighbours, Networks, StagePlan, Task, Way,
};
use trainer::pipeline::{NetworkInput, Pipeline, WeightParking};
use trainer::plan::{Plan, Planned};
use trainer::train::batch::Batches;
use trainer::train::checkpoint::{self, part_of};
use trainer::train::{self, RunFolder};
use trainer::watch::interrupt::Interrupt;
use trainer::watch::ui::{Ui, Voice};

const CAPTIONS: [&str; 3] = ["a red ball", "two birds fly over the sea", "a fox"];
const BOUNDARY: f64 = 0.875;

fn ui() -> Ui {
    Ui::new(Voice::Json)
}

/// A project of the tiny model of two experts, with `model` in its `[model]`.
fn project(model: &str, settings: &str) -> Project {
    let project = Project::of_folder(&fixture("repo_official_a14b"), SIZE, &CAPTIONS, settings);
    let recipe = std::fs::read_to_string(project.recipe()).unwrap();
    std::fs::write(project.recipe(), recipe.replacen("[model]", &format!("[model]\n{model}"), 1)).unwrap();
    project
}

fn planned(project: &Project) -> Planned {
    Plan::make(&project.recipe(), &mut |_, _| {}).unwrap()
}

fn refusal(project: &Project) -> String {
    Plan::make(&project.recipe(), &mut |_, _| {}).unwrap_err().to_string()
}

fn cached(planned: &Planned) -> LatentStore {
    train::cache(planned, &Interrupt::default(), &ui()).unwrap()
}

/// The states after a whole run.
fn trained(planned: &mut Planned) -> (checkpoint::Progress, Saved, PathBuf) {
    let folder = RunFolder::begin(&mut planned.plan).unwrap();
    train::train(planned, &folder, &Interrupt::default(), &ui()).unwrap();
    let newest = checkpoint::newest(&folder.checkpoints()).unwrap().unwrap();
    let (progress, saved) = checkpoint::load(&newest).unwrap();
    (progress, saved, folder.root().to_owned())
}

#[test]
fn an_expert_sees_its_own_noise_levels_in_the_share_that_is_set() {
    for (model, settings, high) in [
        ("expert = \"high\"", "", 1.0),
        ("expert = \"low\"", "", 0.0),
        ("expert = \"both\"", "[train]\nhigh_share = 0.3\n", 0.3),
        ("expert = \"both\"", "[train]\nhigh_share = 0.0\n", 0.0),
        ("expert = \"both\"", "", f64::NAN),
    ] {
        let project = project(model, settings);
        let planned = planned(&project);
        let encoded = cached(&planned);
        let batches = Batches::new(&planned.plan, &planned.dataset, &encoded).unwrap();
        let (mut counts, mut cursor) = ([0u32; 2], Cursor::default());
        for step in 0..600 {
            let data = batches.step(step, cursor, 3).unwrap();
            cursor = data.cursor;
            for (expert, sigma) in data.experts.iter().zip(&data.sigmas) {
                let expert = expert.unwrap();
                assert_eq!(expert == Expert::High, *sigma >= BOUNDARY, "{model}: sigma {sigma} for {expert}");
                counts[usize::from(expert == Expert::Low)] += 1;
            }
        }
        // By default the part of the distribution above the boundary, counted here from unrestricted draws.
        let (config, streams) = (TimestepConfig::default(), Streams::new(77));
        let is_high = |i: &u64| config.sigma(streams.sigma(*i, 0)).unwrap() >= BOUNDARY;
        let natural = || (0..40_000).filter(is_high).count() as f64 / 40_000.0;
        let expected = if high.is_nan() { natural() } else { high };
        let total = f64::from(counts[0] + counts[1]);
        // Five standard deviations of a share of 1800 draws, and of 40 000.
        let bound = 5.0 * (expected * (1.0 - expected) * (1.0 / total + 1.0 / 40_000.0)).sqrt();
        let share = f64::from(counts[0]) / total;
        assert!((share - expected).abs() <= bound, "{model} {settings}: {share}, expected {expected}");
    }
}

const STEPS: u64 = 6;
/// Kernels are deterministic, since runs are compared to the bit: on a GPU sums of attention's gradients have no order otherwise.
const BOTH: &str = "held_out = [\"clip02*\"]\n[adapter]\nrank = 2\ndropout = 0.1\n[train]\nsteps = 6\naccumulate = 2\n\
                    high_share = 0.4\n[optimizer]\nlr = 1e-2\nclip_norm = 0.05\nschedule = \"cosine\"\n[export]\nprecision = \"float32\"\n\
                    [devices]\ndeterministic = true\n";

/// What the micro-batches of one expert make of its adapter: the states, and how many updates were made.
fn alone(planned: &Planned, encoded: &LatentStore, expert: Expert) -> (BTreeMap<String, State>, u64) {
    let plan = &planned.plan;
    let batches = Batches::new(plan, &planned.dataset, encoded).unwrap();
    let (config, weights) = plan.model.dits.of(expert).open().unwrap();
    let fresh = beginning(&plan.adapter, None, &planned.targets, plan.run.seed, &ui()).unwrap();
    let split = plan.devices.open().unwrap();
    let mut pipeline = Pipeline::load(&weights, &config, &split, &fresh, plan.model.precision.dit()).unwrap();
    pipeline.set_ffn_tokens(plan.memory.ffn_tokens);
    let mut optimizer = Optimizer::new(&pipeline, plan.optimizer.rule()).unwrap();
    let (mut cursor, mut updates) = (Cursor::default(), 0);
    for step in 0..STEPS {
        let data = batches.step(step, cursor, plan.train.accumulate).unwrap();
        cursor = data.cursor;
        let own = data.of(Some(expert));
        if own.is_empty() {
            continue;
        }
        updates += 1;
        let outcome = pipeline.train(&own, &pipeline.plans(&plan.memory.keeping()).unwrap()).unwrap();
        let norm = checked_norm(&outcome.gradients, optimizer.states().keys()).unwrap();
        let o = &plan.optimizer;
        let lr = o.rates(STEPS).at(step);
        let step = Step { lr, factor: clip_factor(norm, o.clip_norm), number: updates };
        optimizer.update(&outcome.gradients, &step).unwrap();
        optimizer.publish(&mut pipeline);
    }
    (optimizer.states().clone(), updates)
}

fn assert_same_states(what: &str, got: &BTreeMap<String, State>, expected: &BTreeMap<String, State>) {
    assert!(!expected.is_empty() && got.keys().eq(expected.keys()), "{what}: other tensors");
    for (name, state) in expected {
        let got = &got[name];
        assert_eq!((got.slots.len(), state.slots.len()), (2, 2));
        let all: [(&str, &Tensor, &Tensor); 3] = [
            ("parameter", &got.parameter, &state.parameter),
            ("first moment", &got.slots[0], &state.slots[0]),
            ("second moment", &got.slots[1], &state.slots[1]),
        ];
        for (part, got, expected) in all {
            let host = |t: &Tensor| t.to_device(&kernels::Device::Cpu).unwrap();
            assert_same_bits(&format!("{what}: {part} of {name}"), &host(got), &host(expected));
        }
    }
}

/// Steps without a micro-batch for an expert leave it unchanged: its moments, its count, its adapter. And parking in turn
/// changes nothing at all.
#[test]
fn both_experts_become_what_each_becomes_alone() {
    let project = project("expert = \"both\"", BOTH);
    let mut planned = planned(&project);
    let encoded = cached(&planned);
    let (progress, states, folder) = trained(&mut planned);
    let mut skipped = 0;
    for (expert, updates) in [(Expert::High, progress.updates.high), (Expert::Low, progress.updates.low)] {
        let (expected, made) = alone(&planned, &encoded, expert);
        assert_eq!(updates, made, "updates of the expert for {expert} noise");
        assert_same_states(expert.name(), &part_of(&states, Some(expert)).tensors, &expected);
        skipped += STEPS - made;
        let name = format!("tiny_{}.safetensors", expert.suffix());
        let file = models::adapter::files::read(&folder.join("adapters").join(&name)).unwrap();
        assert_eq!(file.expert, Some(expert), "{name}");
        assert_same_export(&name, &file, &expected);
    }
    assert!(skipped > 0, "no step gives an expert nothing, so nothing is proven of it");
    assert_rows_tell_both(&folder.join("metrics.jsonl"));

    let mut in_turn = Plan::make(&project.recipe(), &mut |_, _| {}).unwrap();
    assert_eq!(in_turn.plan.memory.networks, Networks::SideBySide);
    in_turn.plan.memory.networks = Networks::InTurn;
    let (again, same, _) = trained(&mut in_turn);
    assert_eq!((again.step, again.updates), (progress.step, progress.updates));
    assert_same_states("in turn", &same.tensors, &states.tensors);
}

/// The factors in a file are those of the run.
fn assert_same_export(
    name: &str,
    file: &models::adapter::files::AdapterFile,
    states: &BTreeMap<String, State>,
) {
    for module in file.modules.keys() {
        let of = |factor: &str| states[&format!("{module}.{factor}.weight")].parameter.clone();
        let expected = of("lora_B").matmul(&of("lora_A")).unwrap();
        let got = file.modules[module].delta().unwrap().unwrap();
        // alpha is the rank; the product is summed in one order here and there.
        proofs::assert_close(
            &format!("{name}: {module}"),
            &got,
            &expected,
            proofs::Tolerance::relative(1e-5),
        );
    }
    assert_eq!(file.modules.len() * 2, states.len(), "{name}: modules");
}

/// A row has the loss of each expert that had a micro-batch, and their mean by samples as its own.
fn assert_rows_tell_both(metrics: &Path) {
    let text = std::fs::read_to_string(metrics).unwrap();
    let rows: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let mut of_steps = 0;
    for row in rows.iter().filter(|row| row["loss"].is_f64()) {
        of_steps += 1;
        let experts = row["experts"].as_object().unwrap();
        let weighted = |own: &serde_json::Value| {
            own["loss"].as_f64().unwrap() * own["micro_batches"].as_f64().unwrap() / 2.0
        };
        let mean: f64 = experts.values().map(weighted).sum();
        assert!((mean / row["loss"].as_f64().unwrap() - 1.0).abs() < 1e-9, "{row}");
        let high =
            row["sigma"].as_array().unwrap().iter().filter(|s| s.as_f64().unwrap() >= BOUNDARY).count();
        let told = experts.get("high").map_or(0, |own| own["micro_batches"].as_u64().unwrap());
        assert_eq!(told, high as u64, "{row}");
    }
    assert_eq!(of_steps, STEPS);
    let held_out: Vec<&str> = rows
        .iter()
        .filter(|row| row["eval_loss"].is_f64())
        .map(|row| row["expert"].as_str().unwrap())
        .collect();
    assert_eq!(held_out.len(), 4, "each expert before the first step and after the last: {held_out:?}");
    assert!(held_out.contains(&"high") && held_out.contains(&"low"));
}

/// On a GPU the matrices are parked and come back; on the CPU the same calls move nothing.
#[test]
fn a_network_that_rested_is_the_same_to_the_bit() {
    // So wide that no two matrices share a slab of pinned memory, as those of published models never do.
    let config = config(3, 1024);
    let networks =
        [0.5, 1.5].map(|size| pipeline(&config, &weights(&config), &adapters(&config, 3, size), &[1, 2]));
    let [mut first, mut second] = networks;
    let input = NetworkInput::new(
        randn("resting", (1, 16, 2, 6, 8)),
        Tensor::new(&[700f32], &device()).unwrap(),
        randn("resting text", (1, 5, 24)),
    );
    let ask = |pipeline: &Pipeline| pipeline.predict(std::slice::from_ref(&input)).unwrap().remove(0);
    let expected = [ask(&first), ask(&second)];
    let parking = WeightParking::new(&first).unwrap();
    let mut resting = parking.rest(&mut first).unwrap();
    assert!(first.predict(std::slice::from_ref(&input)).is_err(), "a network that rests still answers");
    for _ in 0..2 {
        assert_same_bits("second", &ask(&second), &expected[1]);
        resting = parking.exchange(&mut second, &mut first, resting).unwrap();
        assert_same_bits("first", &ask(&first), &expected[0]);
        resting = parking.exchange(&mut first, &mut second, resting).unwrap();
    }
    parking.wake(&mut first, resting).unwrap();
    assert_same_bits("first, awake", &ask(&first), &expected[0]);
    assert_same_bits("second, awake", &ask(&second), &expected[1]);
    assert_eq!(parking.bytes(), forecast_in_turn(&config), "host memory, pinned and forecast");
}

/// The host memory that two experts in turn are forecast to take on the stages of [1, 2] blocks; none on the CPU.
fn forecast_in_turn(config: &DitConfig) -> Vec<u64> {
    let task = Task {
        dit: config.into(),
        base: Base::F32,
        targets: &[],
        kind: AdapterKind::Lora,
        factor: None,
        rank: 1,
        ranks: BTreeMap::new(),
        dropout: false,
        batch: 1,
        accumulate: 1,
        small: None,
        replicas: 1,
        latents: (2, 6, 8),
        continues: false,
        networks: Networks::InTurn,
        decoding: Decoding::Beside,
        rule: OptimizerConfig::default().rule(),
        ema: EmaConfig::default(),
        norm_limit: None,
        objective: LossTask::default(),
    };
    let engine = if device().is_cpu() { Engine::Cpu } else { Engine::Chunked };
    let of_stage = |(index, blocks): (usize, Range<usize>)| {
        let plan = StagePlan { keep: vec![BlockPlan::default(); blocks.len()], blocks, ffn_tokens: 1024 };
        let way = |is_there: bool| is_there.then_some(Way::Same);
        let at = Neighbours { index, count: 2, previous: way(index == 1), next: way(index == 0) };
        Forecaster::new(&task).stage(engine, &plan, at).unwrap().host
    };
    [0..1, 1..3].into_iter().enumerate().map(of_stage).collect()
}

#[test]
fn a_plan_tells_what_is_trained_on_what() {
    let planned = planned(&project("expert = \"both\"", "[train.timesteps]\nmin = 0.5\n"));
    let plan = &planned.plan;
    assert_eq!(plan.model.boundary, Some(BOUNDARY));
    let ranges = Expert::ALL.map(|expert| NoiseRange::Of { expert, boundary: BOUNDARY });
    assert_eq!(plan.trained_ranges(), ranges);
    let whole = TimestepConfig::default();
    let expected = whole.share_from(BOUNDARY) / whole.share_from(0.5);
    assert!((plan.train.high_share.unwrap() - expected).abs() < 1e-12);
    // No sigma is drawn below the boundary, so nothing is trained there.
    let planned = self::planned(&project("expert = \"both\"", "[train.timesteps]\nmin = 0.9\n"));
    assert_eq!(planned.plan.trained_ranges(), ranges[..1]);
}

/// Sampling clips uses both experts, so a run of one with clips needs room for the other.
#[test]
fn a_plan_counts_the_expert_that_only_makes_clips() {
    let clips = "[sample]\nprompts = [\"a cloud\"]\n";
    for (model, settings, expected) in [
        ("expert = \"high\"", "", Networks::One),
        ("expert = \"high\"", clips, Networks::MakesRoom),
        ("expert = \"both\"", clips, Networks::SideBySide),
        ("expert = \"both\"", &format!("[train]\nhigh_share = 1\n{clips}"), Networks::MakesRoom),
    ] {
        let planned = planned(&project(model, settings));
        assert_eq!(planned.plan.memory.networks, expected, "{model} {settings}");
    }
}

#[test]
fn experts_that_cannot_be_are_refused_by_name() {
    let refuse = |model: &str, settings: &str, told: &[&str]| {
        let error = refusal(&project(model, settings));
        told.iter().for_each(|words| assert!(error.contains(words), "no \"{words}\" in {error}"));
    };
    let [high, low] =
        ["high_noise_model", "low_noise_model"].map(|name| fixture("repo_official_a14b").join(name));
    refuse("", "", &["has two experts", "model.expert", "\"both\""]);
    refuse(
        &format!("expert = \"both\"\ndit_low = {low:?}"),
        "",
        &["model.expert", "low_noise_model", "model.dit_high", "model.dit_low"],
    );
    refuse("expert = \"high\"", "[train]\nhigh_share = 0.5\n", &["train.high_share", "\"both\""]);
    refuse("expert = \"both\"", "[train]\nhigh_share = 1.5\n", &["train.high_share", "between 0 and 1"]);
    refuse(
        "expert = \"low\"",
        "[train.timesteps]\nmin = 0.9\n",
        &["train.timesteps.min", "low noise", "0.875"],
    );

    // The same network under another name, and one of another kind.
    let desk = tempfile::tempdir().unwrap();
    let copy = desk.path().join("other");
    std::fs::create_dir(&copy).unwrap();
    for entry in std::fs::read_dir(&high).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    let pair = |other: &Path| format!("expert = \"both\"\ndit_high = {high:?}\ndit_low = {other:?}");
    refuse(&pair(&copy), "", &["other", "high_noise_model", "the same weights"]);
    refuse(&pair(&fixture("repo_diffusers_i2v21/transformer")), "", &["different sizes", "transformer"]);
}

/// An adapter of one expert is not applied to the other, whether its header or its name identifies it.
#[test]
fn adapters_of_the_other_expert_are_refused() {
    let project = project("expert = \"low\"", "[adapter]\nrank = 2\n[train]\nsteps = 1\n");
    let mut planned = planned(&project);
    let (.., folder) = trained(&mut planned);
    let low = folder.join("adapters/tiny_low_noise.safetensors");
    let renamed = folder.join("adapters/style.safetensors");
    std::fs::copy(&low, &renamed).unwrap();
    for file in [&low, &renamed] {
        let error =
            refusal(&self::project("expert = \"high\"", &format!("[adapter]\ninit_from = {file:?}\n")));
        assert!(error.contains("adapter.init_from") && error.contains("low noise"), "{error}");
        let of_clips = format!("[sample]\nadapter_high = {file:?}\n");
        let error = refusal(&self::project("expert = \"both\"", &of_clips));
        assert!(error.contains("sample.adapter_high") && error.contains("high_noise"), "{error}");
    }
    let begun = self::project("expert = \"low\"", &format!("[adapter]\ninit_from = {renamed:?}\n"));
    assert!(Plan::make(&begun.recipe(), &mut |_, _| {}).is_ok());
}

/// The files of one run are what the next begins with, each expert with its own; a file for an expert that is not trained, or
/// for the other one, is refused.
#[test]
fn each_expert_begins_with_its_own_adapter() {
    let settings = |of_adapter: &str, of_training: &str| {
        format!("[adapter]\n{of_adapter}\n[export]\nprecision = \"float32\"\n{of_training}")
    };
    let hard = "[train]\nsteps = 3\naccumulate = 4\nhigh_share = 0.5\n[optimizer]\nlr = 0.05\nwarmup = 0\n";
    let earlier = project("expert = \"both\"", &settings("rank = 2", hard));
    let (.., first) = trained(&mut planned(&earlier));
    let file =
        |run: &Path, expert: Expert| run.join(format!("adapters/tiny_{}.safetensors", expert.suffix()));
    let [high, low] = Expert::ALL.map(|expert| file(&first, expert));

    // A step so short that nothing moves.
    let still = "[train]\nsteps = 1\n[optimizer]\nlr = 1e-30\n";
    let begin = settings(&format!("init_from_high = {high:?}\ninit_from_low = {low:?}"), still);
    let later = project("expert = \"both\"", &begin);
    let mut planned = planned(&later);
    assert_eq!(planned.plan.adapter.rank, Some(2), "that of the files");
    let (.., second) = trained(&mut planned);
    let read = |path: &Path| models::adapter::files::read(path).unwrap();
    let mut apart = 0.0_f32;
    for expert in Expert::ALL {
        let (given, begun) = (read(&file(&first, expert)), read(&file(&second, expert)));
        let other = read(&file(&first, if expert == Expert::High { Expert::Low } else { Expert::High }));
        assert!(!given.modules.is_empty() && begun.modules.keys().eq(given.modules.keys()));
        for module in given.modules.keys() {
            let of =
                |file: &models::adapter::files::AdapterFile| file.modules[module].delta().unwrap().unwrap();
            let exact = proofs::Tolerance::relative(1e-5);
            proofs::assert_close(&format!("{expert}: {module}"), &of(&begun), &of(&given), exact);
            let difference = (of(&given) - of(&other)).unwrap().abs().unwrap().max_all().unwrap();
            apart = apart.max(difference.to_scalar().unwrap());
        }
    }
    assert!(apart > 1e-3, "the two experts learnt the same, so nothing is proven");

    let refuse = |model: &str, of_adapter: &str, told: &[&str]| {
        let error = refusal(&project(model, &settings(of_adapter, "")));
        told.iter().for_each(|words| assert!(error.contains(words), "no \"{words}\" in {error}"));
    };
    let both = "expert = \"both\"";
    refuse(both, &format!("init_from_high = {low:?}"), &["adapter.init_from_high", "low noise"]);
    refuse(both, &format!("init_from = {low:?}"), &["adapter.init_from:", "low noise"]);
    refuse(
        both,
        &format!("init_from = {low:?}\ninit_from_low = {low:?}"),
        &["adapter.init_from_low", "beside adapter.init_from"],
    );
    let unused = format!("init_from_low = {low:?}");
    refuse("expert = \"high\"", &unused, &["adapter.init_from_low", "low noise", "not trained"]);
    let whole = Project::of_folder(&fixture("repo_diffusers_i2v21"), SIZE, &CAPTIONS, &settings(&unused, ""));
    let error = refusal(&whole);
    assert!(error.contains("adapter.init_from_low") && error.contains("one network"), "{error}");
}
