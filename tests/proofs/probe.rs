//! `tandem probe` on the command line gives the golden values, which others can compare with.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use clap::Parser;
use kernels::{DType, Device, Tensor};
use models::names;
use models::weights::write_safetensors;
use proofs::{
    DIT_KINDS, Tolerance, assert_close, assert_same_bits, device, fixture, fixture_json, fixture_tensors,
};
use tempfile::TempDir;
use trainer::cli::Arguments;

/// f32 sums in another order; the bounds of the fixtures for each part.
const DIT: Tolerance = Tolerance::absolute(1.5e-4);
const VAE: Tolerance = Tolerance::absolute(2e-5);
/// What the fixtures allow to hidden states of CLIP, and a resized picture before it.
const CLIP: Tolerance = Tolerance::absolute(5e-5);
const TILED: Tolerance = Tolerance::absolute(3e-5);
const TEXT: Tolerance = Tolerance::absolute(5e-5);
const TRAJECTORY: Tolerance = Tolerance::absolute(1e-5);
/// Adam turns the sign of a near-zero gradient into a whole step of 1e-2.
const TRAINED: Tolerance = Tolerance::absolute(2e-3);

/// A folder with an input file, and the path of the output.
pub struct Desk {
    folder: TempDir,
}

impl Desk {
    pub fn with<'a>(tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        write_safetensors(&folder.path().join("in.safetensors"), tensors, &BTreeMap::new()).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs `tandem probe <words> --input .. --output ..` and reads what it wrote.
    pub fn probe(&self, words: &[&str]) -> HashMap<String, Tensor> {
        let (input, output) = (self.path("in.safetensors"), self.path("out.safetensors"));
        let mut words = words.to_vec();
        words.extend(["--input", text(&input), "--output", text(&output)]);
        run(&words).unwrap();
        kernels::safetensors::load(&output, &Device::Cpu).unwrap()
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn run(words: &[&str]) -> anyhow::Result<u8> {
    let words = ["tandem", "--json", "probe"].iter().chain(words);
    Arguments::try_parse_from(words).unwrap().run()
}

#[test]
fn a_tiny_decoder_gives_the_golden_frames() {
    let golden = fixture_tensors("taehv/tiny22_io.safetensors");
    let tchw = |x: &Tensor| x.squeeze(0).unwrap().transpose(0, 1).unwrap().contiguous().unwrap();
    let z = golden["z"].transpose(0, 1).unwrap().contiguous().unwrap().unsqueeze(0).unwrap();
    let desk = Desk::with([("latents", &z.to_device(&Device::Cpu).unwrap())]);
    let file = fixture("taehv/tiny22.safetensors");
    for (more, name) in [(&[][..], "decoded"), (&["--latent-rate"], "decoded_no_time_upscale")] {
        let video =
            desk.probe(&[&["tiny-decode", "--file", text(&file)], more].concat()).remove("video").unwrap();
        let frames = tchw(&video).affine(0.5, 0.5).unwrap();
        assert_close(name, &frames, &golden[name].to_device(&Device::Cpu).unwrap(), TRAJECTORY);
    }
}

#[test]
fn dit_gives_the_golden_output_from_both_layouts_and_in_stages() {
    let io = fixture_tensors("dit/t2v/io.safetensors");
    let desk = Desk::with(["input", "timestep", "context"].map(|name| (name, &io[name])));
    let folder = fixture("dit/t2v");
    let mut outputs = Vec::new();
    for layout in ["official", "diffusers"] {
        let weights = folder.join(format!("weights_{layout}.safetensors"));
        let config = folder.join(format!("config_{layout}.json"));
        for stages in ["cpu", "cpu,cpu"] {
            let words = ["dit", "--model", text(&weights), "--config", text(&config), "--stages", stages];
            let output = desk.probe(&words).remove("output").unwrap();
            assert_close(&format!("{layout}, {stages}"), &output, &io["output"], DIT);
            outputs.push(output);
        }
    }
    outputs.iter().for_each(|output| assert_same_bits("layouts and stages", output, &outputs[0]));
}

/// Of the other kinds of model: more channels in than out, CLIP's states, a timestep for each token.
#[test]
fn dit_takes_pictures() {
    for kind in DIT_KINDS {
        let io = fixture_tensors(&format!("dit/{kind}/io.safetensors"));
        let names =
            ["input", "timestep", "context", "clip_fea"].into_iter().filter(|name| io.contains_key(*name));
        let desk = Desk::with(names.map(|name| (name, &io[name])));
        let folder = fixture(&format!("dit/{kind}"));
        let (weights, config) =
            (folder.join("weights_diffusers.safetensors"), folder.join("config_diffusers.json"));
        let words = ["dit", "--model", text(&weights), "--config", text(&config), "--stages", "cpu,cpu"];
        assert_close(kind, &desk.probe(&words)["output"], &io["output"], DIT);
    }
    let io = fixture_tensors("dit/i2v21/io.safetensors");
    let desk = Desk::with(["input", "timestep", "context"].map(|name| (name, &io[name])));
    let (input, output) = (desk.path("in.safetensors"), desk.path("out.safetensors"));
    let model = fixture("repo_diffusers_i2v21/transformer");
    let words = ["dit", "--model", text(&model), "--input", text(&input), "--output", text(&output)];
    let error = run(&words).unwrap_err().to_string();
    assert!(error.contains("reads CLIP's states of a picture (clip_fea) and was given none"), "{error}");
}

#[test]
fn clip_gives_the_golden_states() {
    let io = fixture_tensors("clip/io.safetensors");
    for naming in ["official", "hf"] {
        let (weights, config) =
            (fixture(&format!("clip/weights_{naming}.safetensors")), fixture("clip/config.json"));
        let words = ["clip", "--model", text(&weights), "--config", text(&config)];
        let got = Desk::with([("image_u8_hwc", &io["image_u8_hwc"])]).probe(&words);
        assert_close(naming, &got["clip_fea"], &io["official_style.clip_fea"], CLIP);
        let got = Desk::with([("pixels", &io["pixels_hf_processor"])]).probe(&words);
        assert_close(naming, &got["clip_fea"], &io["hf_processor.clip_fea"], CLIP);
    }
    // A checkpoint folder has its tower in a folder of its own, and its config gives the heads.
    let model = fixture("repo_diffusers_i2v21");
    let got = Desk::with([("image_u8_hwc", &io["image_u8_hwc"])]).probe(&["clip", "--model", text(&model)]);
    assert_eq!(got["clip_fea"].dims(), [1, 257, 20]);
}

#[test]
fn the_vae_of_the_second_generation_is_probed_too() {
    let io = fixture_tensors("vae22/io.safetensors");
    let desk = Desk::with([("video", &io["video_9"]), ("latents", &io["latents_9"])]);
    let model = fixture("vae22/weights_official.safetensors");
    assert_close(
        "latents",
        &desk.probe(&["vae-encode", "--model", text(&model)])["latents"],
        &io["latents_9"],
        VAE,
    );
    assert_close(
        "video",
        &desk.probe(&["vae-decode", "--model", text(&model)])["video"],
        &io["recon_9"],
        VAE,
    );
}

#[test]
fn dit_takes_a_timestep_for_each_token_and_whole_numbers() {
    let io = fixture_tensors("dit/t2v/io.safetensors");
    let per_token = io["timestep"].reshape((1, 1)).unwrap().broadcast_as((1, 36)).unwrap();
    let whole = per_token.contiguous().unwrap().to_dtype(DType::I64).unwrap();
    let desk = Desk::with([("input", &io["input"]), ("timestep", &whole), ("context", &io["context"])]);
    let folder = fixture("dit/t2v");
    let (weights, config) =
        (folder.join("weights_official.safetensors"), folder.join("config_official.json"));
    let output =
        desk.probe(&["dit", "--model", text(&weights), "--config", text(&config), "--device", "cpu"]);
    assert_close("output", &output["output"], &io["output"], DIT);
}

#[test]
fn the_two_layouts_of_a_repository_are_one_model() {
    let x = |name: &str, shape: &[usize]| proofs::randn(name, shape);
    let (input, context) = (x("input", &[2, 16, 2, 4, 6]), x("context", &[2, 9, 24]));
    let timestep = Tensor::new(&[700f32, 20.0], &Device::Cpu).unwrap();
    let desk = Desk::with([("input", &input), ("timestep", &timestep), ("context", &context)]);
    let outputs = ["repo_official_a14b/high_noise_model", "repo_diffusers_a14b/transformer"]
        .map(|folder| desk.probe(&["dit", "--model", text(&fixture(folder))]).remove("output").unwrap());
    assert_same_bits("official and diffusers", &outputs[0], &outputs[1]);
}

#[test]
fn vae_gives_the_golden_latents_and_pixels() {
    let io = fixture_tensors("vae21/io.safetensors");
    let model = fixture("repo_diffusers_a14b");
    let (official, config) = (fixture("repo_official_a14b/Wan2.1_VAE.pth"), fixture("vae21/config.json"));
    for frames in [1, 5, 9, 17] {
        let desk = Desk::with([
            ("video", &io[&format!("video_{frames}")]),
            ("latents", &io[&format!("latents_{frames}")]),
        ]);
        let words = ["vae-encode", "--model", text(&official), "--config", text(&config)];
        assert_close("latents", &desk.probe(&words)["latents"], &io[&format!("latents_{frames}")], VAE);
        let words = ["vae-decode", "--model", text(&model)];
        assert_close("video", &desk.probe(&words)["video"], &io[&format!("recon_{frames}")], VAE);
    }
}

#[test]
fn tiled_vae_gives_the_golden_tiles() {
    let golden = fixture_tensors("vae21/tiled.safetensors");
    let desk = Desk::with([("video", &golden["video"]), ("latents", &golden["z"])]);
    let model = fixture("repo_diffusers_a14b/vae");
    let tiles = ["--model", text(&model), "--tiled", "--tile", "48", "--stride", "32"];
    let probe = |part: &'static str| desk.probe(&[&[part][..], &tiles].concat());
    assert_close("video", &probe("vae-decode")["video"], &golden["decoded_tiled"], TILED);

    // The fixture holds raw means; the probe gives them centred and scaled.
    let config = fixture_json("vae21/config.json");
    let column = |key: &str| -> Tensor {
        let values: Vec<f32> =
            config[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
        Tensor::new(values.as_slice(), &device()).unwrap().reshape((1, values.len(), 1, 1, 1)).unwrap()
    };
    let centred = golden["mean_tiled"].broadcast_sub(&column("latents_mean")).unwrap();
    let scaled = centred.broadcast_div(&column("latents_std")).unwrap();
    assert_close("latents", &probe("vae-encode")["latents"], &scaled, TILED);
}

#[test]
fn text_gives_the_golden_tokens_and_states() {
    let (io, folder) = (fixture_tensors("umt5/io.safetensors"), tempfile::tempdir().unwrap());
    let output = folder.path().join("out.safetensors");
    let (tokenizer, prompts) = (fixture("tokenizer"), fixture("umt5/prompts.json"));
    let lengths: Vec<i64> = io["prompt.lens"].to_vec1().unwrap();
    for weights in ["umt5/weights_official.safetensors", "umt5/weights_hf.safetensors"] {
        let weights = fixture(weights);
        let files = ["--prompts", text(&prompts), "--tokenizer", text(&tokenizer), "--output", text(&output)];
        run(&[&["text", "--model", text(&weights)][..], &files].concat()).unwrap();
        let got = kernels::safetensors::load(&output, &Device::Cpu).unwrap();
        assert_eq!(got.len(), 2 * lengths.len());
        for (n, &length) in lengths.iter().enumerate() {
            let real = |name: &str| io[name].get(n).unwrap().narrow(0, 0, length as usize).unwrap();
            let ids: Vec<i64> = got[&format!("ids.{n}")].to_vec1().unwrap();
            assert_eq!(ids, real("prompt.ids").to_vec1::<i64>().unwrap());
            assert_close("states", &got[&format!("context.{n}")], &real("prompt.embeds"), TEXT);
        }
    }
    // A checkpoint folder brings its own tokenizer.
    let (repo, output) = (fixture("repo_official_a14b"), text(&output));
    run(&["text", "--model", text(&repo), "--prompts", text(&prompts), "--output", output]).unwrap();
}

#[test]
fn solver_gives_the_golden_trajectories() {
    let runs = [
        ("unipc_official", "unipc", "official"),
        ("unipc_diffusers", "unipc", "diffusers"),
        ("euler", "euler", "official"),
        ("dpmpp2m", "dpmpp2m", "diffusers"),
    ];
    for (shift, steps) in [("3", "10"), ("8", "20")] {
        let golden = fixture_tensors(&format!("schedulers/shift{shift}_n{steps}.safetensors"));
        let desk = Desk::with([("x", &golden["x_init"]), ("c", &golden["c"])]);
        for (name, kind, convention) in runs {
            let grid = ["--steps", steps, "--shift", shift, "--convention", convention];
            let got = desk.probe(&[&["solver", "--kind", kind][..], &grid].concat());
            assert_close(name, &got["x"], &golden[&format!("{name}.x")], TRAJECTORY);
            assert_close(name, &got["sigmas"], &golden[&format!("{name}.sigmas")], Tolerance::absolute(1e-6));
            let expected = golden[&format!("{name}.timesteps")].to_dtype(DType::F32).unwrap();
            assert_same_bits(name, &got["timesteps"], &expected);
        }
    }
}

/// The inputs of the golden LoRA training by PEFT, under the names of the probe.
fn golden_training(kind: &str) -> (HashMap<String, Tensor>, serde_json::Value) {
    let io = fixture_tensors(&format!("dit/{kind}/io.safetensors"));
    let golden = fixture_tensors(&format!("dit/{kind}/lora_train.safetensors"));
    let plan = fixture_json(&format!("dit/{kind}/lora_train.json"));
    let mut tensors: HashMap<String, Tensor> =
        ["x0", "noise", "context"].map(|name| (name.to_owned(), io[name].clone())).into();
    let sigmas: Vec<f32> =
        plan["sigmas"].as_array().unwrap().iter().map(|s| s.as_f64().unwrap() as f32).collect();
    tensors.insert("sigmas".into(), Tensor::new(sigmas.as_slice(), &Device::Cpu).unwrap());
    for name in ["cond", "clip_fea"] {
        tensors.extend(io.get(name).map(|tensor| (name.to_owned(), tensor.clone())));
    }
    if kind == "ti2v" {
        // A frame of 6 tokens that stays clean, and does not count.
        let times: Vec<f32> =
            sigmas.iter().flat_map(|s| (0..18).map(move |l| if l < 6 { 0.0 } else { s * 1000.0 })).collect();
        let times = Tensor::from_vec(times, (sigmas.len(), 1, 18), &Device::Cpu).unwrap();
        let mask = Tensor::new(&[0f32, 1.0, 1.0], &Device::Cpu).unwrap().reshape((1, 1, 3, 1, 1)).unwrap();
        tensors.extend([("timesteps".to_owned(), times), ("loss_weight_mask".to_owned(), mask)]);
    }
    for (name, tensor) in golden {
        let known = ["init.", "grad0.", "final."].into_iter().find_map(|p| Some((p, name.strip_prefix(p)?)));
        if let Some((prefix, rest)) = known {
            let (module, factor) = rest.split_at(rest.find(".lora_").unwrap());
            let module = names::module_from_diffusers(module).unwrap();
            tensors.insert(format!("{prefix}{module}{factor}"), tensor);
        }
    }
    (tensors, plan)
}

#[test]
fn train_gives_the_golden_losses_gradients_and_factors() {
    DIT_KINDS.into_iter().for_each(train_gives_golden_values);
}

fn train_gives_golden_values(kind: &str) {
    let (tensors, plan) = golden_training(kind);
    let is_input = |name: &str| !name.starts_with("grad0.") && !name.starts_with("final.");
    let desk = Desk::with(tensors.iter().map(|(n, t)| (n.as_str(), t)).filter(|(n, _)| is_input(n)));
    // The fixture's own settings, with all that they say besides.
    let mut settings = plan.as_object().unwrap().clone();
    let settings_file = desk.path("train.json");
    std::fs::write(&settings_file, serde_json::to_vec(&settings).unwrap()).unwrap();
    let folder = fixture(&format!("dit/{kind}"));
    let (weights, config) =
        (folder.join("weights_official.safetensors"), folder.join("config_official.json"));
    let words = ["train", "--model", text(&weights), "--config", text(&config), "--train-config"];
    for stages in ["cpu", "cpu,cpu"] {
        let got = desk.probe(&[&words[..], &[text(&settings_file), "--stages", stages]].concat());
        let numbers = |key: &str| -> Vec<f64> {
            plan[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
        };
        let expected = |key: &str| Tensor::new(numbers(key), &Device::Cpu).unwrap();
        assert_close("losses", &got["losses"], &expected("losses"), Tolerance::absolute(1e-4));
        assert_close("norms", &got["grad_norms"], &expected("grad_norms"), Tolerance::relative(1e-3));
        for (name, expected) in tensors.iter().filter(|(name, _)| !is_input(name)) {
            let tolerance = match name.starts_with("grad0.") {
                true => Tolerance { absolute: 1e-12, relative: 1e-3 },
                false => TRAINED,
            };
            assert_close(name, &got[name], expected, tolerance);
        }
        let tensors_of = |prefix: &str| got.keys().filter(|name| name.starts_with(prefix)).count();
        let starts = tensors.keys().filter(|name| name.starts_with("init.")).count();
        assert_eq!((tensors_of("grad0."), tensors_of("final.")), (starts, starts));
    }

    settings.remove("lr");
    std::fs::write(&settings_file, serde_json::to_vec(&settings).unwrap()).unwrap();
    let (input, output) = (desk.path("in.safetensors"), desk.path("none.safetensors"));
    let files = [text(&settings_file), "--input", text(&input), "--output", text(&output)];
    let error = run(&[&words[..], &files].concat()).unwrap_err();
    assert!(error.to_string().contains("missing field `lr`"), "{error}");
    assert!(!output.exists());
}

#[test]
fn a_batch_with_a_mask_and_its_own_sigmas_is_the_mean_over_what_counts() {
    let (mut tensors, _) = golden_training("t2v");
    let twice = |t: &Tensor, dim: usize| Tensor::cat(&[t, &(t * 0.5).unwrap()], dim).unwrap();
    let (x0, noise, context) =
        (twice(&tensors["x0"], 0), twice(&tensors["noise"], 1), twice(&tensors["context"], 0));
    let one = |name: &str, t: Tensor| (name.to_owned(), t);
    tensors.retain(|name, _| name.starts_with("init."));
    let settings = br#"{"rank": 4, "alpha": 8, "lr": 0.01}"#;
    let folder = fixture("dit/t2v");
    let (weights, config) =
        (folder.join("weights_official.safetensors"), folder.join("config_official.json"));
    let loss = |given: Vec<(String, Tensor)>| -> f64 {
        let all =
            tensors.iter().map(|(n, t)| (n.as_str(), t)).chain(given.iter().map(|(n, t)| (n.as_str(), t)));
        let desk = Desk::with(all);
        std::fs::write(desk.path("train.json"), settings).unwrap();
        let words = ["train", "--model", text(&weights), "--config", text(&config), "--train-config"];
        let got = desk.probe(&[&words[..], &[text(&desk.path("train.json"))]].concat());
        f64::from(got["losses"].to_vec1::<f32>().unwrap()[0])
    };
    // Only the first step of each: the mask leaves the first latent frame out.
    let mask = Tensor::new(&[0f32, 1.0, 1.0], &Device::Cpu).unwrap().reshape((1, 1, 3, 1, 1)).unwrap();
    let first = |t: &Tensor| t.narrow(0, 0, 1).unwrap();
    let both = loss(vec![
        one("x0", x0.clone()),
        one("noise", first(&noise)),
        one("context", context.clone()),
        one("sigmas", Tensor::new(&[[0.9f32, 0.3]], &Device::Cpu).unwrap()),
        one("loss_weight_mask", mask.clone()),
    ]);
    let alone: Vec<f64> = [0.9f32, 0.3]
        .into_iter()
        .enumerate()
        .map(|(i, sigma)| {
            loss(vec![
                one("x0", x0.narrow(0, i, 1).unwrap()),
                one("noise", first(&noise).narrow(1, i, 1).unwrap()),
                one("context", context.narrow(0, i, 1).unwrap()),
                one("sigmas", Tensor::new(&[sigma], &Device::Cpu).unwrap()),
                one("loss_weight_mask", mask.clone()),
            ])
        })
        .collect();
    let mean = (alone[0] + alone[1]) / 2.0;
    assert!((both / mean - 1.0).abs() < 1e-5, "{both} against {mean}: f32 sums in another order");
}

#[test]
fn what_is_missing_is_named_with_what_is_there() {
    let x = proofs::randn("x", (1, 16, 1, 4, 4));
    let desk = Desk::with([("latent", &x)]);
    let (input, output) = (desk.path("in.safetensors"), desk.path("out.safetensors"));
    let model = fixture("repo_official_a14b/high_noise_model");
    let files = ["--model", text(&model), "--input", text(&input), "--output", text(&output)];
    let error = run(&[&["dit"][..], &files].concat()).unwrap_err().to_string();
    assert!(error.contains("there is no tensor `input`; the file has latent"), "{error}");
    let both = fixture("repo_official_a14b");
    let error = run(&["dit", "--model", text(&both), "--input", text(&input), "--output", "x"]).unwrap_err();
    assert!(error.to_string().contains("has two experts"), "{error}");
}
