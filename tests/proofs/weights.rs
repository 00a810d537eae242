//! Checkpoints: every layout is read, all differences are reported at once, no partial file is left.

use std::collections::BTreeMap;
use std::path::Path;

use kernels::{DType, Device, Tensor};
use models::names;
use models::weights::{Checkpoint, StoredDType, TensorSpec, Weights, write_atomically, write_safetensors};
use proofs::fixture;

fn write(path: &Path, tensors: &[(&str, Tensor)]) {
    write_safetensors(path, tensors.iter().map(|(n, t)| (*n, t)), &BTreeMap::new()).unwrap();
}

fn counting(n: usize, shape: &[usize]) -> Tensor {
    Tensor::arange(0f32, n as f32, &Device::Cpu).unwrap().reshape(shape).unwrap()
}

fn values(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    checkpoint.tensor(name, DType::F32, &Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn specs_of(checkpoint: &Checkpoint, to_official: impl Fn(&str) -> String) -> Vec<TensorSpec> {
    checkpoint.entries().map(|(n, e)| TensorSpec::new(to_official(n), e.shape.clone())).collect()
}

#[test]
fn official_and_diffusers_shards_hold_the_same_tensors() {
    for (official, diffusers) in [("high_noise_model", "transformer"), ("low_noise_model", "transformer_2")] {
        let official = Checkpoint::open(&fixture(&format!("repo_official_a14b/{official}"))).unwrap();
        let specs = specs_of(&official, str::to_owned);
        let path = fixture(&format!("repo_diffusers_a14b/{diffusers}"));
        let weights = Weights::open(&path, &specs, names::tensor_to_diffusers, |_| false).unwrap();
        for name in official.names() {
            let other = weights.tensor(name, DType::F32, &Device::Cpu).unwrap();
            assert_eq!(
                values(&official, name),
                other.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
                "{name}"
            );
        }
    }
}

#[test]
fn a_pth_holds_what_the_diffusers_file_holds() {
    let pth = Checkpoint::open(&fixture("repo_official_a14b/Wan2.1_VAE.pth")).unwrap();
    let safetensors = Checkpoint::open(&fixture("repo_diffusers_a14b/vae")).unwrap();
    assert_eq!(pth.names().count(), 194);
    assert_eq!(pth.total_bytes(), safetensors.total_bytes());
    assert_eq!(values(&pth, "conv2.weight"), values(&safetensors, "post_quant_conv.weight"));
    let text = Checkpoint::open(&fixture("repo_official_a14b/models_t5_umt5-xxl-enc-bf16.pth")).unwrap();
    assert_eq!(text.dtype("norm.weight"), Some(StoredDType::BF16));
}

#[test]
fn a_pth_view_is_read_through_its_strides_and_offset() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("views.pth");
    // One storage of 0..12 seen three ways: as it lies, transposed, and from its seventh element on.
    let views: &[(&str, usize, &[usize], &[usize])] =
        &[("plain", 0, &[3, 4], &[4, 1]), ("turned", 0, &[4, 3], &[1, 4]), ("tail", 6, &[2, 3], &[3, 1])];
    std::fs::write(&path, crate::weights_corrupted::pth(12, views)).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(values(&checkpoint, "plain"), (0..12).map(|v| v as f32).collect::<Vec<_>>());
    assert_eq!(values(&checkpoint, "turned"), [0., 4., 8., 1., 5., 9., 2., 6., 10., 3., 7., 11.]);
    assert_eq!(values(&checkpoint, "tail"), [6., 7., 8., 9., 10., 11.]);
    let outside: &[(&str, usize, &[usize], &[usize])] = &[("x", 7, &[2, 3], &[3, 1])];
    std::fs::write(&path, crate::weights_corrupted::pth(12, outside)).unwrap();
    assert!(Checkpoint::open(&path).unwrap_err().to_string().contains("reaches outside its storage"));
}

#[test]
fn a_mismatch_lists_missing_unexpected_and_misshapen_names_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    let mut tensors =
        vec![("diffusion_model.a", counting(4, &[2, 2])), ("diffusion_model.extra", counting(2, &[2]))];
    let more: Vec<String> = (0..30).map(|i| format!("more.{i:02}")).collect();
    tensors.extend(more.iter().map(|n| (n.as_str(), counting(1, &[1]))));
    tensors.push(("spiece_model", counting(1, &[1])));
    write(&path, &tensors);
    let specs = [TensorSpec::new("a", [4]), TensorSpec::new("b", [1])];
    let error = Weights::open(&path, &specs, |_| None, |n| n == "spiece_model").unwrap_err().to_string();
    for text in ["m.safetensors", "missing (1):\n    b", "unexpected (31):\n    extra", "and 11 more"] {
        assert!(error.contains(text), "{text} not in {error}");
    }
    assert!(error.contains("misshapen (1):\n    a: expected [4], found [2, 2]"), "{error}");
    assert!(!error.contains("spiece_model"));
}

#[test]
fn a_value_that_is_not_finite_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nan.safetensors");
    let bad = Tensor::new(&[1f32, 2., f32::NAN], &Device::Cpu).unwrap();
    let large = Tensor::new(&[1f32, 1e6], &Device::Cpu).unwrap();
    write(&path, &[("blocks.0.w", bad), ("large", large)]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let error = checkpoint.tensor("blocks.0.w", DType::F32, &Device::Cpu).unwrap_err().to_string();
    assert!(
        error.contains("nan.safetensors") && error.contains("`blocks.0.w`") && error.contains("element 2")
    );
    assert!(checkpoint.tensor("large", DType::F32, &Device::Cpu).is_ok());
    let error = checkpoint.tensor("large", DType::F16, &Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("not finite as f16"), "{error}");
}

/// Pieces are read in parallel: each must be in its place, and the first bad element is named.
#[test]
fn a_tensor_of_many_pieces_is_read_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("long.safetensors");
    let count = (1 << 20) + 7;
    let long = counting(count, &[count]); // exact in f32
    let mut bad: Vec<f32> = long.to_vec1().unwrap();
    (bad[700_000], bad[600_000]) = (f32::NAN, f32::INFINITY);
    let bad = Tensor::new(bad, &Device::Cpu).unwrap();
    write(&path, &[("long", long.clone()), ("short", long.to_dtype(DType::BF16).unwrap()), ("bad", bad)]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert!(values(&checkpoint, "long").iter().enumerate().all(|(i, v)| *v == i as f32));
    assert_eq!(
        values(&checkpoint, "short"),
        long.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap()
    );
    let error = checkpoint.tensor("bad", DType::F32, &Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("inf, element 600000"), "{error}");
}

#[test]
fn every_float_type_is_read_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("types.safetensors");
    let exact = Tensor::new(&[0f32, -0.5, 1.75, 448.0, 0.015625], &Device::Cpu).unwrap();
    let types = [DType::F64, DType::F32, DType::F16, DType::BF16, DType::F8E4M3];
    let stored: Vec<Tensor> = types.iter().map(|t| exact.to_dtype(*t).unwrap()).collect();
    write(&path, &[("a", stored[0].clone()), ("b", stored[1].clone()), ("c", stored[2].clone())]);
    let first = Checkpoint::open(&path).unwrap();
    let second_path = dir.path().join("small.safetensors");
    write(&second_path, &[("d", stored[3].clone()), ("e", stored[4].clone())]);
    let second = Checkpoint::open(&second_path).unwrap();
    let names = ["a", "b", "c", "d", "e"];
    for (i, name) in names.iter().enumerate() {
        let checkpoint = if i < 3 { &first } else { &second };
        assert_eq!(values(checkpoint, name), exact.to_vec1::<f32>().unwrap(), "{:?}", types[i]);
        let same = checkpoint.tensor(name, types[i], &Device::Cpu).unwrap();
        assert_eq!(same.dtype(), types[i]);
    }
    assert_eq!(second.tensor("e", DType::BF16, &Device::Cpu).unwrap().dtype(), DType::BF16);
}

#[test]
fn every_float8_byte_is_read_as_its_value() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f8.safetensors");
    // All bytes but the two NaNs.
    let bytes: Vec<u8> = (0..=255u8).filter(|b| b & 0x7f != 0x7f).collect();
    let tensor = Tensor::from_raw_buffer(&bytes, DType::F8E4M3, &[bytes.len()], &Device::Cpu).unwrap();
    write(&path, &[("w", tensor.clone())]);
    let expected = tensor.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(values(&Checkpoint::open(&path).unwrap(), "w"), expected);
}

#[test]
fn a_fingerprint_follows_the_values_not_the_layout_of_files() {
    let dir = tempfile::tempdir().unwrap();
    let one = dir.path().join("one.safetensors");
    write(&one, &[("a", counting(6, &[2, 3])), ("b", counting(4, &[4]))]);
    let shards = dir.path().join("shards");
    std::fs::create_dir(&shards).unwrap();
    write(&shards.join("x-00001-of-00002.safetensors"), &[("b", counting(4, &[4]))]);
    write(&shards.join("x-00002-of-00002.safetensors"), &[("a", counting(6, &[2, 3]))]);
    let index = r#"{"metadata":{"total_size":40},"weight_map":{"a":"x-00002-of-00002.safetensors","b":"x-00001-of-00002.safetensors"}}"#;
    std::fs::write(shards.join("x.safetensors.index.json"), index).unwrap();
    let fingerprint = |p: &Path| Checkpoint::open(p).unwrap().fingerprint().unwrap();
    assert_eq!(fingerprint(&one), fingerprint(&shards));
    let before = fingerprint(&one);
    write(&one, &[("a", counting(6, &[2, 3])), ("b", (counting(4, &[4]) + 1e-6).unwrap())]);
    assert_ne!(fingerprint(&one), before);
}

#[test]
fn a_failed_write_leaves_the_old_file_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.safetensors");
    write(&path, &[("a", counting(4, &[4]))]);
    let old = std::fs::read(&path).unwrap();
    let failed = write_atomically(&path, |out| {
        std::io::Write::write_all(out, &[0; 5000]).unwrap();
        Err(models::Error::Mismatch("the disk is full".to_owned()))
    });
    assert!(failed.is_err());
    assert_eq!(std::fs::read(&path).unwrap(), old);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_written_file_is_read_by_the_format_s_own_library() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.safetensors");
    let half = counting(3, &[3]).to_dtype(DType::BF16).unwrap();
    let transposed = counting(6, &[2, 3]).t().unwrap();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    write_safetensors(&path, [("half", &half), ("transposed", &transposed)], &metadata).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
    let library = kernels::safetensors::load(&path, &Device::Cpu).unwrap();
    assert_eq!(library["transposed"].to_vec2::<f32>().unwrap(), transposed.to_vec2::<f32>().unwrap());
    assert_eq!(library["half"].dtype(), DType::BF16);
}
