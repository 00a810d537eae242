//! Few-step sampling by preset: its adapter is asked for, its clips are labelled, and now and then the real thing is made.

use std::fs;

use crate::desk::Desk;

const LABEL: &[u8] = b"4 steps, distilled: motion is weaker than the model's own";

/// Whether the file `name` has the label in its metadata.
fn is_labelled(desk: &Desk, name: &str) -> bool {
    let bytes = fs::read(desk.path(name)).unwrap();
    bytes.windows(LABEL.len()).any(|window| window == LABEL)
}

/// A recipe `other.toml` with `sample` as its section, for runs in the folder `other`.
fn with_clips(desk: &Desk, sample: &str) {
    let recipe = fs::read_to_string(desk.path("recipe.toml")).unwrap();
    let recipe = recipe.replace("folder = \"run\"", "folder = \"other\"");
    desk.write("other.toml", recipe.replace("[checkpoint]", &format!("[sample]\n{sample}\n\n[checkpoint]")));
}

#[test]
fn clips_of_a_preset_are_labelled_and_full_ones_are_not() {
    let desk = Desk::new();
    // Any adapter will do for a tiny model: one that was trained.
    desk.succeed(&["train", "recipe.toml"]);
    fs::copy(desk.path("run/adapters/recipe.safetensors"), desk.path("distilled.safetensors")).unwrap();
    with_clips(
        &desk,
        "prompts = [\"a cloud\"]\nevery = 1\npreset = \"lightx2v-4\"\nadapter = \"distilled.safetensors\"\nfull_every = 2",
    );
    let plan = desk.succeed(&["plan", "other.toml"]).stdout;
    for line in ["preset = \"lightx2v-4\"", "steps = 4", "guidance = 1.0", "full_every = 2"] {
        assert!(plan.contains(line), "no `{line}` in {plan}");
    }
    desk.succeed(&["train", "other.toml"]);
    let of_step = |step: u64| is_labelled(&desk, &format!("other/samples/step-{step:06}/00-a-cloud.mp4"));
    assert_eq!([of_step(0), of_step(1), of_step(2)], [true, true, false]);

    let words = [
        "sample", "--model", "model", "--prompt", "a cloud", "--width", "16", "--height", "16", "--frames",
        "5",
    ];
    let few =
        [&words[..], &["--preset", "lightx2v-4-lcm", "--lora", "distilled.safetensors", "--out", "few"]]
            .concat();
    let formats = ["mp4", "gif", "webp"];
    desk.succeed(&[&few[..], &formats.map(|format| ["--format", format]).concat()].concat());
    for format in formats {
        assert!(is_labelled(&desk, &format!("few/00-a-cloud.{format}")), "{format}");
    }
    desk.succeed(&[&words[..], &["--steps", "4", "--out", "plain"]].concat());
    assert!(!is_labelled(&desk, "plain/00-a-cloud.mp4"));
    let with = |more: &[&'static str]| [&words[..], &["--out", "refused"], more].concat();
    desk.refuse(&with(&["--preset", "lightx2v-4"]), &["--preset", "distilled adapter", "--lora"]);
    desk.refuse(&with(&["--preset", "lightning-4", "--lora", "distilled.safetensors"]), &["two experts"]);
    desk.refuse(&with(&["--preset", "lightx2v-4", "--steps", "8"]), &["--steps"]);
}

#[test]
fn a_preset_that_cannot_work_is_refused_by_the_plan() {
    let desk = Desk::new();
    let refuse = |sample: &str, words: &[&str]| {
        with_clips(&desk, &format!("prompts = [\"a cloud\"]\n{sample}"));
        desk.refuse(&["plan", "other.toml"], words);
    };
    refuse("preset = \"lightx2v-4\"", &["sample.preset", "sample.adapter", "Wan2.1-Distill-Loras"]);
    refuse("preset = \"lightx2v-4\"\nsteps = 6", &["sample.preset", "leave them out"]);
    refuse("preset = \"lightning-4\"", &["sample.preset", "two experts"]);
    refuse("preset = \"lightning-5\"", &["lightning-4"]);
    refuse("full_every = 4", &["sample.full_every", "sample.preset"]);
    with_clips(&desk, "prompts = [\"a cloud --s 9\"]\npreset = \"lightx2v-4\"\nadapter = \"recipe.toml\"");
    desk.refuse(&["plan", "other.toml"], &["its preset sets steps"]);
}
