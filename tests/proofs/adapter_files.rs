//! Adapter files are the same adapter in every style, are what other programs write and read, and are refused if damaged.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use kernels::{DType, Tensor, loha, lokr};
use models::adapter::files::{
    AdapterFile, AdapterFileError, KeyStyle, LoraPair, Precision, Provenance, Style, locate, read, summary,
    verify_written, write,
};
use models::adapter::{Change, DoraPair, Magnitude};
use models::weights::Checkpoint;
use models::{Error, names};
use proofs::{Tolerance, assert_close, assert_same_bits, device, fixture, fixture_tensors, randn};

/// The golden merged weights were added in float64: one float32 rounding of values near 1.
const MERGED: Tolerance = Tolerance::absolute(1e-6);
/// diffusers' converters move powers of two between the factors; products of rank 4 then agree to rounding.
const DELTA: Tolerance = Tolerance::relative(1e-6);

/// The adapter that the golden files were made from: rank 4, alpha 8.
fn trained() -> AdapterFile {
    let mut modules = BTreeMap::new();
    let finals = fixture_tensors("dit/t2v/lora_train.safetensors");
    for (key, a) in &finals {
        let Some(name) = key.strip_prefix("final.").and_then(|k| k.strip_suffix(".lora_A.weight")) else {
            continue;
        };
        let module = names::module_from_diffusers(name).unwrap();
        let b = finals[&key.replace("lora_A", "lora_B")].clone();
        modules.insert(module, LoraPair { a: a.clone(), b, alpha: Some(8.0) }.into());
    }
    assert_eq!(modules.len(), 20);
    AdapterFile { modules, ..AdapterFile::default() }
}

fn assert_same_deltas(what: &str, got: &AdapterFile, expected: &AdapterFile) {
    assert!(got.modules.keys().eq(expected.modules.keys()), "{what}: other modules");
    for module in expected.modules.keys() {
        let delta = |file: &AdapterFile| file.modules[module].delta().unwrap().unwrap();
        assert_close(&format!("{what}: {module}"), &delta(got), &delta(expected), DELTA);
    }
}

#[test]
fn every_golden_style_reads_as_the_same_adapter() {
    let trained = trained();
    for (name, style, folded) in [
        ("peft_diffusers", KeyStyle::Diffusers, false),
        ("peft_diffusers_folded", KeyStyle::Diffusers, true),
        ("kohya", KeyStyle::Kohya, false),
        ("comfy_ab", KeyStyle::Native, true),
        ("comfy_updown_alpha", KeyStyle::Native, false),
    ] {
        let file = read(&fixture(&format!("lora/t2v/{name}.safetensors"))).unwrap();
        assert_eq!(file.style, Some(style), "{name}");
        assert_same_deltas(name, &file, &trained);
        for (module, pair) in &file.modules {
            let (pair, expected) = (pair.pair().unwrap(), trained.modules[module].pair().unwrap());
            let b = if folded { (&expected.b * 2.0).unwrap() } else { expected.b.clone() };
            assert_same_bits(&format!("{name}: A of {module}"), &pair.a, &expected.a);
            assert_same_bits(&format!("{name}: B of {module}"), &pair.b, &b);
        }
    }
    for name in ["kohya", "comfy_ab", "comfy_updown_alpha"] {
        let file = read(&fixture(&format!("lora/t2v/{name}_as_converted_by_diffusers.safetensors"))).unwrap();
        assert_same_deltas(name, &file, &trained);
    }
}

#[test]
fn written_files_equal_golden_ones() {
    let folder = tempfile::tempdir().unwrap();
    for (style, golden) in
        [(Style::Comfy, "comfy_ab"), (Style::Diffusers, "peft_diffusers_folded"), (Style::Kohya, "kohya")]
    {
        let path = folder.path().join(format!("{golden}.safetensors"));
        write(&path, &trained(), style, Precision::Float32).unwrap();
        let expected = fixture_tensors(&format!("lora/t2v/{golden}.safetensors"));
        let written = kernels::safetensors::load(&path, &kernels::Device::Cpu).unwrap();
        assert_eq!(written.len(), expected.len(), "{golden}");
        for (key, tensor) in &expected {
            assert_same_bits(&format!("{golden}: {key}"), &written[key], tensor);
        }
    }
}

#[test]
fn merged_weights_equal_golden_ones() {
    let (file, base) = (
        read(&fixture("lora/t2v/kohya.safetensors")).unwrap(),
        fixture_tensors("dit/t2v/weights_diffusers.safetensors"),
    );
    for (key, expected) in fixture_tensors("lora/t2v/merged_weights_diffusers.safetensors") {
        let module = names::module_from_diffusers(key.strip_suffix(".weight").unwrap()).unwrap();
        let delta = file.modules[&module].delta().unwrap().unwrap().to_device(&device()).unwrap();
        let merged = (&base[&key] + delta).unwrap();
        assert_close(&key, &merged, &expected, MERGED);
    }
}

/// An odd scale, unequal ranks and every Linear there is: names and alpha rules must survive each style and format.
#[test]
fn any_adapter_survives_every_style_and_precision() {
    let blocks =
        ["self_attn", "cross_attn"].iter().flat_map(|a| "qkvo".chars().map(move |p| format!("{a}.{p}")));
    let local = blocks.chain(["cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2"].map(String::from));
    let global = ["time_projection.1", "time_embedding.0", "text_embedding.2", "head.head", "img_emb.proj.1"];
    let all = local.map(|m| format!("blocks.17.{m}")).chain(global.map(String::from));
    let mut adapter = AdapterFile::default();
    for (i, module) in all.enumerate() {
        let rank = 1 + i % 5;
        let (a, b) = (randn(&format!("a{i}"), (rank, 24)), randn(&format!("b{i}"), (10, rank)));
        adapter.modules.insert(module, LoraPair::new(a, b, 0.37 * (i + 1) as f64).unwrap().into());
    }
    adapter.metadata =
        Provenance { title: "odd".to_owned(), rank: 5, ..Provenance::default() }.metadata(Style::Kohya);
    let folder = tempfile::tempdir().unwrap();
    for style in Style::ALL {
        // Recipes and command lines know it by the same name.
        assert_eq!(serde_json::to_value(style).unwrap(), style.name());
        for precision in [Precision::Float32, Precision::Bfloat16, Precision::Float16] {
            let path = folder.path().join("adapter");
            let written = write(&path, &adapter, style, precision).unwrap();
            assert_eq!(written.largest_error == 0.0, style.has_alpha() && precision == Precision::Float32);
            let file = locate(&path).unwrap();
            assert_eq!(written.bytes, std::fs::metadata(&file).unwrap().len());
            let back = read(&path).unwrap();
            assert_eq!(back.metadata["modelspec.title"], "odd");
            assert_eq!(back.metadata.contains_key("sshs_model_hash"), style.is_kohya());
            for (module, change) in &adapter.modules {
                let meant = change.pair().unwrap().rank();
                assert_eq!(back.modules[module].rank(), Some(meant), "{style:?}: rank of {module}");
            }
            let left = std::fs::read_dir(folder.path()).unwrap().count();
            assert_eq!(left, 1, "nothing but the file itself stays behind");
            if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) }.unwrap();
        }
    }
}

/// The check after writing must see another scale, not only count modules.
#[test]
fn verification_notices_one_wrong_scale() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.safetensors");
    let mut adapter = trained();
    write(&path, &adapter, Style::Comfy, Precision::Float32).unwrap();
    let pair = adapter.modules["blocks.1.ffn.2"].pair().unwrap().clone();
    adapter.modules.insert("blocks.1.ffn.2".to_owned(), LoraPair { alpha: Some(8.001), ..pair }.into());
    let text = verify_written(&path, &adapter, Precision::Float32).unwrap_err().to_string();
    assert!(text.contains("blocks.1.ffn.2"), "{text}");
    verify_written(&path, &adapter, Precision::Bfloat16).unwrap();
}

/// The tensors of the file at `path`, to be written again with one of them changed.
fn stored(path: &Path) -> HashMap<String, Tensor> {
    kernels::safetensors::load(path, &kernels::Device::Cpu).unwrap()
}

/// `tensor` with its middle number times `factor`.
fn bent(tensor: &Tensor, factor: f32) -> Tensor {
    let mut numbers: Vec<f32> =
        tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    let middle = numbers.len() / 2;
    numbers[middle] *= factor;
    let bent = Tensor::from_vec(numbers, tensor.shape(), tensor.device()).unwrap();
    bent.to_dtype(tensor.dtype()).unwrap()
}

/// The check after writing sees one number of any one factor, or of alpha, that is off by more than rounding, in every
/// style and number format, and modules whose names were swapped.
#[test]
fn verification_notices_one_wrong_number_of_any_factor() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.safetensors");
    let mut adapter = trained();
    adapter.modules.retain(|module, _| module.starts_with("blocks.1.self_attn"));
    let (thin, square) = (|i| randn(&format!("thin{i}"), (32, 3)), randn("square", (4, 4)));
    let low = |i| thin(i).t().unwrap().contiguous().unwrap();
    let loha = loha::Factors { w1_a: thin(0), w1_b: low(1), w2_a: thin(2), w2_b: low(3), scale: 0.7 };
    let fine = lokr::Half::Low(randn("a", (8, 3)), randn("b", (3, 8)));
    let lokr = lokr::Factors { w1: lokr::Half::Full(square), w2: fine, scale: 1.3 };
    let scaled = LoraPair { a: low(4), b: thin(5), alpha: Some(2.0) };
    let dora = DoraPair { pair: scaled, magnitude: Magnitude::OfBase(randn("lengths", 32)) };
    adapter.modules.insert("blocks.0.ffn.0".to_owned(), Change::Loha(loha));
    adapter.modules.insert("blocks.0.ffn.2".to_owned(), Change::Lokr(lokr));
    adapter.modules.insert("blocks.0.cross_attn.q".to_owned(), Change::Dora(dora));
    adapter.differences.insert("blocks.0.norm3.bias".to_owned(), randn("bias", 32));
    for style in [Style::Comfy, Style::ComfyAlpha, Style::Kohya] {
        for (precision, share) in
            [(Precision::Float32, 3e-6), (Precision::Bfloat16, 0.02), (Precision::Float16, 0.003)]
        {
            write(&path, &adapter, style, precision).unwrap();
            verify_written(&path, &adapter, precision).unwrap();
            let whole = stored(&path);
            for (key, tensor) in &whole {
                let mut wrong = whole.clone();
                wrong.insert(key.clone(), bent(tensor, 1.0 + share));
                kernels::safetensors::save(&wrong, &path).unwrap();
                let refused = verify_written(&path, &adapter, precision);
                assert!(refused.is_err(), "{style:?}, {precision:?}: {key} is wrong and nobody notices");
            }
            let mut swapped = whole.clone();
            for (key, tensor) in &whole {
                let partner =
                    key.replace("self_attn.q.", "self_attn.k.").replace("self_attn_q.", "self_attn_k.");
                if partner != *key {
                    swapped.insert(key.clone(), whole[&partner].clone());
                    swapped.insert(partner, tensor.clone());
                }
            }
            kernels::safetensors::save(&swapped, &path).unwrap();
            let text = verify_written(&path, &adapter, precision).unwrap_err().to_string();
            assert!(text.contains("self_attn"), "{text}");
        }
    }
}

/// Writes `tensors` as a file and returns the error of reading it.
fn refusal(folder: &Path, tensors: &[(&str, Tensor)]) -> Error {
    let path = folder.join("broken.safetensors");
    let tensors: HashMap<&str, Tensor> = tensors.iter().cloned().collect();
    kernels::safetensors::save(&tensors, &path).unwrap();
    read(&path).unwrap_err()
}

/// Half an adapter and two ranks are reported from the header alone, in the same words.
fn check_header(folder: &Path, error: &Error) {
    use AdapterFileError::{HalfPair, RankMismatch};
    if matches!(error, Error::AdapterFile(HalfPair { .. } | RankMismatch { .. })) {
        let path = folder.join("broken.safetensors");
        let by_header = summary(&path, &Checkpoint::open(&path).unwrap()).unwrap_err();
        assert_eq!(by_header.to_string(), error.to_string());
    }
}

/// Tensors of a damaged file, the kind of error it must give, and what the message must name.
type Case<'a> = (Vec<(&'a str, Tensor)>, fn(&AdapterFileError) -> bool, &'a str);

#[test]
fn broken_files_are_refused_by_the_key_that_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (randn("a", (2, 6)), randn("b", (5, 2)));
    let stem = "diffusion_model.blocks.0.ffn.0";
    let (down, up, alpha) =
        (format!("{stem}.lora_A.weight"), format!("{stem}.lora_B.weight"), format!("{stem}.alpha"));
    let scalar = |v: f32| Tensor::new(v, a.device()).unwrap();
    let whole = || vec![(down.as_str(), a.clone()), (up.as_str(), b.clone())];
    let with = |key: &'static str, tensor: Tensor| {
        let mut tensors = whole();
        tensors.push((key, tensor));
        tensors
    };
    let thin = randn("thin", (6, 2));
    let cases: Vec<Case> = vec![
        (
            ["blocks.0.ffn.0.hada_w1_a", "blocks.0.ffn.0.hada_w1_b", "blocks.0.ffn.0.hada_w2_a"]
                .map(|key| (key, thin.clone()))
                .to_vec(),
            |e| matches!(e, AdapterFileError::HalfPair { .. }),
            "no hada_w2_b",
        ),
        (
            vec![("blocks.0.ffn.0.lokr_w1", thin.clone())],
            |e| matches!(e, AdapterFileError::HalfPair { .. }),
            "no lokr_w2",
        ),
        (whole()[..1].to_vec(), |e| matches!(e, AdapterFileError::HalfPair { .. }), "up factor"),
        (vec![(&alpha, scalar(2.0))], |e| matches!(e, AdapterFileError::HalfPair { .. }), &alpha),
        (
            vec![(&down, a.clone()), (&up, randn("b3", (5, 3)))],
            |e| matches!(e, AdapterFileError::RankMismatch { .. }),
            "[5, 3]",
        ),
        (
            vec![(&down, randn("conv", (2, 6, 1, 2, 2))), (&up, b.clone())],
            |e| matches!(e, AdapterFileError::NotAMatrix { .. }),
            &down,
        ),
        (
            [whole(), vec![(&alpha, scalar(0.0))]].concat(),
            |e| matches!(e, AdapterFileError::Alpha { .. }),
            &alpha,
        ),
        (
            with("diffusion_model.blocks.0.ffn.1.lora_A.weight", a.clone()),
            |e| matches!(e, AdapterFileError::UnknownKeys { .. }),
            "blocks.0.ffn.1.lora_A",
        ),
        (
            with("diffusion_model.blocks.0.ffn.0.dora_scale", a.clone()),
            |e| matches!(e, AdapterFileError::NotLengths { .. }),
            "ffn.0.dora_scale",
        ),
        (
            with("transformer.blocks.0.ffn.net.0.proj.lora_A.weight", a.clone()),
            |e| matches!(e, AdapterFileError::Duplicate { .. }),
            "blocks.0.ffn.0",
        ),
        (
            vec![("blocks.0.ffn.0.weight", a.clone())],
            |e| matches!(e, AdapterFileError::NotAnAdapter { .. }),
            "not an adapter",
        ),
    ];
    for (tensors, is_expected, names) in cases {
        let error = refusal(folder.path(), &tensors);
        let text = error.to_string();
        assert!(matches!(&error, Error::AdapterFile(e) if is_expected(e)), "{text}");
        assert!(text.contains(names) && text.contains("broken.safetensors"), "{text} does not name {names}");
        check_header(folder.path(), &error);
    }
    let nan = refusal(folder.path(), &[(&down, (&a * f64::NAN).unwrap()), (&up, b.clone())]).to_string();
    assert!(nan.contains(&down), "{nan}");
}

/// An export that a number format cannot hold must leave the earlier file as it was.
#[test]
fn a_refused_export_keeps_the_file_that_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.safetensors");
    let mut adapter = trained();
    write(&path, &adapter, Style::Kohya, Precision::Bfloat16).unwrap();
    let before = std::fs::read(&path).unwrap();
    let pair = adapter.modules["blocks.0.ffn.0"].pair().unwrap().clone();
    let b = (&pair.b.ones_like().unwrap() * 1e6).unwrap().to_dtype(DType::F32).unwrap();
    adapter.modules.insert("blocks.0.ffn.0".to_owned(), LoraPair { b, ..pair }.into());
    let error = write(&path, &adapter, Style::Kohya, Precision::Float16).unwrap_err().to_string();
    assert!(error.contains("blocks.0.ffn.0") && error.contains("float16"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// PEFT's own file has its alpha in a separate file; rsLoRA divides by the square root of the rank.
#[test]
fn peft_settings_beside_the_file_are_honoured() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter_model.safetensors");
    let mut tensors = HashMap::new();
    for (module, i) in [("attn1.to_q", 0), ("attn2.add_k_proj", 1)] {
        let stem = format!("base_model.model.blocks.3.{module}");
        tensors.insert(format!("{stem}.lora_A.weight"), randn(&format!("a{i}"), (4, 6)));
        tensors.insert(format!("{stem}.lora_B.weight"), randn(&format!("b{i}"), (6, 4)));
    }
    kernels::safetensors::save(&tensors, &path).unwrap();
    let config = r#"{"r": 4, "lora_alpha": 6, "use_rslora": true, "alpha_pattern": {"add_k_proj": 10}}"#;
    std::fs::write(folder.path().join("adapter_config.json"), config).unwrap();
    let file = read(&path).unwrap();
    assert_eq!(file.style, Some(KeyStyle::Peft));
    let scale = |file: &AdapterFile, module: &str| file.modules[module].pair().unwrap().scale();
    assert_eq!(scale(&file, "blocks.3.self_attn.q"), 3.0);
    assert_eq!(scale(&file, "blocks.3.cross_attn.k_img"), 5.0);
    assert_eq!(scale(&read(folder.path()).unwrap(), "blocks.3.self_attn.q"), 3.0, "the folder itself");

    let other = r#"{"r": 8, "lora_alpha": 6, "rank_pattern": {"add_k_proj": 4}}"#;
    std::fs::write(folder.path().join("adapter_config.json"), other).unwrap();
    let refused = read(folder.path()).unwrap_err().to_string();
    assert!(refused.contains("rank 8") && refused.contains("blocks.3.attn1.to_q"), "{refused}");
}
