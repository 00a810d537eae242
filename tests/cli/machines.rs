//! Output for machines, and the commands that look at things.

use std::fs;

use serde_json::Value;

use crate::desk::{Desk, fixtures};

/// Every line of standard output is one JSON object.
fn objects(stdout: &str) -> Vec<Value> {
    let parse = |line: &str| -> Value {
        let value = serde_json::from_str(line).unwrap_or_else(|e| panic!("not JSON ({e}): {line}"));
        assert!(matches!(value, Value::Object(_)), "not an object: {line}");
        value
    };
    stdout.lines().map(parse).collect()
}

#[test]
fn json_is_one_object_a_line_from_plan_to_export() {
    let desk = Desk::new();
    let plan = objects(&desk.succeed(&["plan", "recipe.toml", "--json"]).stdout);
    assert_eq!((plan.len(), &plan[0]["plan"]["adapter"]["rank"]), (1, &Value::from(2)));
    let rows = objects(&desk.succeed(&["--json", "train", "recipe.toml"]).stdout);
    let steps: Vec<u64> = rows.iter().filter_map(|row| row["step"].as_u64()).collect();
    assert_eq!(steps, [1, 2]);
    for key in ["epoch", "loss", "grad_norm", "lr", "sigma", "seconds", "items"] {
        assert!(rows.iter().any(|row| !row[key].is_null()), "no {key} in {rows:?}");
    }
    let export = ["--json", "export", "run/checkpoints/step-000002.safetensors", "kohya.safetensors"];
    let exported = objects(&desk.succeed(&[&export[..], &["--format", "kohya"]].concat()).stdout);
    assert_eq!(exported[0]["modules"], 20);
}

#[test]
fn inspect_knows_what_a_run_makes() {
    let desk = Desk::new();
    desk.succeed(&["train", "recipe.toml"]);
    let inspect = |path: &str| objects(&desk.succeed(&["--json", "inspect", path]).stdout).remove(0);

    let adapter = inspect("run/adapters/recipe.safetensors");
    assert_eq!(adapter["kind"], "LoRA adapter");
    assert_eq!((&adapter["modules"], &adapter["rank"][0]), (&Value::from(20), &Value::from(2)));
    assert!(adapter["metadata"]["tandem.plan_hash"].is_string(), "{adapter}");
    let checkpoint = inspect("run/checkpoints/step-000002.safetensors");
    assert_eq!((&checkpoint["kind"], &checkpoint["step"]), (&"checkpoint of a Tandem run".into(), &2.into()));
    let run = inspect("run");
    assert_eq!(run["parts"]["checkpoints/step-000002.safetensors"]["step"], 2);
    let model = inspect("model");
    assert_eq!((&model["kind"], &model["layout"]), (&"Wan model folder".into(), &"official".into()));
    assert_eq!(model["parts"]["."]["kind"], "Wan DiT");
    assert_eq!(model["parts"]["Wan2.1_VAE.pth"]["kind"], "Wan 2.1 VAE");
    assert_eq!(model["parts"]["models_t5_umt5-xxl-enc-bf16.pth"]["kind"], "UMT5 text encoder");
    let people = desk.succeed(&["inspect", "run/adapters/recipe.safetensors"]).stdout;
    assert!(people.contains("LoRA adapter") && people.contains("ComfyUI/native"), "{people}");
}

#[test]
fn inspect_knows_every_style_of_adapter_and_both_layouts() {
    let desk = Desk::new();
    let inspect = |path: &str| {
        let path = fixtures().join(path);
        objects(&desk.succeed(&["--json", "inspect", path.to_str().unwrap()]).stdout).remove(0)
    };
    for (file, style) in [
        ("comfy_ab", "ComfyUI/native"),
        ("comfy_updown_alpha", "ComfyUI/native"),
        ("kohya", "kohya/musubi"),
        ("peft_diffusers", "diffusers"),
    ] {
        let found = inspect(&format!("lora/t2v/{file}.safetensors"));
        assert_eq!((&found["style"], &found["rank"][0]), (&style.into(), &4.into()), "{file}");
    }
    let kohya = inspect("lora/t2v/kohya.safetensors");
    assert_eq!(kohya["alpha / rank"][0], "2", "alpha 8 over rank 4");
    let repo = inspect("repo_diffusers_a14b");
    assert_eq!((&repo["layout"], repo.get("missing")), (&"diffusers".into(), None));
    assert_eq!(repo["parts"]["transformer_2"]["layout"], "diffusers");
    assert_eq!(
        (&repo["parts"]["transformer"]["width"], &repo["parts"]["transformer"]["files"]),
        (&32.into(), &3.into())
    );
    assert_eq!(inspect("vae22/weights_official.safetensors")["kind"], "Wan 2.2 VAE");
}

#[test]
fn inspect_names_what_cannot_be_used() {
    let desk = Desk::new();
    desk.write("model.gguf", b"GGUF\x03\0\0\0");
    let told = desk.succeed(&["inspect", "model.gguf"]).stdout;
    assert!(told.contains("GGUF file") && told.contains(".safetensors of the same model"), "{told}");
    desk.write("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\n");
    assert!(desk.succeed(&["inspect", "pointer.safetensors"]).stdout.contains("git lfs pull"));
    desk.refuse(&["inspect", "nowhere"], &["nowhere", "No such file"]);
    desk.write("noise.safetensors", [7; 100]);
    desk.refuse(&["inspect", "noise.safetensors"], &["noise.safetensors", "not a safetensors file"]);
}

#[test]
fn doctor_always_answers() {
    let desk = Desk::new();
    let findings = objects(&desk.succeed(&["--json", "doctor"]).stdout);
    for what in ["processor", "memory", "attention", "ffmpeg", "ffprobe", "runs folder"] {
        let finding = findings.iter().find(|finding| finding["what"] == what);
        assert!(finding.is_some_and(|f| f["standing"].is_string()), "nothing about {what}: {findings:?}");
    }
    assert!(!desk.path("runs").exists(), "doctor left a folder behind");
    let blocked = desk.run(&["doctor", "--runs", "clips/a.txt/runs"]);
    assert!(blocked.stdout.contains("!! runs folder"), "{}", blocked.stdout);
    assert_eq!(blocked.code, Some(2), "a script sees that something is broken");
}

/// A step takes what was forecast, within 5 %: on a GPU, which counts its own tensors. Of the CPU only the whole process
/// is known, so there the two are just told.
#[test]
fn a_step_takes_what_was_forecast() {
    const TOLERANCE: f64 = 0.05;
    let desk = Desk::new();
    let sizes: &[&str] = match cfg!(feature = "cuda") {
        true => &["--model", "t2v-1.3b", "--width", "832", "--height", "480", "--frames", "17"],
        false => &["--width", "32", "--height", "32", "--frames", "5"],
    };
    for keep in ["inputs", "attention", "all"] {
        let step = [&["bench", "step", "--random-weights", "-n", "1", "--keep", keep], sizes].concat();
        let told = objects(&desk.succeed(&step).stdout).remove(0);
        let gib = |name: &str| told[name][0].as_f64().unwrap();
        let (measured, forecast) = (gib("peak_gib"), gib("forecast_gib"));
        let is_close = (forecast / measured - 1.0).abs() < TOLERANCE;
        assert!(told["gpus"] == 0 || is_close, "{keep}: {forecast} GiB forecast, {measured} GiB measured");
    }
}

#[test]
fn bench_tells_figures_under_common_names() {
    let desk = Desk::new();
    let bench = |words: &[&str]| objects(&desk.succeed(&[&["bench"][..], words].concat()).stdout).remove(0);
    let size = ["--random-weights", "--width", "32", "--height", "32", "--frames", "5", "--iters", "1"];
    let step = bench(&[&["step"][..], &size, &["--rank", "2"]].concat());
    assert_eq!((&step["what"], &step["tokens"]), (&"train".into(), &8.into()));
    assert!(step["s_per_step"].as_f64().unwrap() > 0.0 && step["useful_tflops"].is_number(), "{step}");
    let forward = bench(&[&["forward"][..], &size, &["--stages", "cpu,cpu"]].concat());
    assert!(
        forward["s_per_forward"].is_number() && forward["stages"] == serde_json::json!(["cpu", "cpu"]),
        "{forward}"
    );
    let clips = bench(&[&["clips"][..], &size, &["--stages", "cpu,cpu", "--clips", "2"]].concat());
    assert!(clips["s_per_step"].is_number() && clips["drained_busy"].is_number(), "{clips}");
    let vae = bench(&[&["vae"][..], &size].concat());
    assert!(vae["decode_s"].is_number() && vae["encode_s"].is_number(), "{vae}");
    let text = bench(&["text", "--random-weights", "--tokens", "8", "--iters", "1"]);
    assert_eq!(text["tokens"], 8);
    let attention =
        bench(&["attention", "--tokens", "64", "--heads", "2", "--head-size", "8", "--iters", "1"]);
    assert!(attention["fwd_ms"].is_number() && attention["bwd_tflops"].is_number(), "{attention}");
    let load = bench(&["load", "--model", "model", "-n", "1"]);
    assert!(load["gb_s"].is_number() && fs::metadata(desk.path("model")).is_ok(), "{load}");
    let made = bench(&["load", "--random-weights", "--scratch", "made", "-n", "1"]);
    assert!(
        made["host_peak_gib"].is_number() && made["tensors"].as_u64() > load["tensors"].as_u64(),
        "{made}"
    );
    assert_eq!(
        fs::read_dir(desk.path("made")).unwrap().count(),
        0,
        "the checkpoint that was made is still there"
    );
    let any = bench(&["load", "--model", "model/Wan2.1_VAE.pth", "-n", "1"]);
    assert!(any["s"].is_number(), "{any}");
    desk.refuse(
        &["bench", "step", "--random-weights", "--model", "t2v-2b"],
        &["t2v-2b", "t2v-1.3b, t2v-14b, t2v-a14b, i2v-14b, i2v-a14b, flf2v-14b, ti2v-5b, fun-inp-1.3b, tiny"],
    );
    desk.refuse(&["bench", "step"], &["--model", "tiny", "--random-weights"]);
}
