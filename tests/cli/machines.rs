//! Output for machines, and the commands that look at things.

use std::fs;
use std::io::Write;

use serde_json::Value;

use crate::desk::{Desk, fixtures};

/// Every line of standard output is one JSON object.
pub fn objects(stdout: &str) -> Vec<Value> {
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

/// What is measured to be held to its forecast: a name, the words behind `bench`, and the fields of both figures.
struct Case {
    name: &'static str,
    words: Vec<&'static str>,
    fields: Vec<[&'static str; 2]>,
}

impl Case {
    /// A step of a small network.
    fn step(name: &'static str, model: &'static str, words: &[&'static str]) -> Self {
        let model: &[&str] = if cfg!(feature = "cuda") { &["--model", model] } else { &[] };
        let words = [&["step"], model, words].concat();
        Self { name, words, fields: vec![["peak_gib", "forecast_gib"]] }
    }

    fn part(name: &'static str, words: &[&'static str], fields: &[[&'static str; 2]]) -> Self {
        Self { name, words: words.to_vec(), fields: fields.to_vec() }
    }
}

/// Every way in which a network, an adapter or a stage is held, and the other models.
fn cases() -> Vec<Case> {
    const SMALL: &str = "t2v-1.3b";
    let (is_gpu, both) =
        (cfg!(feature = "cuda"), if cfg!(feature = "cuda") { "cuda:0,cuda:1" } else { "cpu,cpu" });
    let step = |name, words: &[&'static str]| Case::step(name, SMALL, words);
    let [network, vae, text] = if is_gpu { [SMALL, "wan2.1", "umt5-xxl"] } else { ["tiny"; 3] };
    let clips = |name, words: &[&'static str]| {
        let words = [&["clips", "--model", network, "--clips", "2"], words].concat();
        Case::part(name, &words, &[["peak_gib", "forecast_gib"]])
    };
    let of_vae = [["decode_peak_gib", "decode_forecast_gib"], ["encode_peak_gib", "encode_forecast_gib"]];
    vec![
        step("keep inputs", &["--keep", "inputs"]),
        step("keep attention", &["--keep", "attention"]),
        step("keep all", &["--keep", "all"]),
        step("fp8", &["--base", "fp8", "--keep", "inputs"]),
        step("int8", &["--base", "int8", "--keep", "attention"]),
        step("offloaded", &["--keep", "all", "--offload", "always"]),
        Case::step("image branch", "fun-inp-1.3b", &["--keep", "attention"]),
        step("batch of 2", &["--batch", "2", "--keep", "inputs"]),
        step("DoRA", &["--kind", "dora", "--keep", "inputs"]),
        step("LoKr", &["--kind", "lokr", "--keep", "inputs"]),
        step("bf16 stream", &["--stream", "bfloat16", "--keep", "attention"]),
        step("streamed weights", &["--weights", "host", "--keep", "inputs"]),
        step("experts in turn", &["--experts", "in-turn", "--keep", "inputs"]),
        step("two stages", &["--stages", both, "--accumulate", "3", "--keep", "inputs"]),
        step(
            "through the host",
            &["--stages", both, "--transfer", "host", "--accumulate", "3", "--keep", "inputs"],
        ),
        clips("two clips", &[]),
        clips("two clips on two stages", &["--stages", both]),
        clips("clips with streamed weights", &["--weights", "host"]),
        clips("a whole network on each of two", &["--stages", both, "--groups", "2"]),
        Case::part("VAE", &["vae", "--model", vae], &of_vae),
        // Without a second GPU, as without any: alone.
        Case::part(
            "VAE on two cards",
            &[
                &["vae", "--model", vae][..],
                if is_gpu { &["--device", "cuda:0", "--beside", "cuda:1"] } else { &[] },
            ]
            .concat(),
            &of_vae,
        ),
        Case::part("VAE in tiles", &["vae", "--model", vae, "--tiled"], &of_vae),
        Case::part("text encoder", &["text", "--model", text], &[["peak_gib", "forecast_gib"]]),
    ]
}

/// Whatever a run does takes what was forecast, within 5 %: on GPUs, which count their own tensors. Of the CPU only the whole
/// process is known, so there both figures are just told.
#[test]
fn work_takes_what_was_forecast() {
    const TOLERANCE: f64 = 0.05;
    const AHEAD: f64 = 0.15;
    let desk = Desk::new();
    let (size, warmup): (&[&str], &str) = match cfg!(feature = "cuda") {
        true => (&["--width", "832", "--height", "480", "--frames", "17"], "1"),
        false => (&["--width", "32", "--height", "32", "--frames", "5"], "0"),
    };
    let (mut table, mut wrong) = (String::new(), 0);
    for Case { name, words, fields } in cases() {
        let sized = if words[0] == "text" { &[][..] } else { size };
        let once = ["--random-weights", "-n", "1", "--warmup", warmup];
        let outcome = desk.run(&[&["bench"], &words[..], &once, sized].concat());
        if words.iter().any(|word| word.contains("cuda:1")) && outcome.stderr.contains("no such GPU") {
            table.push_str(&format!("{name:<24} needs two GPUs\n"));
            continue;
        }
        assert_eq!(outcome.code, Some(0), "{name}: {}", outcome.stderr);
        let told = objects(&outcome.stdout).remove(0);
        let device = told["device"].as_str().or(told["stages"][0].as_str()).unwrap();
        for [peak, forecast] in fields {
            // A figure for each device, or for the only one.
            let figures = |name: &str| -> Vec<f64> {
                let all = told[name].as_array().cloned().unwrap_or_else(|| vec![told[name].clone()]);
                all.iter().map(|figure| figure.as_f64().unwrap()).collect()
            };
            let (measured, forecast) = (figures(peak), figures(forecast));
            assert_eq!(measured.len(), forecast.len(), "{name}: {told}");
            // How far the first stage runs ahead of the second depends on their speed: the forecast is of the furthest.
            let above = if name.contains("clips on two stages") { AHEAD } else { TOLERANCE };
            let is_close = |(m, f): (&f64, &f64)| f / m > 1.0 - TOLERANCE && f / m < 1.0 + above;
            let is_right = device == "cpu" || measured.iter().zip(&forecast).all(is_close);
            wrong += usize::from(!is_right);
            let verdict = if is_right { "" } else { "  <- off" };
            table.push_str(&format!("{name:<24} {peak:<16} {measured:?} forecast {forecast:?}{verdict}\n"));
        }
    }
    if cfg!(feature = "cuda") {
        std::io::stderr().write_all(format!("GiB\n{table}").as_bytes()).unwrap();
    }
    assert_eq!(wrong, 0, "measured and forecast differ by more than {TOLERANCE}:\n{table}");
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
    assert!(clips["s_per_step"].is_number() && clips["busy"].is_number(), "{clips}");
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
        &["t2v-2b", "t2v-1.3b, t2v-14b, t2v-a14b, i2v-14b, i2v-a14b, flf2v-14b, ti2v-5b, fun-inp-1.3b, fun-control-1.3b"],
    );
    desk.refuse(&["bench", "step"], &["--model", "tiny", "--random-weights"]);
}
