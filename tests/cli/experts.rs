//! Two experts in one run, as a user has them: the clips of a run are those that `sample` makes, before training by the model
//! alone and after it with the adapters that the run wrote.

use std::fs;

use crate::desk::{Desk, fixtures};

const TRAIN: [&str; 2] = ["train", "recipe.toml"];

/// A desk whose recipe trains `expert` of the tiny model of two, hard, with a clip before and after.
fn desk(expert: &str) -> Desk {
    let desk = Desk::new();
    let model = fixtures().join("repo_official_a14b");
    desk.change("folder = \"model\"", &format!("folder = {model:?}\nexpert = \"{expert}\""));
    desk.change("[train]\nsteps = 2", "[train]\nsteps = 2\naccumulate = 3");
    let more = "\n[devices]\nstages = [\"cpu\"]\n[optimizer]\nlr = 0.05\nwarmup = 0\n[export]\nprecision = \"float32\"\n\
                [sample]\nprompts = [\"a cloud\"]\nsteps = 8\nshift = 3\nformats = [\"gif\"]\n";
    let recipe = fs::read_to_string(desk.path("recipe.toml")).unwrap();
    desk.write("recipe.toml", recipe + more);
    desk
}

/// The clip that `sample` makes of the same request, with `loras`.
fn sampled(desk: &Desk, loras: &[&str]) -> Vec<u8> {
    let model = fixtures().join("repo_official_a14b");
    let words = ["sample", "--model", model.to_str().unwrap(), "--prompt", "a cloud", "--stages", "cpu"];
    let size = ["--width", "16", "--height", "16", "--frames", "5", "--steps", "8", "--shift", "3"];
    let files = ["--cache", "cache", "--out", "made", "--format", "gif", "--force"];
    desk.succeed(&[&words[..], &size, &files, loras].concat());
    fs::read(desk.path("made/00-a-cloud.gif")).unwrap()
}

#[test]
fn the_clips_of_a_run_go_through_both_experts_whichever_is_trained() {
    let high = ["--lora-high", "run/adapters/recipe_high_noise.safetensors"];
    let low = ["--lora-low", "run/adapters/recipe_low_noise.safetensors"];
    for (expert, loras) in [("high", &high[..]), ("low", &low), ("both", &[high, low].concat())] {
        let desk = desk(expert);
        desk.succeed(&TRAIN);
        let clip =
            |step: u64| fs::read(desk.path(&format!("run/samples/step-{step:06}/00-a-cloud.gif"))).unwrap();
        assert!(clip(0) == sampled(&desk, &[]), "{expert}: before training");
        assert!(clip(2) == sampled(&desk, loras), "{expert}: after training");
        assert!(clip(0) != clip(2), "{expert}: training changes nothing");
        let written = fs::read_dir(desk.path("run/adapters")).unwrap().count();
        assert_eq!(written, loras.len() / 2, "{expert}: an adapter for each that is trained");
    }
}

#[test]
fn a_plan_tells_the_experts_and_an_export_asks_which() {
    let desk = desk("both");
    let plan = desk.succeed(&["plan", "recipe.toml"]).stdout;
    for told in [
        "expert for high noise: sigma 0.875 .. 1.000",
        "expert for low noise: sigma 0.000 .. 0.875",
        "side by side",
    ] {
        assert!(plan.contains(told), "no {told} in {plan}");
    }
    desk.succeed(&TRAIN);
    let checkpoint = "run/checkpoints/step-000002.safetensors";
    desk.refuse(&["export", checkpoint, "out.safetensors"], &["--expert", "both experts", "`high` or `low`"]);
    for (expert, suffix) in [("high", "high_noise"), ("low", "low_noise")] {
        let again = format!("again_{suffix}.safetensors");
        desk.succeed(&["export", checkpoint, &again, "--expert", expert, "--precision", "f32"]);
        let load = |path: &str| kernels::safetensors::load(desk.path(path), &kernels::Device::Cpu).unwrap();
        let (got, expected) = (load(&again), load(&format!("run/adapters/recipe_{suffix}.safetensors")));
        assert!(!expected.is_empty() && got.len() == expected.len(), "{expert}");
        for (name, tensor) in &expected {
            let difference = (tensor - &got[name]).unwrap().abs().unwrap().max_all().unwrap();
            assert_eq!(difference.to_scalar::<f32>().unwrap(), 0.0, "{expert}: {name}");
        }
    }
}

/// A file that is named for one expert changes that one or none.
#[test]
fn an_adapter_of_one_expert_is_not_put_to_the_other() {
    let desk = desk("low");
    let golden = fixtures().join("lora/t2v/comfy_ab.safetensors");
    fs::copy(golden, desk.path("a_high_noise.safetensors")).unwrap();
    let model = fixtures().join("repo_official_a14b");
    let sample =
        ["sample", "--model", model.to_str().unwrap(), "--prompt", "a", "--width", "16", "--height", "16"];
    let sample = [&sample[..], &["--frames", "5", "--steps", "1"]].concat();
    for lora in ["--lora", "--lora-low"] {
        let words = [&sample[..], &[lora, "a_high_noise.safetensors"]].concat();
        desk.refuse(&words, &[lora, "a_high_noise", "for high noise", "use --lora-high"]);
    }
    let merge =
        ["merge", "--model", model.to_str().unwrap(), "--lora", "a_high_noise.safetensors", "--output", "m"];
    desk.refuse(
        &[&merge[..], &["--expert", "low"]].concat(),
        &["a_high_noise", "for low noise", "--expert high"],
    );
    desk.succeed(&[&merge[..], &["--expert", "high"]].concat());
    desk.change("[sample]\n", "[sample]\nadapter = \"a_high_noise.safetensors\"\n");
    desk.refuse(&["plan", "recipe.toml"], &["sample.adapter:", "a_high_noise", "sample.adapter_high"]);
}
