//! Plans for what is not here: models, cards, clips.

use std::path::Path;

use serde_json::Value;

use crate::desk::{Desk, Outcome};

/// Runs `words` with an empty cache of the hub, and expects no request to the hub.
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

/// What a run does besides steps is planned with it: clips that cannot be decoded beside the DiT are decoded while its matrices
/// wait in host memory, which has to have room for them, and what fits nowhere is refused with changes that help.
#[test]
fn a_run_is_planned_with_all_that_it_does() {
    let desk = Desk::new();
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/t2v-14b.toml");
    let recipe = recipe.to_str().unwrap();
    let words = |settings: &[&'static str]| {
        let settings = settings.iter().flat_map(|setting| ["--set", setting]);
        ["--json", "plan", recipe].into_iter().chain(settings).map(str::to_owned).collect::<Vec<_>>()
    };
    let told = |on: &str, settings: &[&'static str]| {
        let mut words = words(settings);
        words.extend(["--on".to_owned(), on.to_owned()]);
        run(&desk, &words.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let small = ["data.frames=[17]", "sample.frames=49", "model.base=fp8", "model.text_base=fp8"];
    let plan = |on: &str| -> Value {
        let told = told(on, &small);
        assert_eq!(told.code, Some(0), "{}", told.stderr);
        serde_json::from_str(&told.stdout).unwrap()
    };
    let (small_card, small_cards, large_cards) = (plan("20GiB"), plan("2x12GiB"), plan("2x80GiB"));
    assert_eq!(small_card["plan"]["memory"]["decoding"], "alone");
    // Half of the rows each fit beside half of the DiT.
    assert_eq!(small_cards["plan"]["memory"].get("decoding"), None, "{small_cards}");
    assert_eq!(large_cards["plan"]["memory"].get("decoding"), None, "{large_cards}");
    for (plan, count) in [(&small_card, 1), (&small_cards, 2), (&large_cards, 2)] {
        let phases = plan["memory"]["phases"].as_array().unwrap();
        let names: Vec<&str> = phases.iter().map(|phase| phase["phase"].as_str().unwrap()).collect();
        assert_eq!(names, ["text-encoder", "encoding-clips", "sampling", "decoding"]);
        // Both cards encode clips, each its own, and decode each clip together.
        for phase in &phases[1..] {
            assert_eq!(phase["devices"].as_array().unwrap().len(), count, "{plan}");
        }
        for device in phases.iter().flat_map(|phase| phase["devices"].as_array().unwrap()) {
            assert!(device["needed"].as_u64() <= device["room"].as_u64(), "{device}");
        }
    }
    assert_eq!(large_cards["plan"]["memory"]["bands"], 2);
    // The matrices of the blocks in fp8: 14.1 billion numbers.
    let host: u64 =
        small_card["memory"]["stages"].as_array().unwrap().iter().map(|s| s["host"].as_u64().unwrap()).sum();
    let pinned = small_card["plan"]["memory"]["pinned"].as_str().unwrap();
    assert!(host > 13 << 30 && pinned == format!("{}GiB", host.div_ceil(1 << 30)), "{host}, {pinned}");

    let large = ["sample.frames=81", "sample.size=[1280,720]"];
    let refused = told("2x4090", &large);
    refused.assert_refused(&["sampling does not fit", "cuda:0 has room for 23.41 GiB", "no sample.prompts"]);
    for way in ["sample.size=[960,528]", "model.base=fp8", "sample.prompts=[]"] {
        let named = way.replace('=', " = ").replace(',', ", ").replace("fp8", "\"fp8\"");
        let is_named = refused.stderr.contains(&named) || way.contains("prompts");
        assert!(is_named, "no {named} in {}", refused.stderr);
        let mended = told("2x4090", &[large[0], large[1], way]);
        assert_eq!(mended.code, Some(0), "{way}: {}", mended.stderr);
    }
    let text = ["data.frames=[17]", "model.base=fp8"];
    told("4x8GiB", &text).assert_refused(&["text encoder does not fit", "model.text_base = \"fp8\""]);
}

/// The plan of the shipped 14B recipe with `settings`, on cards that are not here.
fn plan_14b(desk: &Desk, on: &str, settings: &[&str]) -> Outcome {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/t2v-14b.toml");
    let mut words = vec!["--json", "plan", recipe.to_str().unwrap(), "--on", on];
    settings.iter().for_each(|setting| words.extend(["--set", setting]));
    run(desk, &words)
}

/// Clips use two cards in the layout that is fastest and fits, and the plan says why; one that cannot be is refused.
#[test]
fn a_plan_chooses_how_clips_use_two_cards() {
    let desk = Desk::new();
    let plan = |on: &str, settings: &[&'static str]| plan_14b(&desk, on, settings);
    let clips = |on: &str, settings: &[&'static str]| {
        let told = plan(on, settings);
        assert_eq!(told.code, Some(0), "{}", told.stderr);
        let plan: Value = serde_json::from_str(&told.stdout).unwrap();
        let layout = plan["memory"]["clips"].as_str().unwrap().to_owned();
        (plan["plan"]["memory"].get("clip_groups").and_then(Value::as_u64), layout)
    };
    let (groups, layout) = clips("2x4090", &["model.base=fp8"]);
    assert!(groups == Some(2) && layout.contains("cfg") && layout.contains("1.50 times as fast"), "{layout}");
    let (groups, layout) = clips("2x4090", &[]);
    assert!(groups.is_none() && layout.contains("pipeline") && layout.contains("has 23.41 GiB"), "{layout}");
    let four = "sample.prompts=[\"a\",\"b\",\"c\",\"d\"]";
    let (groups, layout) = clips("2x4090", &["model.base=fp8", four]);
    assert!(
        groups == Some(2) && layout.contains("for 4 clips the split would keep them as busy"),
        "{layout}"
    );
    let (groups, layout) = clips("2x4090", &["model.base=fp8", "sample.guidance=1.0"]);
    assert!(groups.is_none() && layout.contains("as fast as any other layout for one clip"), "{layout}");
    let (groups, layout) = clips("4x4090", &["model.base=fp8"]);
    assert!(groups == Some(2) && layout.contains("2 groups of 2 devices"), "{layout}");
    plan("2x4090", &["sample.layout=cfg"]).assert_refused(&[
        "sample.layout",
        "needs",
        "23.41 GiB",
        "pipeline",
    ]);
    plan("4090", &["model.base=fp8", "sample.layout=cfg"]).assert_refused(&["sample.layout", "there is one"]);

    // Tokens are shared where it is asked for; by itself only over direct links, which these cards have not.
    let shared = ["model.base=fp8", "sample.layout=ulysses"];
    let (groups, layout) = clips("2x4090", &shared);
    assert!(
        groups.is_none() && layout.starts_with("ulysses, the tokens of a call over 2 devices"),
        "{layout}"
    );
    let (groups, layout) = clips("4x4090", &shared);
    assert!(groups == Some(2) && layout.contains("2 groups of 2 devices that share tokens"), "{layout}");
    plan("4090", &shared).assert_refused(&["sample.layout", "there is one"]);
    plan("2x4090", &["sample.layout=ulysses"]).assert_refused(&[
        "sample.layout",
        "ulysses needs",
        "pipeline",
    ]);
    let measured = [shared[0], shared[1], "sample.cache=E012K2R20"];
    plan("2x4090", &measured).assert_refused(&["does not measure residuals", "table"]);
}

/// Weights that do not fit are streamed from host memory, as few as will do, unless the recipe says where they are.
#[test]
fn a_plan_streams_weights_that_do_not_fit() {
    let desk = Desk::new();
    let plan = |on: &str, settings: &[&'static str]| plan_14b(&desk, on, settings);
    let streamed = |on: &str, settings: &[&'static str]| {
        let told = plan(on, settings);
        assert_eq!(told.code, Some(0), "{}", told.stderr);
        let plan: Value = serde_json::from_str(&told.stdout).unwrap();
        let [memory, precision] = [&plan["memory"], &plan["plan"]["model"]["precision"]];
        assert_eq!(memory.get("streamed"), precision.get("streamed"));
        memory.get("streamed").and_then(Value::as_u64)
    };
    assert_eq!(streamed("16GiB", &["model.base=fp8"]), Some(4));
    assert_eq!(streamed("24GiB", &[]), Some(4));
    assert_eq!(streamed("24GiB", &["model.base=fp8"]), None);
    assert_eq!(streamed("24GiB", &["model.base=fp8", "memory.weights=host"]), Some(8));
    plan("24GiB", &["memory.host_memory=16GiB"]).assert_refused(&["memory.host_memory = \"2"]);
    plan("24GiB", &["memory.weights=device"]).assert_refused(&["does not fit", "memory.weights = \"auto\""]);
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
