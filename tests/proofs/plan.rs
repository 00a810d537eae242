//! The plan: it reads back as it was written, and every setting of a recipe that changes is named.

use kernels::device::{Repeatability, Settings};
use models::adapter::Scaling;
use proofs::project::Project;
use sha2::{Digest, Sha256};
use trainer::base::{DitFiles, Dits};
use trainer::bytes::Bytes;
use trainer::learning::lr::LrSchedule;
use trainer::learning::noise::{Distribution, Weighting};
use trainer::machine::devices::Transfer;
use trainer::machine::memory::KeepConfig;
use trainer::plan::{Overrides, Plan, Planned};

fn planned(captions: &[&str], settings: &str) -> (Project, Planned) {
    let project = Project::new(&proofs::fixture(""), captions, settings);
    let planned = Plan::make(&project.recipe(), &mut |_, _| {}).unwrap();
    (project, planned)
}

const CAPTIONS: [&str; 3] = ["a red ball", "a \"quoted\" line\nand another", "eine Kugel, größer"];
const SETTINGS: &str = r#"
trigger = "sks"
held_out = ["clip02*"]
repeats = { "clip0*" = 2 }

[sample]
prompts = ["a ball --s 3 --l 1 --d 7", "another, \"quoted\" \\ line --n nothing"]
negative = ""
size = [32, 32]
frames = 1
"#;

#[test]
fn a_plan_reads_back_as_written() {
    let (project, planned) = planned(&CAPTIONS, SETTINGS);
    let path = project.root().join("plan.toml");
    std::fs::write(&path, planned.plan.to_toml().unwrap()).unwrap();
    let back = Plan::read(&path).unwrap();
    assert_eq!(back, planned.plan);
    assert_eq!(back.hash().unwrap(), planned.plan.hash().unwrap());
    assert_eq!(back.differences(&planned.plan).unwrap(), []);
}

/// Nothing in a plan is left to be decided later: what the recipe leaves out has its value.
#[test]
fn a_plan_settles_what_the_recipe_leaves_out() {
    let (_project, planned) = planned(&CAPTIONS, SETTINGS);
    let plan = &planned.plan;
    assert_eq!((plan.adapter.alpha, plan.train.timesteps.shift), (Some(32.0), Some(3.0)));
    assert_eq!((plan.data.fps, plan.run.seed, plan.run.name.as_str()), (Some(16.0), 42, "tiny"));
    assert_eq!((plan.devices.split.as_slice(), planned.targets.len()), (&[2][..], 20));
    assert_eq!((plan.dataset.clips, plan.dataset.items, plan.dataset.held_out), (3, 2, 1));
    let [first, second] = plan.sample.clips.as_slice() else { panic!("two clips") };
    assert_eq!((first.prompt.as_str(), first.steps, first.guidance, first.seed), ("a ball", 3, 1.0, 7));
    assert_eq!((second.negative.as_str(), second.seed, second.shift), ("nothing", 42, 5.0));
}

#[test]
fn every_changed_setting_is_named() {
    let (_project, planned) = planned(&CAPTIONS, SETTINGS);
    let plan = planned.plan;
    type Change = fn(&mut Plan);
    let changes: [(&str, Change); 16] = [
        ("adapter.rank", |p| p.adapter.rank = Some(31)),
        ("adapter.scaling", |p| p.adapter.scaling = Scaling::RsLora),
        ("adapter.targets", |p| p.adapter.targets.truncate(1)),
        ("data.sizes", |p| p.data.sizes[0] = [64, 64]),
        ("data.repeats.clip0*", |p| p.data.repeats.clear()),
        ("dataset.digest", |p| p.dataset.digest.push('0')),
        ("model.dits.single.weights", |p| {
            p.model.dits = Dits::Single(DitFiles {
                weights: "elsewhere".into(),
                ..p.model.trained_dit().unwrap().clone()
            });
        }),
        ("optimizer.betas", |p| p.optimizer.betas = Some([0.9, 0.99])),
        ("optimizer.schedule", |p| p.optimizer.schedule = LrSchedule::Cosine),
        ("run.seed", |p| p.run.seed = 43),
        ("sample.clips.1.guidance", |p| p.sample.clips[1].guidance = 4.999),
        ("memory.keep", |p| p.memory.keep = KeepConfig::All),
        ("train.timesteps.distribution", |p| p.train.timesteps.distribution = Distribution::Uniform),
        ("train.timesteps.min", |p| p.train.timesteps.min = 1e-9),
        ("train.timesteps.weighting", |p| p.train.timesteps.weighting = Weighting::Bsmntw),
        ("data.trigger", |p| p.data.trigger = None),
    ];
    for (key, change) in changes {
        let mut changed = plan.clone();
        change(&mut changed);
        let differences = plan.differences(&changed).unwrap();
        let keys: Vec<&str> = differences.iter().map(|d| d.key.as_str()).collect();
        assert_eq!(keys, [key]);
        assert_ne!(differences[0].before, differences[0].after, "{key}");
        assert_ne!(plan.hash().unwrap(), changed.hash().unwrap(), "{key}");
    }
}

/// A caption, a clip or the order of frames that changes is a change of the plan, though no key of the recipe does.
#[test]
fn the_data_is_part_of_the_plan() {
    let (project, planned) = planned(&CAPTIONS, SETTINGS);
    std::fs::write(project.clips().join("clip00.txt"), "a blue ball").unwrap();
    let again = Plan::make(&project.recipe(), &mut |_, _| {}).unwrap();
    let keys: Vec<String> =
        planned.plan.differences(&again.plan).unwrap().into_iter().map(|d| d.key).collect();
    assert_eq!(keys, ["dataset.digest"]);
}

/// A run of a version that hashed Rust's debug text resumes: its digest is written out here, so that no derive can change it.
#[test]
fn a_run_with_a_digest_of_the_former_form_goes_on() {
    let (_project, planned) = planned(&CAPTIONS[..1], "repeats = { \"clip0*\" = 2 }\n");
    let hashed = "(\"clip00.webp\", \"a red ball\", Bucket { width: 48, height: 32, frames: 5 }, 0, 2, false)\n\
                  [0, 1, 2, 3, 4]\n";
    let former: String = Sha256::digest(hashed).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(planned.former_digest.as_ref(), Some(&former));
    let mut stored = planned.plan.clone();
    stored.dataset.digest = former;
    let mut now = planned;
    now.keep_to(&stored);
    assert_eq!(stored.differences(&now.plan).unwrap(), []);
    stored.dataset.digest.replace_range(..1, "x");
    now.keep_to(&stored);
    assert_eq!(stored.differences(&now.plan).unwrap().len(), 1, "another digest stays another");
}

/// A memory limit of the command line takes precedence over the recipe's, both reach the GPU to the byte, and the stored plan has
/// which it was.
#[test]
fn a_memory_limit_reaches_the_device_as_it_was_written() {
    let settings = "[devices]\nmemory_limit = \"23GiB\"\ndeterministic = true\ntransfer = \"host\"\n";
    let project = Project::new(&proofs::fixture(""), &CAPTIONS, settings);
    let plan = |overrides: &Overrides| {
        let planned = Plan::make_with(&project.recipe(), overrides, &mut |_, _| {}).unwrap();
        toml::from_str::<Plan>(&planned.plan.to_toml().unwrap()).unwrap()
    };
    let (written, told) = (
        plan(&Overrides::default()),
        plan(&Overrides { memory_limit: Some(Bytes((5 << 30) + 7)), ..Overrides::default() }),
    );
    let settings = |limit| Settings { memory_limit: Some(limit), repeatability: Repeatability::BitForBit };
    assert_eq!(written.devices.settings(), settings(23 << 30));
    assert_eq!(told.devices.settings(), settings((5 << 30) + 7));
    assert_eq!(written.devices.transfer, Transfer::Host);
    let refused = Plan::make_with(
        &project.recipe(),
        &Overrides { memory_limit: Some(Bytes(0)), ..Overrides::default() },
        &mut |_, _| {},
    );
    assert!(refused.unwrap_err().to_string().contains("devices.memory_limit"));
}

/// A driver's error is reported with what to do about it.
#[test]
fn a_gpu_that_gives_out_is_told_as_a_way_out() {
    for (words, way_out) in [
        ("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")", "devices.stages"),
        ("DriverError(CUDA_ERROR_NO_DEVICE, \"no CUDA-capable device is detected\")", "nvidia-smi"),
        ("DriverError(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, \"...\")", "newer driver"),
        ("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"...\")", "--resume"),
    ] {
        let error = kernels::Error::Cuda(words.into());
        let told = trainer::Error::from(models::Error::from(error)).to_string();
        assert!(told.contains(way_out) && told.contains(words) && told.lines().count() == 1, "{told}");
    }
    let other = trainer::Error::from(kernels::Error::msg("shape mismatch"));
    assert!(matches!(other, trainer::Error::Tensor(_)), "{other:?}");
}

#[test]
fn what_a_recipe_names_without_use_is_told() {
    let (project, planned) = planned(&CAPTIONS[..1], "");
    assert!(planned.notes.is_empty(), "{:?}", planned.notes);
    let recipe = std::fs::read_to_string(project.recipe()).unwrap();
    for (key, file) in [("clip", "clip/weights_hf.safetensors"), ("folder", "repo_official_a14b")] {
        let named = format!("[model]\n{key} = {:?}", proofs::fixture(file));
        std::fs::write(project.recipe(), recipe.replacen("[model]", &named, 1)).unwrap();
        let notes = Plan::make(&project.recipe(), &mut |_, _| {}).unwrap().notes;
        let is_told = |note: &String| note.contains(&format!("model.{key}:")) && note.contains(file);
        assert!(notes.len() == 1 && is_told(&notes[0]), "{notes:?}");
    }
}
