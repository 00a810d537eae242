//! A run that is killed and resumed equals the run that was never killed: proven on the program itself, with real kills.

// This package denies unwrap, and clippy takes helpers of tests for shipped code.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kernels::Device;
use proofs::project::Project;
use proofs::{assert_same_bits, events};

mod replicas;
mod told;

const CAPTIONS: [&str; 5] =
    ["a red ball", "two birds fly over the sea", "a fox", "a drifting wave of light", "rain on a window"];
const STEPS: u64 = 20;
/// Everything that could tell two runs apart takes part: both dropouts, texts that are drawn, priors, accumulation over the ends of epochs, a
/// learning rate that depends on the run's length, the held-out loss, clips, all three formats.
const SETTINGS: &str = r#"
held_out = ["clip03*"]
trigger = "sks"
captions = { templates = ["{caption}", "a film of {caption}", "{caption}, again"] }

[devices]
stages = ["cpu", "cpu"]

[adapter]
rank = 4
dropout = 0.1

[train]
steps = 20
batch = 2
accumulate = 5
caption_dropout = 0.3
eval_every = 7
prior = { weight = 0.5, share = 0.5, class = "a thing" }

[optimizer]
lr = 1e-2
warmup = 3
schedule = "cosine"

[checkpoint]
every_steps = 10
keep_last = 1

[sample]
prompts = ["a red ball", "a fox --l 1 --d 3"]
every = 5
steps = 3
formats = ["mp4", "gif"]

[export]
formats = ["comfy", "diffusers", "kohya"]
"#;

fn project() -> Project {
    Project::new(&proofs::fixture(""), &CAPTIONS, SETTINGS)
}

fn start(project: &Project, arguments: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    command.args(arguments).arg(project.recipe()).current_dir(project.root());
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn finish(child: Child) -> ExitStatus {
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(matches!(output.status.code(), Some(0 | 130)), "{}: {errors}", output.status);
    output.status
}

/// The uninterrupted run.
static STRAIGHT: LazyLock<Project> = LazyLock::new(|| {
    let project = project();
    assert!(finish(start(&project, &["train"])).success());
    project
});

/// Waits until `is_reached`; panics when the process ends before, or never gets there.
fn wait_until(child: &mut Child, what: &str, is_reached: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_reached() {
        if child.try_wait().unwrap().is_some() {
            let errors = child.stderr.take().map(std::io::read_to_string);
            panic!("the process ended before {what}: {errors:?}");
        }
        assert!(begun.elapsed() < Duration::from_secs(300), "{what} never came");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Steps in the log, as a reader sees them while they are written.
fn logged_steps(project: &Project) -> u64 {
    let text = std::fs::read_to_string(project.run().join("metrics.jsonl")).unwrap_or_default();
    text.lines().filter(|line| line.contains("\"grad_norm\"")).count() as u64
}

/// Lets the run come to `step` and a little further, to a moment that no one chose.
fn run_into(project: &Project, child: &mut Child, step: u64) {
    wait_until(child, &format!("step {step}"), || logged_steps(project) >= step);
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos();
    std::thread::sleep(Duration::from_micros(u64::from(nanos / 1000 % 10_000)));
}

/// The rows of the log without the one field that is a time.
fn rows(project: &Project) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(project.run().join("metrics.jsonl")).unwrap();
    let row = |line: &str| {
        let mut row: serde_json::Value = serde_json::from_str(line).unwrap();
        let fields = row.as_object_mut().unwrap();
        fields.remove("seconds");
        row
    };
    text.lines().map(row).collect()
}

/// Every file below `folder` by its path there, with a look at it by `read`.
fn contents<T>(folder: &Path, read: impl Fn(&Path) -> T) -> BTreeMap<PathBuf, T> {
    let (mut found, mut folders) = (BTreeMap::new(), vec![folder.to_owned()]);
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => drop(found.insert(path.strip_prefix(folder).unwrap().to_owned(), read(&path))),
            }
        }
    }
    found
}

/// Two folders of safetensors hold the same files with the same tensors; the headers differ by date and folder.
fn assert_same_tensors(what: &str, got: &Path, expected: &Path) {
    let load = |path: &Path| kernels::safetensors::load(path, &Device::Cpu).unwrap();
    let (got, expected) = (contents(got, load), contents(expected, load));
    assert!(!expected.is_empty() && got.keys().eq(expected.keys()), "{what}: {:?}", got.keys());
    for (path, tensors) in &expected {
        assert_eq!(got[path].len(), tensors.len(), "{}", path.display());
        for (name, tensor) in tensors {
            let got = got[path][name].to_dtype(kernels::DType::F32).unwrap();
            let expected = tensor.to_dtype(kernels::DType::F32).unwrap();
            assert_same_bits(&format!("{what}, {}: {name}", path.display()), &got, &expected);
        }
    }
}

fn assert_same_run(got: &Project, expected: &Project) {
    let (rows_got, rows_expected) = (rows(got), rows(expected));
    assert_eq!(rows_expected.iter().filter(|row| row["loss"].is_f64()).count() as u64, STEPS);
    assert_eq!(rows_got, rows_expected, "metrics.jsonl");

    let scalars = |project: &Project| {
        let all = events::scalars(&project.run().join("events.out.tfevents.tandem"));
        all.into_iter().filter(|(_, tag, _)| tag != "seconds/step").collect::<Vec<_>>()
    };
    assert!(scalars(expected).len() as u64 > 3 * STEPS);
    assert_eq!(scalars(got), scalars(expected), "TensorBoard");
    let pictures = |project: &Project| events::pictures(&project.run().join("events.out.tfevents.tandem"));
    let steps: Vec<u64> = pictures(expected).iter().map(|(step, _)| *step).collect();
    assert_eq!(steps, [0, 5, 10, 15, 20]);
    assert!(pictures(got) == pictures(expected), "the pictures in TensorBoard differ");

    let folder = |project: &Project, name: &str| project.run().join(name);
    for name in ["checkpoints", "adapters"] {
        assert_same_tensors(name, &folder(got, name), &folder(expected, name));
    }
    let progress = |project: &Project| {
        let newest = trainer::train::checkpoint::newest(&folder(project, "checkpoints")).unwrap().unwrap();
        let (progress, _) = trainer::train::checkpoint::load(&newest).unwrap();
        (progress.step, progress.cursor)
    };
    assert_eq!(progress(got), progress(expected), "where the checkpoint stands");

    let bytes =
        |project: &Project| contents(&folder(project, "samples"), |path| std::fs::read(path).unwrap());
    let (clips, clips_expected) = (bytes(got), bytes(expected));
    // Five sets (steps 0, 5, 10, 15, 20) of two clips in two formats and a contact sheet.
    assert_eq!((clips_expected.len(), clips.len()), (25, 25));
    for (path, bytes) in &clips_expected {
        assert!(clips[path] == *bytes, "{} differs", path.display());
    }
}

/// Killed before the first checkpoint, so that it starts over; killed again after the one of step 10.
#[test]
fn a_run_that_is_killed_twice_ends_as_if_it_never_was() {
    let project = project();
    for (arguments, step, after) in [(&["train"][..], 3, 0), (&["train", "--resume"], 11, 10)] {
        let mut child = start(&project, arguments);
        // The checkpoint of step 10 is written while the next steps run.
        let is_there = || project.run().join(format!("checkpoints/step-{after:06}.safetensors")).is_file();
        wait_until(&mut child, "the checkpoint", || after == 0 || is_there());
        run_into(&project, &mut child, step);
        child.kill().unwrap(); // SIGKILL: no handler runs
        assert!(child.wait().unwrap().code().is_none(), "the process ended by itself");
        assert!(logged_steps(&project) < STEPS, "the kill came too late to prove anything");
        let newest = trainer::train::checkpoint::newest(&project.run().join("checkpoints")).unwrap();
        let saved = newest.map_or(0, |path| trainer::train::checkpoint::load(&path).unwrap().0.step);
        assert_eq!(saved, after, "the checkpoint that the run goes on from");
    }
    assert!(finish(start(&project, &["train", "--resume"])).success());
    assert_same_run(&project, &STRAIGHT);
}

/// Both experts in one run, which rarely have the same number of updates: each goes on with its own. Steps end by their tokens.
#[test]
fn a_run_of_two_experts_that_is_killed_goes_on_as_if_it_never_was() {
    let project = || {
        let folder = proofs::fixture("repo_official_a14b");
        let settings = SETTINGS.replace("accumulate = 5", "tokens_per_step = 40\nhigh_share = 0.4");
        let project = Project::of_folder(&folder, proofs::project::SIZE, &CAPTIONS, &settings);
        let recipe = std::fs::read_to_string(project.recipe()).unwrap();
        let both = recipe.replacen("[model]", "[model]\nexpert = \"both\"", 1);
        std::fs::write(project.recipe(), both).unwrap();
        project
    };
    let (straight, killed) = (project(), project());
    assert!(finish(start(&straight, &["train"])).success());
    let mut child = start(&killed, &["train"]);
    run_into(&killed, &mut child, 12);
    child.kill().unwrap();
    assert!(child.wait().unwrap().code().is_none(), "the process ended by itself");
    assert!(logged_steps(&killed) < STEPS, "the kill came too late to prove anything");
    assert!(finish(start(&killed, &["train", "--resume"])).success());
    assert_same_run(&killed, &straight);
    let newest = trainer::train::checkpoint::newest(&straight.run().join("checkpoints")).unwrap().unwrap();
    let updates = trainer::train::checkpoint::load(&newest).unwrap().0.updates;
    assert!(updates.high < STEPS || updates.low < STEPS, "no step left an expert out: {updates:?}");
}

/// Ctrl-C finishes the step and saves, so not even a step is made twice: when the first clips are made, and later on.
#[cfg(unix)]
#[test]
fn a_run_that_is_interrupted_goes_on_as_if_it_never_was() {
    let project = project();
    let first_clips = project.run().join("samples/step-000000/contact-sheet.png");
    for (arguments, step) in [(&["train"][..], 0), (&["train", "--resume"], 6)] {
        let mut child = start(&project, arguments);
        match step {
            // A run that is stopped earlier leaves no files.
            0 => wait_until(&mut child, "the first clips", || first_clips.is_file()),
            _ => run_into(&project, &mut child, step),
        }
        let signal = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        assert!(signal.success());
        assert_eq!(finish(child).code(), Some(130));
        let steps = logged_steps(&project);
        assert!((step..STEPS).contains(&steps), "stopped after step {steps}");
        assert!(project.run().join(format!("checkpoints/step-{steps:06}.safetensors")).is_file());
    }
    assert!(finish(start(&project, &["train", "--resume"])).success());
    assert_same_run(&project, &STRAIGHT);
}

/// The finished entries of the cache with the time that each was written.
fn entries(project: &Project) -> BTreeMap<PathBuf, SystemTime> {
    let is_entry = |path: &Path| path.extension().is_some_and(|end| end == "safetensors");
    if !project.cache().is_dir() {
        return BTreeMap::new();
    }
    let all = contents(&project.cache(), |path| path.metadata().and_then(|meta| meta.modified()).ok());
    all.into_iter().filter_map(|(path, time)| is_entry(&path).then_some((path, time?))).collect()
}

#[test]
fn caching_that_is_killed_goes_on_where_it_was() {
    let captions: Vec<String> = (0..24).map(|i| format!("clip number {i}")).collect();
    let captions: Vec<&str> = captions.iter().map(String::as_str).collect();
    let project = Project::new(&proofs::fixture(""), &captions, "");
    // Every clip, every caption, and the empty prompt of caption dropout.
    let total = 2 * captions.len() + 1;

    let mut child = start(&project, &["cache"]);
    wait_until(&mut child, "some clips", || entries(&project).len() >= captions.len() + 4);
    child.kill().unwrap();
    child.wait().unwrap();
    let finished = entries(&project);
    assert!(finished.len() < total, "the kill came too late to prove anything");

    assert!(finish(start(&project, &["cache"])).success());
    let complete = entries(&project);
    assert_eq!(complete.len(), total);
    for (path, time) in &finished {
        assert_eq!(complete[path], *time, "{} was finished and was encoded again", path.display());
    }
    assert!(finish(start(&project, &["cache"])).success());
    assert_eq!(entries(&project), complete, "a complete cache is left alone");

    let damaged = complete.keys().next().unwrap();
    let path = project.cache().join(damaged);
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let before = entries(&project);
    assert!(finish(start(&project, &["cache"])).success());
    let after = entries(&project);
    let changed: Vec<&PathBuf> = after.keys().filter(|path| after[*path] != before[*path]).collect();
    assert_eq!(changed, [damaged], "only the damaged entry is encoded again");
}
