//! `tandem sample`: its settings from a run or a recipe, and its estimate of the time.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use crate::desk::{Desk, Outcome, fixtures};

/// Settings of clips that differ from every default.
const CLIPS: &str = "[sample]\nprompts = [\"a cloud\", \"a hill --d 9 --f 1\"]\nevery = 1\nsteps = 2\nshift = 2.5\n\
                     guidance = 1.5\nnegative = \"fog\"\nsolver = \"euler\"\nformats = [\"gif\"]\n\n[checkpoint]";

/// A run of three steps with clips after each, of which the checkpoints of the last two are kept.
fn trained() -> Desk {
    let desk = Desk::new();
    desk.change("[checkpoint]\nevery_steps = 2", &format!("{CLIPS}\nevery_steps = 1\nkeep_last = 2"));
    desk.change("\nsteps = 2\n\n", "\nsteps = 3\n\n[optimizer]\nlr = 0.05\nwarmup = 0\n\n");
    desk.change("rank = 2", "rank = 2\n\n[export]\nprecision = \"float32\"\n");
    desk.succeed(&["train", "recipe.toml"]);
    desk
}

/// The clips of the run itself are what `sample` makes of it: by its folder and by its recipe, at the end and in between.
#[test]
fn a_run_is_sampled_as_it_was_trained() {
    let desk = trained();
    let own = |step: u64, name: &str| {
        fs::read(desk.path(&format!("run/samples/step-{step:06}/{name}.gif"))).unwrap()
    };
    assert!(own(3, "00-a-cloud") != own(1, "00-a-cloud"), "training changes the clip");
    for (words, step, adapter) in [
        (&["run"][..], 3, "adapters/recipe.safetensors"),
        (&["recipe.toml"], 3, "adapters/recipe.safetensors"),
        (&["run", "--checkpoint", "1"], 1, "adapters/recipe_step-000001.safetensors"),
        (&["recipe.toml", "--checkpoint", "3"], 3, "checkpoints/step-000003.safetensors"),
    ] {
        let told = desk.succeed(&[&["sample", "--out", "made", "--force"][..], words].concat()).stderr;
        assert!(told.contains(&format!("adapter: run/{adapter}")), "{words:?}: {told}");
        assert!(told.contains("2 clips: about 1 s of sampling (an estimate)"), "{told}");
        for name in ["00-a-cloud", "01-a-hill"] {
            let made = fs::read(desk.path(&format!("made/{name}.gif"))).unwrap();
            assert!(made == own(step, name), "{words:?}: {name} differs from the run's");
        }
    }
    desk.refuse(&["sample", "run", "--checkpoint", "7"], &["--checkpoint", "none after 7 steps", "1, 2, 3"]);
    desk.refuse(&["sample", "clips", "--checkpoint", "1"], &["clips", "plan.toml"]);
    desk.refuse(&["sample"], &["--model", "RUN_OR_RECIPE"]);
}

#[test]
fn options_replace_settings_of_a_run() {
    let desk = trained();
    let sample = |more: &[&str], name: &str| {
        desk.succeed(&[&["sample", "recipe.toml", "--out", "made", "--force"][..], more].concat());
        fs::read(desk.path(&format!("made/{name}"))).unwrap()
    };
    let plain = sample(&["--prompt", "a cloud"], "00-a-cloud.gif");
    assert!(plain == sample(&[], "00-a-cloud.gif"), "a prompt alone keeps all else");
    for option in [
        &["--steps", "3"][..],
        &["--seed", "5"],
        &["--shift", "6"],
        &["--guidance", "4"],
        &["--negative", "rain"],
        &["--solver", "unipc"],
        &["--frames", "1"],
        &["--width", "32"],
        &["--set", "sample.steps=3"],
        &["--lora", "run/adapters/recipe_step-000001.safetensors"],
    ] {
        assert!(
            plain != sample(&[&["--prompt", "a cloud"], option].concat(), "00-a-cloud.gif"),
            "{option:?}"
        );
    }
    assert!(!sample(&["--format", "webp"], "01-a-hill.webp").is_empty());
    desk.refuse(&["sample", "run", "--set", "sample.steps=3"], &["--set sample.steps", "a run"]);
    fs::remove_dir_all(desk.path("run")).unwrap();
    let told = desk.succeed(&["sample", "recipe.toml", "--out", "alone"]).stderr;
    assert!(told.contains("no run in run yet") && told.contains("the model alone"), "{told}");
}

/// The adapter's header has the size that it was trained at.
#[test]
fn clips_of_an_adapter_have_the_size_that_it_was_trained_at() {
    let desk = trained();
    let words =
        ["sample", "--model", "model", "--lora", "run/adapters/recipe.safetensors", "--prompt", "a cloud"];
    let told =
        desk.succeed(&[&words[..], &["--steps", "1", "--format", "gif", "--cache", "cache"]].concat()).stderr;
    assert!(told.contains("was trained at 16x16, 5 frames"), "{told}");
    let size = image::image_dimensions(desk.path("clips/00-a-cloud.gif")).unwrap();
    assert_eq!(size, (16, 16));
}

/// At a terminal, which util-linux's `script` makes; without it there is nothing to run this on.
#[test]
fn what_takes_over_an_hour_is_asked_about() {
    let desk = Desk::new();
    let tandem = env!("CARGO_BIN_EXE_tandem");
    let line = format!(
        "{tandem} sample --model model --prompt x --width 2048 --height 2048 --frames 401 --cache cache --out made"
    );
    let spawned = Command::new("script")
        .args(["-qec", &line, "/dev/null"])
        .current_dir(desk.path(""))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut child) = spawned else { return };
    child.stdin.take().unwrap().write_all(b"n\n").unwrap();
    let outcome: Outcome = child.wait_with_output().unwrap().into();
    for told in [" h ", "(an estimate)", "go on? [y/N]", "nothing was made"] {
        assert!(outcome.stdout.contains(told), "no {told} in {}", outcome.stdout);
    }
}

/// What clips go through is looked at before any of it is loaded; the text encoder is not, where the cache has its states.
#[cfg(not(feature = "cuda"))]
#[test]
fn clips_that_do_not_fit_are_refused_before_anything_is_loaded() {
    let desk = Desk::new();
    let sample = [
        "sample",
        "--model",
        "model",
        "--prompt",
        "a cloud",
        "--frames",
        "5",
        "--width",
        "64",
        "--height",
        "64",
        "--text-base",
        "f32",
    ];
    let on = |limit| [&sample[..], &["--stages", "cuda:0", "--memory-limit", limit]].concat();
    desk.refuse(&on("32MiB"), &["text encoder does not fit", "cuda:0 has room for 32.0 MiB"]);
    // Each is there alone: what is left to refuse is the build without CUDA.
    desk.refuse(&on("1GiB"), &["cuda:0", "without CUDA"]);
    desk.succeed(&[&sample[..], &["--steps", "1"]].concat());
    let again = [&on("32MiB")[..], &["--force"]].concat();
    desk.refuse(&again, &["sampling does not fit", "cuda:0"]);
}

/// A preview is there as long as its clip is not: here a folder is in the clip's way.
#[test]
fn previews_are_there_until_the_clip_is() {
    let desk = Desk::new();
    let tiny = |case: &str, name: &'static str| {
        fs::copy(fixtures().join(format!("taehv/{case}.safetensors")), desk.path(name)).unwrap();
        name
    };
    let words =
        ["sample", "--model", "model", "--prompt", "a cloud", "--frames", "5", "--width", "16", "--height"];
    let words = [&words[..], &["16", "--steps", "3", "--format", "gif", "--cache", "cache"]].concat();
    let with = |more: &[&'static str]| [&words[..], more].concat();
    desk.refuse(&with(&["--preview"]), &["--tiny-decoder"]);
    let wide = tiny("tiny22", "tiny22.safetensors");
    desk.refuse(&with(&["--preview", "--tiny-decoder", wide]), &["48 channels", "have 16", "taew2_1"]);
    let decoder = tiny("tiny21", "lighttae_tiny.safetensors");
    let preview = desk.path("shown/00-a-cloud.preview.mp4");
    fs::create_dir_all(desk.path("made/00-a-cloud.gif")).unwrap();
    let told = desk.run(&with(&["--preview=2", "--tiny-decoder", decoder, "--out", "made", "--force"]));
    assert_ne!(told.code, Some(0));
    assert!(told.stderr.contains("decodes latents without scaling"), "{}", told.stderr);
    let left = data::middle_frame(&desk.path("made/00-a-cloud.preview.mp4")).unwrap();
    assert_eq!((left.width(), left.height()), (16, 16));
    desk.succeed(&with(&["--preview=2", "--tiny-decoder", decoder, "--out", "shown"]));
    assert!(desk.path("shown/00-a-cloud.gif").is_file() && !preview.exists());
    // A run of a recipe makes them too.
    let clips = "[sample]\nprompts = [\"a cloud\"]\nsteps = 3\npreview_every = 1\n";
    desk.change("[checkpoint]", &format!("{clips}\n[checkpoint]"));
    desk.refuse(&["plan", "recipe.toml"], &["sample.preview_every", "sample.tiny_decoder"]);
    desk.change("preview_every = 1\n", &format!("preview_every = 1\ntiny_decoder = \"{decoder}\"\n"));
    desk.succeed(&["train", "recipe.toml"]);
    let made: Vec<String> = fs::read_dir(desk.path("run/samples/step-000002"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    assert!(made.contains(&"00-a-cloud.mp4".to_owned()) && made.len() == 2, "{made:?}");
}
