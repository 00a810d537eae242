//! What commands write and where: folders that are tried first, files that are not overwritten, errors for machines.

use std::fs;

use serde_json::Value;

use crate::desk::{Desk, fixtures};

const SAMPLE: [&str; 13] = [
    "sample", "--model", "model", "--width", "16", "--height", "16", "--frames", "1", "--steps", "1",
    "--cache", "cache",
];

fn with<'a>(words: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [words, more].concat()
}

/// The text encoder would fail to load here, so what is refused was refused before anything was loaded.
#[test]
fn sample_tries_its_folder_before_it_loads_anything() {
    let desk = Desk::new();
    desk.write("model/models_t5_umt5-xxl-enc-bf16.pth", b"");
    desk.refuse(&with(&SAMPLE, &["--prompt", "a", "--out", "clips/a.txt/made"]), &["a.txt/made", "cannot"]);
}

#[test]
fn prompts_may_be_given_more_than_once_and_their_files_are_not_overwritten() {
    let desk = Desk::new();
    let sample =
        with(&SAMPLE, &["--prompt", "a cloud", "--prompt", "a hill", "--format", "gif", "--out", "made"]);
    desk.succeed(&sample);
    assert!(desk.path("made/00-a-cloud.gif").is_file() && desk.path("made/01-a-hill.gif").is_file());
    let before = desk.files();
    desk.refuse(&sample, &["--out", "00-a-cloud.gif exists", "--force"]);
    // Another clip would replace the contact sheet of these.
    desk.refuse(&with(&SAMPLE, &["--prompt", "a lake", "--out", "made"]), &["contact-sheet.png exists"]);
    assert_eq!(desk.files(), before);
    desk.succeed(&with(&sample, &["--force"]));
}

#[test]
fn adapter_files_are_not_overwritten_without_being_asked() {
    let desk = Desk::new();
    fs::copy(fixtures().join("lora/t2v/comfy_ab.safetensors"), desk.path("a.safetensors")).unwrap();
    desk.write("b.safetensors", "mine");
    for words in [
        &["export", "a.safetensors", "b.safetensors"][..],
        &["convert", "a.safetensors", "b.safetensors"],
        &["resize", "a.safetensors", "b.safetensors", "--rank", "2"],
        &["extract", "--base", "model", "--tuned", "model", "--output", "b.safetensors"],
        &["merge", "--model", "model", "--lora", "a.safetensors", "--output", "b.safetensors"],
    ] {
        desk.refuse(words, &["b.safetensors exists", "--force"]);
        assert_eq!(fs::read(desk.path("b.safetensors")).unwrap(), b"mine", "{words:?}");
    }
    desk.succeed(&["convert", "a.safetensors", "b.safetensors", "--force"]);
    desk.succeed(&["convert", "a.safetensors", "p", "--format", "peft"]);
    desk.refuse(
        &["convert", "a.safetensors", "p", "--format", "peft"],
        &["p/adapter_model.safetensors exists"],
    );
    let file = ["export", "a.safetensors", "c.safetensors", "--format", "peft"];
    desk.refuse(&file, &["--format peft writes a folder", "name it c"]);
    desk.refuse(&["resize", "a.safetensors", "c.safetensors"], &["--rank", "--energy"]);
}

/// A merge in another number format differs from its base in every tensor, but not in what was trained.
#[test]
fn an_extract_of_a_merge_leaves_out_what_is_rounding() {
    let desk = Desk::new();
    fs::copy(fixtures().join("lora/t2v/comfy_ab.safetensors"), desk.path("a.safetensors")).unwrap();
    fs::create_dir(desk.path("merged")).unwrap();
    fs::copy(desk.path("model/config.json"), desk.path("merged/config.json")).unwrap();
    let merged = "merged/model.safetensors";
    desk.succeed(&["merge", "--model", "model", "--lora", "a.safetensors", "--output", merged]);
    let extract =
        ["extract", "--base", "model", "--tuned", "merged", "--output", "x.safetensors", "--rank", "4"];
    let told = desk.succeed(&extract).stderr;
    assert!(told.contains("rounding to 16 bits") && !told.contains("--everything"), "{told}");
    let zero = ["merge", "--model", "model", "--lora", "a.safetensors:0", "--output", merged, "--force"];
    desk.succeed(&zero);
    desk.refuse(&with(&extract, &["--force"]), &["equal, except for rounding"]);
}

/// Standard output ends with one object with the error, be it in a recipe, a file, or the command line itself.
#[test]
fn errors_are_objects_where_machines_read() {
    let desk = Desk::new();
    for (words, told) in [
        (&["--json", "plan", "other.toml"][..], "cannot read the recipe"),
        (&["export", "--json", "nowhere.safetensors", "b.safetensors"], "nowhere.safetensors"),
        (&["--json", "plan"], "RECIPE"),
        (&["plan", "--json", "recipe.toml", "--wrong"], "--wrong"),
    ] {
        let outcome = desk.run(words);
        let last: Value = serde_json::from_str(outcome.stdout.lines().last().unwrap_or_default()).unwrap();
        assert_eq!((outcome.code, &last["exit_code"]), (Some(2), &2.into()), "{words:?}: {last}");
        assert!(last["error"].as_str().unwrap().contains(told), "{words:?}: {last}");
    }
    assert!(
        desk.run(&["plan", "other.toml"]).stdout.is_empty(),
        "people read errors on standard error alone"
    );
}

#[test]
fn every_shell_gets_completions() {
    let desk = Desk::new();
    for (shell, mark) in [("bash", "complete -F"), ("zsh", "#compdef tandem"), ("fish", "complete -c tandem")]
    {
        let script = desk.succeed(&["completions", shell]).stdout;
        assert!(script.contains(mark) && script.contains("memory-limit"), "{shell}");
    }
}
