//! What a run reports while it works and when it is done.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use kernels::{Device, Tensor};
use proofs::events;
use serde_json::Value;

use crate::desk::{Desk, fixtures};

/// The phases that `words` report, in order.
fn phases(desk: &Desk, words: &[&str]) -> Vec<String> {
    let told = desk.succeed(&[&["--json"], words].concat()).stdout;
    let rows = told.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let phase = |row: Value| {
        let label = row["phase"].as_str()?.to_owned();
        assert!(row["seconds"].as_f64().is_some_and(|seconds| seconds >= 0.0), "{row}");
        Some(label)
    };
    rows.filter_map(phase).collect()
}

fn assert_has(phases: &[String], wanted: &[&str]) {
    for label in wanted {
        assert!(phases.iter().any(|phase| phase == label), "no {label} in {phases:?}");
    }
}

#[test]
fn every_phase_of_a_run_is_told() {
    let desk = Desk::new();
    let sampled = "[sample]\nprompts = [\"a cloud\"]\nsteps = 2\nformats = [\"gif\"]\n";
    desk.change("[checkpoint]", &format!("{sampled}\n[checkpoint]"));
    desk.change("frames = [5]", "frames = [5]\nheld_out = [\"b*\"]");
    let told = phases(&desk, &["train", "recipe.toml"]);
    let wanted = [
        "loading the text encoder",
        "encoding prompts",
        "checking the cache",
        "loading the VAE",
        "encoding clips",
        "loading the DiT",
        "held-out loss",
        "sampling",
        "decoding clips",
        "writing clips",
        "training",
        "saving",
        "overview",
    ];
    assert_has(&told, &wanted);
    let adapter = "run/adapters/recipe.safetensors";
    let sample = ["sample", "--model", "model", "--lora", adapter, "--prompt", "a cloud", "--steps", "2"];
    let size = ["--width", "16", "--height", "16", "--frames", "5", "--cache", "cache"];
    let told = phases(&desk, &[&sample[..], &size].concat());
    assert_has(&told, &["loading the DiT", "sampling", "loading the VAE", "writing clips"]);
}

/// A clip of an image-to-video model of Wan 2.1 goes through two encoders and is decoded once; what is there is not made
/// again, nor is an encoder loaded for it. One by one gives the same entries.
#[test]
fn clips_are_decoded_once_for_both_encoders_which_are_loaded_when_they_are_needed() {
    let desk = Desk::new();
    let model = fixtures().join("repo_diffusers_i2v21");
    desk.change("folder = \"model\"", &format!("folder = \"{}\"", model.display()));
    desk.change("sizes = [[16, 16]]", "sizes = [[64, 48]]");
    let cache = ["cache", "recipe.toml"];
    let first = phases(&desk, &cache);
    assert_has(&first, &["loading the VAE", "loading CLIP", "encoding clips"]);
    assert!(!first.contains(&"looking at clips".to_owned()), "decoded a second time: {first:?}");

    // By tensors: the strings of a header have no order.
    let entries = |desk: &Desk| -> BTreeMap<PathBuf, BTreeMap<String, Vec<f32>>> {
        let is_entry = |path: &PathBuf| path.extension().is_some_and(|end| end == "safetensors");
        let files = desk.files().into_keys().filter(|path| path.starts_with(desk.path("cache")));
        let tensors = |path: &PathBuf| {
            let all = kernels::safetensors::load(path, &Device::Cpu).unwrap();
            let numbers = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            all.into_iter().map(|(name, tensor)| (name, numbers(tensor))).collect()
        };
        files.filter(is_entry).map(|path| (path.clone(), tensors(&path))).collect()
    };
    let complete = entries(&desk);
    let second = phases(&desk, &cache);
    assert!(!second.iter().any(|phase| phase.starts_with("loading")), "loaded for nothing: {second:?}");

    let states = complete.iter().filter(|(_, tensors)| tensors.contains_key("states"));
    let removed = states.map(|(path, _)| fs::remove_file(path).unwrap()).count();
    assert_eq!(removed, 2);
    let third = phases(&desk, &cache);
    assert_has(&third, &["loading CLIP", "looking at clips"]);
    assert!(!third.contains(&"loading the VAE".to_owned()), "{third:?}");
    assert!(entries(&desk) == complete, "one by one, the entries differ");
}

/// The command that a finished run prints makes a clip; its pictures exist; TensorBoard has the loss of each noise level.
#[test]
fn a_finished_run_tells_what_to_look_at_and_how_to_make_another_clip() {
    let desk = Desk::new();
    let sampled =
        "[sample]\nprompts = [\"a cloud's \\\"shadow\\\"\"]\nsteps = 2\nformats = [\"gif\"]\nevery = 1\n";
    desk.change("[checkpoint]", &format!("{sampled}\n[checkpoint]"));
    let told = desk.succeed(&["train", "recipe.toml"]).stdout;
    for file in ["run/overview.png", "run/samples/step-000002/contact-sheet.png"] {
        assert!(told.contains(file) && desk.path(file).is_file(), "{file} in {told}");
    }
    let overview = image::open(desk.path("run/overview.png")).unwrap();
    // Three steps of one prompt: 16 pixels each with gaps of 4.
    assert_eq!(overview.width(), 3 * (16 + 4) + 4);
    let line = told.lines().find_map(|line| line.trim().strip_prefix("tandem sample "));
    let words = shlex::split(line.unwrap_or_else(|| panic!("no command in {told}"))).unwrap();
    let words: Vec<&str> = ["sample"].into_iter().chain(words.iter().map(String::as_str)).collect();
    assert!(words.contains(&"a cloud's \"shadow\""), "{words:?}");
    desk.succeed(&words);
    assert!(desk.path("run/clips/contact-sheet.png").is_file());

    let scalars = events::scalars(&desk.path("run/events.out.tfevents.tandem"));
    let of = |tag: &str| -> Vec<(u64, u32)> {
        let own = scalars.iter().filter(|(_, own, _)| own.starts_with(tag));
        own.map(|(step, _, bits)| (*step, *bits)).collect()
    };
    assert_eq!(of("loss/train").len(), 2);
    assert_eq!(of("loss/sigma_"), of("loss/train"), "one sample a step, with a weight of 1");
}

#[test]
fn a_run_past_the_end_of_its_recipe_says_so() {
    let desk = Desk::new();
    desk.succeed(&["train", "recipe.toml"]);
    let same = desk.succeed(&["train", "recipe.toml", "--resume"]);
    assert!(same.stderr.contains("all 2 steps are made"), "{}", same.stderr);
    desk.change("[train]\nsteps = 2", "[train]\nsteps = 1");
    let past = desk.succeed(&["train", "recipe.toml", "--resume"]);
    assert!(past.stderr.contains("past the end of its recipe: 2 steps are made"), "{}", past.stderr);
    assert!(past.stdout.contains("done: 2 steps"), "{}", past.stdout);
}

/// An adapter that makes everything overflow gives an error, not black clips.
#[test]
fn a_clip_that_is_no_number_is_refused_with_its_step() {
    let desk = Desk::new();
    desk.succeed(&["train", "recipe.toml"]);
    let size = ["--width", "16", "--height", "16", "--frames", "5", "--steps", "2", "--cache", "cache"];
    let strong = "run/adapters/recipe.safetensors:1e38";
    let sample = ["sample", "--model", "model", "--lora", strong, "--prompt", "a cloud", "--out", "black"];
    desk.refuse(
        &[&sample[..], &size].concat(),
        &["clip 1 (`a cloud`)", "not finite", "solver step 1 of 2", "sigma"],
    );
    assert!(!desk.path("black/contact-sheet.png").exists());
}

/// A whole run of random weights: every phase is timed, the steps are counted, and no temporary file is left.
#[test]
fn the_bench_of_a_run_times_every_phase() {
    let desk = Desk::new();
    fs::create_dir(desk.path("scratch")).unwrap();
    let size = ["--width", "32", "--height", "32", "--frames", "5", "--rank", "2", "--stages", "cpu,cpu"];
    let short =
        ["bench", "run", "--scratch", "scratch", "--steps", "4", "--accumulate", "2", "--solver-steps", "2"];
    let told = desk.succeed(&[&short[..], &size].concat()).stdout;
    let rows: Vec<Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let whole = rows.last().unwrap();
    let name = |row: &Value| {
        assert!(row["s"].is_f64(), "{row}");
        row["phase"].as_str().unwrap().to_owned()
    };
    let phases: Vec<String> = whole["phases"].as_array().unwrap().iter().map(name).collect();
    let wanted = [
        "writing random weights",
        "planning",
        "loading the text encoder",
        "loading the VAE",
        "encoding clips",
        "loading the DiT",
        "sampling",
        "writing clips",
        "training",
        "copying the state",
        "writing the state",
        "saving",
    ];
    assert_has(&phases, &wanted);
    assert_eq!(rows.iter().filter(|row| row["grad_norm"].is_f64()).count(), 4);
    assert!(whole["first_step_s"].is_f64() && whole["s_per_step"].is_f64(), "{whole}");
    assert_eq!(fs::read_dir(desk.path("scratch")).unwrap().count(), 0, "files stay behind");
}
