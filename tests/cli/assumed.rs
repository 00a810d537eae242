//! Plans for what is not here: models, cards, clips.

use std::path::Path;

use serde_json::Value;

use crate::desk::{Desk, Outcome};

/// Runs `words` with an empty cache of the hub, which nothing is asked of.
fn run(desk: &Desk, words: &[&str]) -> Outcome {
    let mut command = desk.command(words);
    command.env("HF_HOME", desk.path("hugging")).env_remove("HF_HUB_CACHE").env("HF_HUB_OFFLINE", "1");
    command.output().unwrap().into()
}

fn succeed(desk: &Desk, words: &[&str]) -> Outcome {
    let outcome = run(desk, words);
    assert_eq!(outcome.code, Some(0), "{words:?}: {}", outcome.stderr);
    outcome
}

/// A shipped recipe answers whether its model fits two cards before anything of it, or a clip, is here.
#[test]
fn a_published_model_is_planned_before_it_is_here() {
    let desk = Desk::new();
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/t2v-14b.toml");
    let recipe = recipe.to_str().unwrap();
    let told = succeed(&desk, &["--json", "plan", recipe, "--on", "2x3090"]);
    let plan: Value = serde_json::from_str(&told.stdout).unwrap();
    let stages = plan["memory"]["stages"].as_array().unwrap();
    assert_eq!((stages.len(), &stages[1]["device"]), (2, &"cuda:1".into()));
    for stage in stages {
        let peak = stage["peak"].as_f64().unwrap() / f64::from(1 << 30);
        assert!((20.0..24.0).contains(&peak), "{peak} GiB on a card of 24 GiB");
    }
    // 14.3 billion numbers in f32, the text encoder and the VAE.
    let words =
        ["Wan-AI/Wan2.1-T2V-14B is assumed", "takes about 64 GiB", "`tandem fetch Wan-AI/Wan2.1-T2V-14B`"];
    for words in words.into_iter().chain(["no folder clips yet", "32.00 GiB of host memory"]) {
        assert!(told.stderr.contains(words), "no {words} in {}", told.stderr);
    }
    run(&desk, &["plan", recipe, "--on", "8GiB"]).assert_refused(&[
        "does not fit",
        "cuda:0 has room for 7.41 GiB",
        "model.base",
    ]);
}

/// With clips the buckets are theirs; a model on disk by a wrong name, or none at all, is assumed where that is said.
#[test]
fn a_model_is_assumed_in_place_of_files() {
    let desk = Desk::new();
    desk.change("folder = \"model\"", "folder = \"Wan-AI/Wan2.1-T2V-1.3B\"");
    let told = succeed(&desk, &["plan", "recipe.toml"]);
    assert!(told.stdout.contains("16     16       5       2"), "{}", told.stdout);
    assert!(told.stderr.contains("Wan2.1-T2V-1.3B is assumed"), "{}", told.stderr);
    // What cannot be planned for cannot be trained either.
    run(&desk, &["train", "recipe.toml"]).assert_refused(&["HF_HUB_OFFLINE"]);
    desk.change("Wan-AI/Wan2.1-T2V-1.3B", "nowhere");
    run(&desk, &["plan", "recipe.toml"]).assert_refused(&["no model at nowhere"]);
    desk.change("[[16, 16]]", "[[32, 32]]");
    let plan = |model| succeed(&desk, &["plan", "recipe.toml", "--assume", model, "--on", "2x80GiB"]).stdout;
    assert!(plan("ti2v-5b").contains("Wan2.2_VAE.pth") && plan("i2v-14b").contains("models_clip"));
    run(&desk, &["plan", "recipe.toml", "--assume", "t2v-a14b"]).assert_refused(&["model.expert"]);
    run(&desk, &["plan", "recipe.toml", "--on", "2xvoodoo"]).assert_refused(&["2xvoodoo", "4090", "24GiB"]);
}

/// A build without CUDA refuses GPUs before it downloads, reads clips or makes a folder.
#[cfg(not(feature = "cuda"))]
#[test]
fn a_build_without_cuda_refuses_gpus_at_once() {
    let desk = Desk::new();
    desk.change("[train]", "[devices]\nstages = [\"cuda:0\"]\n\n[train]");
    desk.change("folder = \"clips\"", "folder = \"nowhere\"");
    for command in ["plan", "cache", "train"] {
        desk.refuse(&[command, "recipe.toml"], &["cuda:0", "without CUDA", "--on 24GiB"]);
    }
    assert!(!desk.path("run").exists() && !desk.path("cache").exists());
    let told = succeed(&desk, &["plan", "recipe.toml", "--on", "4090"]).stdout;
    assert!(told.contains("cuda:0") && told.contains("of 23.4"), "{told}");
}
