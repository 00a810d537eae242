//! Which files a base model is made of: folders of both layouts, single files in any mix, one expert or two.

use std::fs;
use std::path::Path;

use kernels::weight::Format;
use kernels::{DType, Device, Tensor};
use models::expert::Expert;
use models::published::{Facts, Published};
use models::weights::{Checkpoint, Storage, TensorSpec, Weights, write_safetensors};
use proofs::fixture;
use trainer::base::{BaseModel, Dits, ModelConfig, Trained, locate_dits};
use trainer::machine::precision::{Processor, WeightFormat};
use trainer::tools::inspect::inspect;

fn settle(config: &ModelConfig) -> trainer::Result<BaseModel> {
    config.settle(Path::new(""), Processor::Cpu)
}

fn folder(name: &str) -> ModelConfig {
    ModelConfig { folder: Some(fixture(name)), ..ModelConfig::default() }
}

/// The tensors of a checkpoint as `dtype`, each name prefixed with `prefix`, with `more`, in a new file.
fn repack(from: &Path, to: &Path, dtype: DType, prefix: &str, more: &[(&str, &Tensor)]) {
    let from = Checkpoint::open(from).unwrap();
    let tensor = |name: &str| from.tensor(name, dtype, &Device::Cpu).unwrap();
    let tensors: Vec<(String, Tensor)> = from.names().map(|n| (format!("{prefix}{n}"), tensor(n))).collect();
    let named = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
    write_safetensors(to, named.chain(more.iter().copied()), &Default::default()).unwrap();
}

#[test]
fn both_experts_are_found_in_both_layouts_and_one_is_chosen() {
    for (name, high, low) in [
        ("repo_official_a14b", "high_noise_model", "low_noise_model"),
        ("repo_diffusers_a14b", "transformer", "transformer_2"),
    ] {
        let model = settle(&folder(name)).unwrap();
        for (expert, place) in [(Expert::High, high), (Expert::Low, low)] {
            assert_eq!(model.dits.of(expert).weights, fixture(name).join(place));
            let chosen = settle(&ModelConfig { expert: Some(expert.into()), ..folder(name) }).unwrap();
            assert_eq!(chosen.trained_dit().unwrap(), model.dits.of(expert));
            chosen.open_dit().unwrap();
        }
        let error = model.open_dit().unwrap_err().to_string();
        for told in ["has two experts", "model.expert", high, low] {
            assert!(error.contains(told), "{error}");
        }
        let Dits::Experts { high, low } = locate_dits(&fixture(name)).unwrap() else {
            panic!("one DiT in {name}")
        };
        assert_ne!(
            high.open().unwrap().1.fingerprint().unwrap(),
            low.open().unwrap().1.fingerprint().unwrap()
        );
    }
}

#[test]
fn an_expert_is_told_by_key_or_name_and_a_contradiction_is_refused() {
    let [high, low] = ["high_noise_model", "low_noise_model"].map(|n| fixture("repo_official_a14b").join(n));
    let named = |high: Option<&Path>, low: Option<&Path>| ModelConfig {
        dit_high: high.map(Path::to_owned),
        dit_low: low.map(Path::to_owned),
        ..folder("repo_official_a14b")
    };
    let pair = settle(&named(Some(&high), Some(&low))).unwrap();
    assert_eq!(pair.dits.experts().map(|(h, l)| (&h.weights, &l.weights)), Some((&high, &low)));
    assert_eq!(settle(&named(Some(&high), None)).unwrap().expert, Some(Trained::High));
    let by_name = ModelConfig { dit: Some(low.clone()), ..folder("repo_official_a14b") };
    assert_eq!(settle(&by_name).unwrap().expert, Some(Trained::Low));

    let refuse = |config: ModelConfig, told: &str| {
        let error = settle(&config).unwrap_err().to_string();
        assert!(error.contains(told), "{told} not in {error}");
    };
    refuse(named(Some(&low), Some(&high)), "exchange the two files");
    refuse(
        named(Some(&low), None),
        "low_noise_model is given as the expert for high noise and for low noise",
    );
    refuse(ModelConfig { expert: Some(Trained::High), ..by_name.clone() }, "model.expert");
    refuse(ModelConfig { dit_high: Some(high), ..by_name }, "keep the one or the pair");
}

#[test]
fn names_tell_experts_only_where_they_mean_them() {
    for (name, expert) in [
        ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", Some(Expert::High)),
        ("wan2.2_i2v_low_noise_14B_fp16.safetensors", Some(Expert::Low)),
        ("Wan22-I2V-A14B-LOW", Some(Expert::Low)),
        ("HighNoise", Some(Expert::High)),
        ("high_noise_model", Some(Expert::High)),
        ("wan2.1_t2v_14B_high_quality", None),
        ("transformer", None),
        ("highland_low_poly", None),
        ("wan2.2_high_and_low", None),
    ] {
        assert_eq!(Expert::in_name(name), expert, "{name}");
    }
}

/// ComfyUI's single files: a DiT in fp8 with a prefix, a 16-bit VAE, a text encoder with an embedded tokenizer.
#[test]
fn single_files_make_a_model_together() {
    let desk = tempfile::tempdir().unwrap();
    let at = |name: &str| desk.path().join(name);
    fs::copy(fixture("fp8/comfy_quant_new.safetensors"), at("wan2.2_t2v_low_noise.safetensors")).unwrap();
    fs::copy(fixture("dit/t2v/config_official.json"), at("config.json")).unwrap();
    repack(
        &fixture("repo_official_a14b/Wan2.1_VAE.pth"),
        &at("wan_2.1_vae.safetensors"),
        DType::F16,
        "",
        &[],
    );
    let spiece = fs::read(fixture("tokenizer/spiece.model")).unwrap();
    let spiece = Tensor::new(spiece.as_slice(), &Device::Cpu).unwrap();
    let umt5 = fixture("umt5/weights_hf.safetensors");
    repack(&umt5, &at("umt5.safetensors"), DType::F16, "", &[("spiece_model", &spiece)]);
    let config = ModelConfig {
        dit: Some(at("wan2.2_t2v_low_noise.safetensors")),
        vae: Some(at("wan_2.1_vae.safetensors")),
        text_encoder: Some(at("umt5.safetensors")),
        ..ModelConfig::default()
    };
    let model = settle(&config).unwrap();
    assert_eq!((model.expert, &model.tokenizer), (Some(Trained::Low), &at("umt5.safetensors")));
    assert_eq!(model.precision.base, WeightFormat::Fp8, "stored in fp8, so held in fp8");
    assert_eq!(model.precision.text_base, WeightFormat::F32);
    assert_eq!(model.precision.dit().frozen.storage, Storage::Quantised(Format::E4m3));
    let (dit, _) = model.open_dit().unwrap();
    model.check_encoders(&dit).unwrap();
    model.load_vae(&Device::Cpu).unwrap();
    assert!(!model.load_text_encoder(&Device::Cpu).unwrap().ids("a fox").unwrap().is_empty());
    let told = ModelConfig { base: Some(WeightFormat::Bf16), ..config.clone() };
    assert_eq!(settle(&told).unwrap().precision.base, WeightFormat::F32, "the setting takes precedence");
    let error = settle(&ModelConfig { vae: None, ..config }).unwrap_err().to_string();
    assert!(error.contains("no vae") && error.contains("model.vae"), "{error}");
}

/// For a width that no published model has, only a config gives the heads.
#[test]
fn a_single_dit_needs_no_config_unless_its_heads_are_its_own() {
    let desk = tempfile::tempdir().unwrap();
    let path = desk.path().join("dit.safetensors");
    let plain = fixture("dit/t2v/weights_official.safetensors");
    repack(&plain, &path, DType::F32, "model.diffusion_model.", &[]);
    let error = models::open_dit(&path, None).unwrap_err().to_string();
    for told in ["dit.safetensors", "width 32", "config.json", "model.dit_config"] {
        assert!(error.contains(told), "{error}");
    }
    let published = proofs::small::config(1, 256);
    let tensors = proofs::small::tensors(&published);
    let named: Vec<(String, Tensor)> =
        tensors.into_iter().map(|(n, t)| (format!("diffusion_model.{n}"), t)).collect();
    write_safetensors(&path, named.iter().map(|(n, t)| (n.as_str(), t)), &Default::default()).unwrap();
    let (config, _) = models::open_dit(&path, None).unwrap();
    assert_eq!(config, models::dit::DitConfig { text_len: 512, ..published });
}

#[test]
fn published_models_are_told_by_sizes_and_the_rest_by_names() {
    let facts = |width, channels_in, channels_out, clip_pictures| Facts {
        width,
        channels_in,
        channels_out,
        clip_pictures,
        ..Facts::default()
    };
    let t2v = facts(5120, 16, 16, 0);
    for (facts, path, told) in [
        (facts(1536, 16, 16, 0), "x", &["t2v-1.3b"][..]),
        (facts(3072, 48, 48, 0), "Wan2.1", &["ti2v-5b"]),
        (facts(5120, 36, 16, 1), "high_noise", &["i2v-14b"]),
        (facts(5120, 36, 16, 2), "x", &["flf2v-14b"]),
        (facts(1536, 36, 16, 1), "x", &["fun-inp-1.3b"]),
        (facts(5120, 36, 16, 0), "x", &["i2v-a14b"]),
        (t2v, "models/mine.safetensors", &["t2v-14b", "t2v-a14b"]),
        (t2v, "wan2.2_t2v_high_noise_14B_fp16.safetensors", &["t2v-a14b"]),
        (t2v, "Wan2.1-T2V-14B/diffusion_pytorch_model.safetensors", &["t2v-14b"]),
        (t2v, "Wan2.2-T2V-A14B-Diffusers/transformer/x.safetensors", &["t2v-a14b"]),
        // Folders further up are not the model's name.
        (t2v, "wan2.2/a/b/c/x.safetensors", &["t2v-14b", "t2v-a14b"]),
        (facts(1536, 48, 16, 1), "x", &["fun-control-1.3b"]),
        (Facts { reference: true, ..facts(1536, 48, 16, 1) }, "x", &["fun-control-v1.1-1.3b"]),
        (Facts { reference: true, ..facts(5120, 52, 16, 0) }, "x", &["fun-control-a14b"]),
        (Facts { camera: true, ..facts(5120, 32, 16, 1) }, "x", &["fun-camera-14b"]),
        (Facts { camera: true, ..facts(5120, 36, 16, 0) }, "x", &["fun-camera-a14b"]),
        (facts(3072, 100, 48, 0), "x", &["fun-inp-5b"]),
        (Facts { reference: true, ..facts(3072, 148, 48, 0) }, "x", &["fun-control-5b"]),
        (Facts { camera: true, ..facts(3072, 100, 48, 0) }, "x", &["fun-camera-5b"]),
        (Facts { side_chain: true, ..facts(1536, 16, 16, 0) }, "x", &["vace-1.3b"]),
        (Facts { side_chain: true, ..t2v }, "x", &["vace-14b", "vace-a14b"]),
        (Facts { side_chain: true, ..t2v }, "Wan2.2-VACE-Fun-A14B/x.safetensors", &["vace-a14b"]),
        // Neither a camera adapter nor reference tokens make another model of it.
        (Facts { reference: true, ..facts(5120, 16, 16, 0) }, "x", &[]),
        (facts(2048, 16, 16, 0), "x", &[]),
    ] {
        let found: Vec<&str> =
            Published::at(facts, Path::new(path)).into_iter().map(|model| model.key).collect();
        assert_eq!(found, told, "{path}");
    }
}

#[test]
fn an_expert_that_nothing_names_is_asked_for() {
    let specs = [
        TensorSpec::new("patch_embedding.weight", [5120, 36, 1, 2, 2]),
        TensorSpec::new("head.head.weight", [64, 5120]),
    ];
    let weights = Weights::seeded(specs.to_vec(), 0);
    let desk = tempfile::tempdir().unwrap();
    let dit = desk.path().join("mine.safetensors");
    std::fs::write(&dit, "").unwrap();
    let config = ModelConfig { dit: Some(dit), ..folder("repo_official_a14b") };
    let error = settle(&config).unwrap().check_expert(&weights).unwrap_err().to_string();
    for told in ["mine.safetensors", "Wan 2.2 I2V-A14B", "model.expert"] {
        assert!(error.contains(told), "{error}");
    }
    let told = ModelConfig { expert: Some(Trained::Low), ..config };
    settle(&told).unwrap().check_expert(&weights).unwrap();
    // A network for all noise levels must not be cut to those of an expert.
    let small = Weights::seeded(
        vec![
            TensorSpec::new("patch_embedding.weight", [1536, 16, 1, 2, 2]),
            TensorSpec::new("head.head.weight", [64, 1536]),
        ],
        0,
    );
    let error = settle(&told).unwrap().check_expert(&small).unwrap_err().to_string();
    for told in ["mine.safetensors", "Wan 2.1 T2V-1.3B", "model.expert"] {
        assert!(error.contains(told), "{error}");
    }
}

#[test]
fn networks_with_parts_that_are_not_here_are_refused_by_name() {
    let desk = tempfile::tempdir().unwrap();
    let path = desk.path().join("dit.safetensors");
    let config = fs::read_to_string(fixture("dit/t2v/config_official.json")).unwrap();
    let one = Tensor::new(&[1f32], &Device::Cpu).unwrap();
    for (tensor, kind) in
        [("audio_proj.norm.weight", "listens to audio"), ("music_injector.injector.0.q.weight", "WanToDance")]
    {
        let plain = fixture("dit/t2v/weights_official.safetensors");
        repack(&plain, &path, DType::F32, "", &[(tensor, &one)]);
        let error = models::open_dit(&path, Some(&config)).unwrap_err().to_string();
        assert!(error.contains("dit.safetensors") && error.contains(kind), "{error}");
        assert!(inspect(&path).unwrap().to_string().contains(kind));
    }
}

/// The report of each kind of file.
#[test]
fn inspect_tells_what_single_files_are() {
    let desk = tempfile::tempdir().unwrap();
    let packed = desk.path().join("nvfp4.safetensors");
    let text = |text: &str| Tensor::new(text.as_bytes(), &Device::Cpu).unwrap();
    let plain = fixture("dit/t2v/weights_official.safetensors");
    repack(
        &plain,
        &packed,
        DType::F32,
        "",
        &[("blocks.0.ffn.0.comfy_quant", &text(r#"{"format":"nvfp4"}"#))],
    );
    for (path, told) in [
        (
            fixture("fp8/scaled_fp8_old.safetensors"),
            &["Wan DiT", "20 weights in fp8, one scale a tensor"][..],
        ),
        (fixture("fp8/row_scaled_fp8.safetensors"), &["20 weights in fp8, one scale a row"]),
        (fixture("fp8/plain_fp8.safetensors"), &["20 weights in fp8, without scales"]),
        (packed, &["cannot be used", "`blocks.0.ffn.0` is stored as nvfp4"]),
        (fixture("repo_official_a14b/low_noise_model"), &["for low noise, by its name"]),
    ] {
        let report = inspect(&path).unwrap().to_string();
        for words in told {
            assert!(report.contains(words), "{words} not in {report}");
        }
    }
}
