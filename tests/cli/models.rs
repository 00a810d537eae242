//! Base models that are incomplete, damaged, or something else.

use std::fs;
use std::io::Write;

use proofs::hub::{Repository, Server};

use crate::desk::{Desk, Outcome};

const PLAN: [&str; 2] = ["plan", "recipe.toml"];
const TRAIN: [&str; 2] = ["train", "recipe.toml"];
const SHARD: &str = "model/diffusion_pytorch_model-00002-of-00002.safetensors";

#[test]
fn a_folder_without_a_model_or_without_a_part_is_named() {
    let desk = Desk::new();
    desk.change("folder = \"model\"", "folder = \"modle\"");
    desk.refuse(&PLAN, &["there is no model at", "modle", "model.folder"]);
    desk.change("folder = \"modle\"", "folder = \"model\"");
    fs::remove_file(desk.path("model/Wan2.1_VAE.pth")).unwrap();
    desk.refuse(&PLAN, &["no vae", "Wan2.1_VAE.pth", "model.vae"]);
}

#[test]
fn a_missing_shard_is_named() {
    let desk = Desk::new();
    fs::remove_file(desk.path(SHARD)).unwrap();
    desk.refuse(&PLAN, &["1 of 2 shards are missing", "00002-of-00002.safetensors", "fetch them"]);
}

#[test]
fn a_truncated_shard_is_named() {
    let desk = Desk::new();
    let bytes = fs::read(desk.path(SHARD)).unwrap();
    desk.write(SHARD, &bytes[..bytes.len() - 100]);
    desk.refuse(&PLAN, &["00002-of-00002.safetensors", "the file is truncated", "fetch this file again"]);
}

#[test]
fn a_header_that_claims_more_than_the_file_is_refused() {
    let desk = Desk::new();
    let mut bytes = fs::read(desk.path(SHARD)).unwrap();
    bytes[..8].copy_from_slice(&(1u64 << 40).to_le_bytes());
    desk.write(SHARD, &bytes);
    desk.refuse(&PLAN, &["00002-of-00002.safetensors", "the header claims 1099511627776 bytes", "again"]);
}

#[test]
fn overlapping_tensors_are_named() {
    let desk = Desk::new();
    let header = br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend([0; 12]);
    desk.write(SHARD, &bytes);
    desk.refuse(&PLAN, &["00002-of-00002.safetensors", "tensor `b` overlaps", "again"]);
}

#[test]
fn a_weight_that_is_no_number_is_named() {
    let desk = Desk::new();
    let mut bytes = fs::read(desk.path(SHARD)).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    desk.write(SHARD, &bytes);
    desk.refuse(&TRAIN, &["tensor `", "not finite", "NaN", "again"]);
    assert!(!desk.path("run/adapters").read_dir().is_ok_and(|mut files| files.next().is_some()));
}

#[test]
fn a_missing_tokenizer_is_looked_for_by_name() {
    let desk = Desk::new();
    fs::remove_file(desk.path("model/google/umt5-xxl/tokenizer.json")).unwrap();
    desk.refuse(&["cache", "recipe.toml"], &["tokenizer", "google/umt5-xxl/tokenizer.json", "Download"]);
    fs::remove_dir_all(desk.path("model/google")).unwrap();
    desk.refuse(&PLAN, &["no tokenizer", "google/umt5-xxl", "model.tokenizer"]);
}

#[test]
fn a_pickle_that_is_more_than_tensors_is_refused_and_not_run() {
    let desk = Desk::new();
    // What pickle would run as os.system("touch owned").
    let pickle = b"\x80\x02cos\nsystem\nX\x0b\0\0\0touch owned\x85R.";
    let mut zip = zip::ZipWriter::new(fs::File::create(desk.path("model/Wan2.1_VAE.pth")).unwrap());
    zip.start_file(
        "archive/data.pkl",
        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored),
    )
    .unwrap();
    zip.write_all(pickle).unwrap();
    zip.finish().unwrap();
    desk.refuse(&["cache", "recipe.toml"], &["Wan2.1_VAE.pth", "os.system"]);
    assert!(!desk.path("owned").exists());
}

#[test]
fn files_that_are_no_weights_are_named_for_what_they_are() {
    let desk = Desk::new();
    for (bytes, told) in [
        (&b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"[..], "git lfs pull"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"<!DOCTYPE html><html>", "web page"),
    ] {
        desk.write("model/Wan2.1_VAE.pth", bytes);
        desk.refuse(&["cache", "recipe.toml"], &["Wan2.1_VAE.pth", told]);
    }
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let desk = Desk::new();
    fs::copy(crate::desk::fixtures().join("vae21/io.safetensors"), desk.path("io.safetensors")).unwrap();
    let sample = ["sample", "--model", "model", "--prompt", "a cloud", "--width", "16", "--height", "16"];
    let lora = |file| [&sample[..], &["--frames", "5", "--steps", "1", "--lora", file]].concat();
    desk.refuse(&lora("io.safetensors"), &["io.safetensors", "not an adapter"]);
    desk.refuse(&lora("nowhere.safetensors"), &["nowhere.safetensors", "No such file"]);
}

/// A checkpoint of 16 tensors of 32 MiB, whose bytes the file system makes up. Reading one and coding it takes the tensor,
/// its codes, a piece for each core, and the program: less than four tensors, where a whole model would take sixteen.
#[test]
fn a_checkpoint_is_read_in_the_memory_of_a_tensor() {
    const BYTES: u64 = 32 << 20;
    const TENSORS: u64 = 16;
    let desk = Desk::new();
    let tensor = |i: u64| {
        let offsets = (i * BYTES, (i + 1) * BYTES);
        format!(
            r#""t{i:02}":{{"dtype":"F32","shape":[2048,4096],"data_offsets":[{},{}]}}"#,
            offsets.0, offsets.1
        )
    };
    let header = format!("{{{}}}", (0..TENSORS).map(tensor).collect::<Vec<_>>().join(","));
    let mut file = fs::File::create(desk.path("large.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + TENSORS * BYTES).unwrap();
    for base in ["f32", "fp8"] {
        let load =
            ["--json", "bench", "load", "--model", "large.safetensors", "--stages", "cpu", "--base", base];
        let told = desk.succeed(&[&load[..], &["--warmup", "0", "--iters", "1"]].concat()).stdout;
        let row: serde_json::Value = serde_json::from_str(&told).unwrap();
        let Some(peak) = row["host_peak_gib"].as_f64() else { continue };
        assert!(peak * f64::from(1 << 30) < 4.0 * BYTES as f64, "{base}: {peak} GiB");
    }
}

/// What is measured is what a start reads: half of the bytes where quantised weights are cached.
#[test]
fn a_bench_of_loading_writes_its_model_once_and_tells_what_limits_it() {
    let desk = Desk::new();
    let write =
        ["--json", "bench", "load", "--random-weights", "--write", "made", "--stages", "cpu", "-n", "1"];
    let row = |outcome: Outcome| serde_json::from_str::<serde_json::Value>(&outcome.stdout).unwrap();
    let whole = row(desk.succeed(&write));
    assert!(whole["read_gb_s"].as_f64().unwrap() > 0.0 && whole["link_gb_s"].is_null(), "{whole}");
    desk.refuse(&write, &["--write", "has a model", "--model"]);
    let load = ["--json", "bench", "load", "--model", "made", "--stages", "cpu", "--base", "int8", "-n", "1"];
    let cached = row(desk.succeed(&[&load[..], &["--quantised-folder", "quantised"]].concat()));
    let bytes = |row: &serde_json::Value| row["bytes"].as_u64().unwrap();
    assert_eq!(bytes(&row(desk.succeed(&load))), bytes(&whole));
    let file = fs::read_dir(desk.path("quantised")).unwrap().next().unwrap().unwrap();
    assert!(bytes(&cached) < bytes(&whole) && bytes(&cached) > file.metadata().unwrap().len(), "{cached}");
}

/// The folder is named once, when the file is written; a damaged file is told once, and is whole after that.
#[test]
fn quantised_weights_are_cached_for_the_next_start_unless_that_is_switched_off() {
    let desk = Desk::new();
    desk.change("folder = \"model\"", "folder = \"model\"\nbase = \"fp8\"\nquantised_folder = \"quantised\"");
    desk.change("[train]", "[devices]\nstages = [\"cpu\"]\n\n[train]");
    let told = |outcome: &Outcome, what: &str| format!("{}{}", outcome.stdout, outcome.stderr).contains(what);
    let written = desk.succeed(&TRAIN);
    for what in ["cached in", "model.cache_quantised = false", "--no-quantised-cache"] {
        assert!(told(&written, what), "no {what} in {written:?}");
    }
    let files = || fs::read_dir(desk.path("quantised")).unwrap().map(|entry| entry.unwrap().path());
    let file = files().next().unwrap();
    assert_eq!((files().count(), file.extension().unwrap()), (1, "safetensors".as_ref()));
    let whole = fs::read(&file).unwrap();

    let sample = |more: &[&str]| {
        let size = ["--width", "16", "--height", "16", "--frames", "1", "--steps", "1", "--force"];
        let clip =
            ["sample", "run", "--prompt", "a cloud", "--out", "made", "--save-latents", "l.safetensors"];
        desk.succeed(&[&clip[..], &size, more].concat())
    };
    let read = sample(&[]);
    assert!(!told(&read, "cached in") && !told(&read, "was damaged"), "{read:?}");
    let latents = || fs::read(desk.path("l.safetensors")).unwrap();
    let before = latents();
    fs::write(&file, &whole[..whole.len() - 5]).unwrap();
    assert!(!told(&sample(&["--no-quantised-cache"]), "was damaged"));
    let mended = sample(&[]);
    assert!(told(&mended, "was damaged") && fs::read(&file).unwrap() == whole, "{mended:?}");
    assert!(latents() == before, "other weights");
    let off = ["train", "recipe.toml", "--set", "model.cache_quantised=false", "--resume"];
    assert!(!told(&desk.succeed(&off), "cached in"));
}

#[test]
fn a_base_is_settled_trained_on_and_not_exchanged() {
    let desk = Desk::new();
    desk.change("folder = \"model\"", "folder = \"model\"\nbase = \"fp8\"");
    desk.change("[train]", "[devices]\nstages = [\"cpu\"]\n\n[train]");
    let plan = desk.succeed(&PLAN).stdout;
    for settled in
        ["base = \"fp8\"", "compute = \"float32\"", "text_base = \"f32\"", "vae_base = \"float32\""]
    {
        assert!(plan.contains(settled), "no {settled} in {plan}");
    }
    desk.succeed(&TRAIN);
    let clip = ["sample", "--model", "model", "--prompt", "a cloud", "--base", "int8", "--stages", "cpu"];
    let size = [
        "--width", "16", "--height", "16", "--frames", "1", "--steps", "1", "--cache", "cache", "--out",
        "made",
    ];
    desk.succeed(&[&clip[..], &size, &["--lora", "run/adapters/recipe.safetensors"]].concat());
    desk.change("base = \"fp8\"", "base = \"int8\"");
    let resume = [&TRAIN[..], &["--resume"]].concat();
    desk.refuse(&resume, &["model.precision.base", "fp8", "int8"]);
    desk.change("base = \"int8\"", "base = \"fp4\"");
    desk.refuse(&PLAN, &["fp4", "`bf16`", "`fp8`", "`int8`"]);
}

/// From a recipe that names a model of the hub to its plan, through the program and the variables that it reads.
#[test]
fn a_model_of_the_hub_is_told_fetched_and_used() {
    let desk = Desk::new();
    let repository = Repository::of(&desk.path("model"));
    let server = Server::start(move |request, _| repository.honest(request));
    fs::remove_dir_all(desk.path("model")).unwrap();
    desk.change("folder = \"model\"", "folder = \"someone/tiny-wan\"");
    let home = desk.path("hugging");
    let run = |words: &[&str], offline: &str| -> crate::desk::Outcome {
        let mut command = desk.command(words);
        command.env("HF_HOME", &home).env("HF_ENDPOINT", &server.address).env("HF_HUB_OFFLINE", offline);
        command.env_remove("HF_HUB_CACHE").output().unwrap().into()
    };
    let told = run(&PLAN, "0");
    assert_eq!(told.code, Some(2));
    assert!(told.stderr.contains("`tandem fetch someone/tiny-wan`"), "{}", told.stderr);
    assert!(server.asked().is_empty(), "a plan fetches nothing");
    assert!(run(&["fetch", "someone/tiny-wan"], "1").stderr.contains("HF_HUB_OFFLINE"));

    let told = run(&["fetch", "someone/tiny-wan", "--only", "vae", "--json"], "0").stdout;
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    let folder = std::path::PathBuf::from(told["folder"].as_str().unwrap());
    assert!(folder.join("Wan2.1_VAE.pth").is_file() && !folder.join("config.json").exists());
    let whole = run(&["cache", "recipe.toml"], "0");
    assert_eq!(whole.code, Some(0), "{}", whole.stderr);
    let plan = run(&PLAN, "1");
    assert_eq!(plan.code, Some(0), "{}", plan.stderr);
    assert!(plan.stdout.contains("name = \"tiny-wan\""), "{}", plan.stdout);
    assert_eq!(server.asked_for("Wan2.1_VAE.pth").len(), 1, "what is there is not fetched again");

    // Commands that only read find it by its name, and make no request.
    let told = run(&["inspect", "someone/tiny-wan"], "1");
    assert!(told.code == Some(0) && told.stdout.contains("Wan DiT"), "{}{}", told.stdout, told.stderr);
    let load = run(&["bench", "load", "--model", "someone/tiny-wan", "--stages", "cpu", "-n", "1"], "1");
    assert_eq!(load.code, Some(0), "{}", load.stderr);
    for words in [&["inspect", "someone/else"][..], &["bench", "load", "--model", "someone/else"]] {
        run(words, "0").assert_refused(&["someone/else", "`tandem fetch someone/else`"]);
    }
    let slip = run(&["inspect", "clips/none.safetensors"], "0");
    assert!(slip.code == Some(2) && !slip.stderr.contains("fetch"), "{}", slip.stderr);
}

/// The plan recognises by its header a file that was given as another part, and says what it is.
#[test]
fn a_part_in_the_place_of_another_is_named_for_what_it_is() {
    let desk = Desk::new();
    let (vae, text) = ("model/Wan2.1_VAE.pth", "model/models_t5_umt5-xxl-enc-bf16.pth");
    let lora = crate::desk::fixtures().join("lora/t2v/kohya.safetensors");
    let lora = lora.to_str().unwrap();
    let model = "folder = \"model\"";
    for (key, file, told) in [
        ("dit", vae, ["this is not a Wan DiT", "but a Wan VAE"]),
        ("dit", text, ["this is not a Wan DiT", "but a UMT5 text encoder"]),
        ("dit", lora, ["this is not a Wan DiT", "but an adapter"]),
        ("vae", text, ["this is not a Wan VAE", "but a UMT5 text encoder"]),
        ("text_encoder", vae, ["this is not a UMT5 text encoder", "but a Wan VAE"]),
        ("dit_config", "nowhere.json", ["dit_config", "nowhere.json"]),
        ("dit_config", "recipe.toml", ["config.json cannot be read", "published with the model"]),
    ] {
        let named = format!("{model}\n{key} = \"{file}\"");
        desk.change(model, &named);
        desk.refuse(&PLAN, &told);
        if !key.starts_with("dit_") {
            desk.refuse(&PLAN, &[file, "give the right file"]);
        }
        desk.change(&named, model);
    }
    for (place, key) in [
        (model, "model.dit"),
        (model, "model.dit_high"),
        (model, "model.dit_config"),
        (model, "model.vae"),
        (model, "model.text_encoder"),
        (model, "model.tokenizer"),
        (model, "model.clip"),
        ("rank = 2", "adapter.init_from"),
        ("every_steps = 2", "sample.adapter"),
    ] {
        let (section, name) = key.split_once('.').unwrap();
        let section = if section == "sample" { "[sample]\n" } else { "" };
        let named = format!("{place}\n{section}{name} = \"nope\"");
        desk.change(place, &named);
        desk.refuse(&PLAN, &[&format!("{key}: nothing exists at nope")]);
        desk.change(&named, place);
    }
    desk.change(model, "folder = \"model/config.json\"");
    desk.refuse(&TRAIN, &["model/config.json is a file", "model.dit"]);
}
