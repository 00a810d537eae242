//! Adapters below the one that is trained: a run on them is a run on the model that they were merged into.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kernels::low_rank::Factors;
use kernels::{DType, Device};
use models::adapter::files::{AdapterFile, Precision, Style, read, write};
use models::adapter::{Adapter, Adapters, ApplyMode};
use models::weights::write_safetensors;
use proofs::project::Project;
use proofs::{assert_same_bits, fixture, randn};
use trainer::adapters;
use trainer::plan::{Plan, Planned};
use trainer::train::export::adapter_file;
use trainer::train::{self, RunFolder, checkpoint};
use trainer::watch::interrupt::Interrupt;
use trainer::watch::ui::{Ui, Voice};

const CAPTIONS: [&str; 2] = ["a ball", "two birds"];
const RUN: &str = "[train]\nsteps = 3\n[optimizer]\nlr = 0.01\nwarmup = 0\n";

fn ui() -> Ui {
    Ui::new(Voice::Json)
}

fn planned(project: &Project) -> trainer::Result<Planned> {
    Plan::make(&project.recipe(), &mut |_, _| {})
}

/// A LoRA on every module of `planned`, written as `path`.
fn preset(path: &Path, planned: &Planned) -> AdapterFile {
    let mut preset = Adapters::default();
    for target in &planned.targets {
        let a = (randn(&format!("{}.a", target.module), (2, target.input)) * 0.1).unwrap();
        let b = (randn(&format!("{}.b", target.module), (target.out, 2)) * 0.1).unwrap();
        preset.attach(target.module.clone(), Adapter::trainable(Factors { a, b, scale: 1.0 }));
    }
    write(path, &adapter_file(&preset).unwrap(), Style::Comfy, Precision::Float32).unwrap();
    read(path).unwrap()
}

/// What a run learns, and the adapter file that it writes.
fn trained(project: &Project) -> (checkpoint::Progress, BTreeMap<String, kernels::Tensor>, PathBuf) {
    let mut planned = planned(project).unwrap();
    let folder = RunFolder::begin(&mut planned.plan).unwrap();
    train::train(&planned, &folder, &Interrupt::default(), &ui()).unwrap();
    let newest = checkpoint::newest(&folder.checkpoints()).unwrap().unwrap();
    let (progress, saved) = checkpoint::load(&newest).unwrap();
    let tensors = saved.tensors.into_iter().map(|(name, state)| (name, state.parameter)).collect();
    let mut files = std::fs::read_dir(folder.adapters()).unwrap();
    (progress, tensors, files.next().unwrap().unwrap().path())
}

fn with_preset(settings: &str) -> (Project, PathBuf) {
    let project = Project::new(&fixture(""), &CAPTIONS, settings);
    let plain = Project::new(&fixture(""), &CAPTIONS, "");
    let path = project.root().join("preset.safetensors");
    preset(&path, &planned(&plain).unwrap());
    (project, path)
}

/// To the bit; and what is written is what was learnt, without what is below it, which its header names.
#[test]
fn a_run_on_an_adapter_is_a_run_on_the_model_that_it_was_merged_into() {
    let settings = format!(
        "[adapter]\nrank = 4\nstart_on = [{{ path = \"preset.safetensors\", strength = 0.5 }}]\n{RUN}"
    );
    let (project, path) = with_preset(&settings);
    let (_, fused, file) = trained(&project);

    let (model, weights) = planned(&project).unwrap().plan.model.open_dit().unwrap();
    let sources = [adapters::source(&path, 0.5, &ui()).unwrap()];
    let (_, merged) = adapters::put(&sources, &model, weights, ApplyMode::Merged, &ui()).unwrap();
    let other = Project::new(&fixture(""), &CAPTIONS, &format!("[adapter]\nrank = 4\n{RUN}"));
    // The expert is told by its name.
    let folder = other.root().join("low_noise_model");
    std::fs::create_dir(&folder).unwrap();
    let official = fixture("repo_official_a14b").join("low_noise_model");
    std::fs::copy(official.join("config.json"), folder.join("config.json")).unwrap();
    let at = folder.join("model.safetensors");
    let specs = model.tensors();
    let read_tensor = |name: &str| merged.tensor(name, DType::F32, &Device::Cpu).unwrap();
    let tensors: Vec<_> = specs.iter().map(|spec| (spec.name.as_str(), read_tensor(&spec.name))).collect();
    write_safetensors(&at, tensors.iter().map(|(name, tensor)| (*name, tensor)), &BTreeMap::new()).unwrap();
    let recipe = std::fs::read_to_string(other.recipe()).unwrap();
    let recipe =
        recipe.replace(&format!("dit = \"{}\"", official.display()), &format!("dit = \"{}\"", at.display()));
    std::fs::write(other.recipe(), recipe).unwrap();
    let (_, on_merged, _) = trained(&other);
    assert!(!fused.is_empty() && fused.keys().eq(on_merged.keys()));
    fused.iter().for_each(|(name, tensor)| assert_same_bits(name, tensor, &on_merged[name]));

    let written = read(&file).unwrap();
    assert!(written.modules.values().all(|change| change.rank() == Some(4)), "the preset is in the file");
    let below = &written.metadata["tandem.start_on"];
    assert!(below.contains("preset.safetensors at strength 0.5 (SHA-256 "), "{below}");
    assert!(written.notes.iter().any(|note| note.contains("apply them beside it")), "{:?}", written.notes);
}

/// A run goes on with the file that it began on: another place of it is the same file, other numbers are not.
#[test]
fn a_run_does_not_go_on_with_another_file_below_it() {
    let settings = format!("[adapter]\nstart_on = [{{ path = \"preset.safetensors\" }}]\n{RUN}");
    let (project, path) = with_preset(&settings);
    trained(&project);
    let resume = || {
        let mut planned = planned(&project).unwrap();
        RunFolder::resume(&mut planned, None, |_| ()).map(drop).map_err(|error| error.to_string())
    };
    resume().unwrap();
    let moved = project.root().join("moved.safetensors");
    std::fs::copy(&path, &moved).unwrap();
    let recipe = std::fs::read_to_string(project.recipe()).unwrap();
    std::fs::write(project.recipe(), recipe.replace("preset.safetensors", "moved.safetensors")).unwrap();
    resume().unwrap();
    let mut bytes = std::fs::read(&moved).unwrap();
    let last = bytes.len() - 2;
    bytes[last] ^= 1;
    std::fs::write(&moved, bytes).unwrap();
    let told = resume().unwrap_err();
    assert!(
        told.contains("adapter.start_on") && told.contains("another file than the run began on"),
        "{told}"
    );
}

#[test]
fn adapters_below_that_cannot_be_are_refused_by_name() {
    for (settings, words) in [
        ("start_on = [{ path = \"nowhere.safetensors\" }]", "nowhere.safetensors"),
        ("start_on = [{ path = \"preset.safetensors\", strength = 0.0 }]", "other than 0"),
        (
            "start_on = [{ path = \"preset.safetensors\", expert = \"high\" }]",
            "no expert for high noise is trained",
        ),
        ("start_on = [{ path = \"preset.safetensors\", sha256 = \"00\" }]", "and 00 was asked for"),
        ("start_on = [{ path = \"clips/clip00.txt\" }]", "clip00.txt"),
        ("kind = \"dora\"\nstart_on = [{ path = \"preset.safetensors\" }]", "train a LoRA"),
        ("start_on = [{ file = \"preset.safetensors\" }]", "unknown field `file`"),
    ] {
        let (project, _) = with_preset(&format!("[adapter]\n{settings}\n"));
        let error = planned(&project).unwrap_err().to_string();
        assert!(error.contains(words), "{settings}: {error}");
    }
}
