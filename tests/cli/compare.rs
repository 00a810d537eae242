//! `tandem compare`: every clip is the one that `sample` makes with that adapter at that strength, and all are shown side by side.

use std::fs;

use crate::desk::Desk;

const CLIP: &[&str] = &[
    "--prompt",
    "a cloud",
    "--width",
    "16",
    "--height",
    "16",
    "--frames",
    "5",
    "--steps",
    "2",
    "--guidance",
    "1",
];
const NAME: &str = "00-a-cloud.mp4";

/// A project with two adapters, `a.safetensors` and `b.safetensors`, large enough to be seen.
fn desk() -> Desk {
    let desk = Desk::new();
    for (name, seed) in [("a", "1"), ("b", "2")] {
        let [seed, folder] = [format!("run.seed={seed}"), format!("run.folder=\"{name}\"")];
        let words = ["train", "recipe.toml", "--set", &seed, "--set", &folder, "--set", "optimizer.lr=0.3"];
        desk.succeed(&words);
        let file = desk.path(name).join("adapters/recipe.safetensors");
        fs::copy(file, desk.path(&format!("{name}.safetensors"))).unwrap();
    }
    desk
}

#[test]
fn compared_clips_are_those_that_sample_makes() {
    let desk = desk();
    let words = [
        "compare",
        "--model",
        "model",
        "a.safetensors",
        "b.safetensors",
        "--strengths",
        "0.5,1",
        "--out",
        "side",
    ];
    let told = desk.succeed(&[&words[..], CLIP].concat()).stdout;
    let clip = |folder: &str| fs::read(desk.path(&format!("side/{folder}")).join(NAME)).unwrap();
    let mut all = Vec::new();
    for (folder, adapter) in [
        ("base", None),
        ("1-a-at-0.5", Some("a.safetensors:0.5")),
        ("1-a-at-1", Some("a.safetensors")),
        ("2-b-at-0.5", Some("b.safetensors:0.5")),
        ("2-b-at-1", Some("b.safetensors")),
    ] {
        let out = format!("alone/{folder}");
        let lora = adapter.map_or_else(Vec::new, |adapter| vec!["--lora", adapter]);
        desk.succeed(&[&["sample", "--model", "model", "--out", &out][..], &lora, CLIP].concat());
        assert_eq!(clip(folder), fs::read(desk.path(&out).join(NAME)).unwrap(), "{folder}");
        all.push(clip(folder));
    }
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 5, "clips that should differ are equal");

    for file in ["grid.png", "grid.mp4", "index.html"] {
        assert!(told.contains(file) && desk.path("side").join(file).is_file(), "{file}: {told}");
    }
    let film = data::middle_frame(&desk.path("side/grid.mp4")).unwrap();
    assert_eq!((film.width(), film.height()), (5 * 16, 16), "five columns, one prompt");
    let page = fs::read_to_string(desk.path("side/index.html")).unwrap();
    let sources: Vec<&str> =
        page.split("src=\"").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
    assert_eq!(sources.len(), 5);
    assert!(sources.iter().all(|source| desk.path("side").join(source).is_file()), "{sources:?}");
    assert!(!page.contains("http"), "the page asks another host");
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let desk = desk();
    let words = |more: &[&'static str]| [&["compare", "--model", "model"][..], more, CLIP].concat();
    desk.refuse(&words(&[]), &["ADAPTER"]);
    desk.refuse(&words(&["a.safetensors", "--strengths", "0"]), &["--strengths"]);
    desk.refuse(&words(&["a.safetensors", "--lora", "b.safetensors"]), &["--lora", "compare"]);
    desk.refuse(&words(&["a.safetensors,b.safetensors"]), &["ADAPTER", "one network"]);
    desk.refuse(&words(&["clips/a.txt"]), &["a.txt"]);
    fs::create_dir(desk.path("side")).unwrap();
    desk.write("side/grid.png", "mine");
    desk.refuse(&words(&["a.safetensors", "--out", "side"]), &["grid.png", "--force"]);
}
