//! Files that hold their weights in eight bits: every convention is read as its golden values, used as it is, or refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kernels::weight::{Format, Weight};
use kernels::{DType, Device, Tensor};
use models::adapter::Adapters;
use models::dit::{Base, Dit, DitConfig, Pass};
use models::weights::{Checkpoint, Frozen, Grid, Storage, TensorSpec, Weights, write_safetensors};
use proofs::{
    Tolerance, assert_close, assert_same_bits, device, entered, fixture, fixture_tensors, golden_input, randn,
};

/// f32 sums in another order: that of the dense golden outputs.
const OUTPUT: Tolerance = Tolerance::absolute(1.5e-4);
const FP8: Frozen = Frozen { compute: DType::F32, storage: Storage::Quantised(Format::E4m3) };
/// File, its prefix in the golden weights, its golden output.
const FILES: [(&str, &str, Option<&str>); 4] = [
    ("scaled_fp8_old", "scaled", Some("output_scaled_f32")),
    ("comfy_quant_new", "scaled", Some("output_scaled_f32")),
    ("plain_fp8", "plain", Some("output_plain_f32")),
    ("row_scaled_fp8", "row", None),
];

fn open(path: &Path) -> models::Result<(DitConfig, Weights)> {
    let config = std::fs::read_to_string(fixture("dit/t2v/config_official.json")).unwrap();
    models::open_dit(path, Some(&config))
}

fn expected() -> BTreeMap<String, Tensor> {
    let files = ["fp8/expected_dequantized.safetensors", "fp8/row_expected_dequantized.safetensors"];
    files.into_iter().flat_map(fixture_tensors).collect()
}

/// The velocity of the golden input.
fn output(weights: &Weights, config: &DitConfig, frozen: Frozen) -> Tensor {
    let dit = Dit::load(weights, config, 0..config.layers, Base::new(frozen), &device()).unwrap();
    let io = fixture_tensors("dit/t2v/io.safetensors");
    let (none, input) = (Adapters::default(), golden_input(&io));
    let (streams, context) = entered(&dit, &input);
    let streams = dit.through(streams, &context, &Pass::new(&none, None)).unwrap();
    dit.head.as_ref().unwrap().forward(&streams.main, &context).unwrap()
}

#[test]
fn every_convention_is_read_as_its_golden_weights_and_output() {
    let (expected, outputs) = (expected(), fixture_tensors("fp8/output.safetensors"));
    for (file, prefix, golden) in FILES {
        let (config, weights) = open(&fixture(&format!("fp8/{file}.safetensors"))).unwrap();
        let mut compared = 0;
        for name in weights.names() {
            if let Some(golden) = expected.get(&format!("{prefix}.{name}")) {
                let read = weights.tensor(name, DType::F32, &device()).unwrap();
                assert_same_bits(&format!("{file} {name}"), &read, golden);
                compared += 1;
            }
        }
        assert_eq!(compared, if prefix == "row" { 20 } else { weights.names().len() }, "{file}");
        if let Some(golden) = golden {
            assert_close(file, &output(&weights, &config, Frozen::F32), &outputs[golden], OUTPUT);
            assert_close(file, &output(&weights, &config, FP8), &outputs[golden], OUTPUT);
        }
    }
}

/// The codes on the device are the bytes of the file, not quantised a second time, and represent the same numbers.
#[test]
fn codes_are_used_as_they_are() {
    for (file, ..) in FILES {
        let path = fixture(&format!("fp8/{file}.safetensors"));
        let (config, weights) = open(&path).unwrap();
        let (dit, bytes) = (
            Dit::load(&weights, &config, 0..2, Base::new(FP8), &device()).unwrap(),
            Checkpoint::open(&path).unwrap(),
        );
        for linear in dit.linears() {
            let name = format!("{}.weight", linear.name());
            let Weight::Quantised(quantised) = linear.weight() else { panic!("{file} {name} is dense") };
            let codes: Vec<u8> = quantised.codes.flatten_all().unwrap().to_vec1().unwrap();
            assert!(codes == bytes.bytes(&name).unwrap(), "{file} {name}: other codes");
            let dense = weights.tensor(&name, DType::F32, &device()).unwrap();
            assert_same_bits(&name, &linear.weight().dequantised(DType::F32).unwrap(), &dense);
        }
    }
}

/// A file of `tensors` and JSON texts, in a temporary folder.
struct Made(tempfile::TempDir);

impl Made {
    fn new(tensors: &[(&str, &Tensor)], texts: &[(&str, &str)], metadata: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text = |text: &str| Tensor::new(text.as_bytes(), &Device::Cpu).unwrap();
        let texts: Vec<(&str, Tensor)> = texts.iter().map(|(name, json)| (*name, text(json))).collect();
        let all = tensors.iter().copied().chain(texts.iter().map(|(name, tensor)| (*name, tensor)));
        let metadata = metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        write_safetensors(&folder.path().join("made.safetensors"), all, &metadata).unwrap();
        Self(folder)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("made.safetensors")
    }

    fn weights(&self) -> models::weights::Result<Weights> {
        Weights::open(&self.path(), &[TensorSpec::new("m.weight", [6, 128])], |_| None, |_| false)
    }

    fn refusal(&self) -> String {
        self.weights().unwrap_err().to_string()
    }
}

/// Any 8-bit floats but NaN.
fn codes(dtype: DType) -> Tensor {
    let bytes: Vec<u8> = (0..6 * 128u32).map(|i| (i * 37 % 251) as u8 & 0xfb).collect();
    Tensor::from_raw_buffer(&bytes, dtype, &[6, 128], &Device::Cpu).unwrap()
}

#[test]
fn a_scale_for_each_block_of_a_row_is_read_and_kept() {
    let scale = (randn("scale", (6, 2, 1)).to_device(&Device::Cpu).unwrap() * 0.01).unwrap();
    let codes = codes(DType::F8E4M3);
    let named: [(&str, &Tensor); 2] =
        [("diffusion_model.m.weight", &codes), ("diffusion_model.m.scale_weight", &scale)];
    let made = Made::new(&named, &[], &[]);
    let values = codes.to_dtype(DType::F32).unwrap().reshape((6, 2, 64)).unwrap();
    let by_hand = values.broadcast_mul(&scale).unwrap().reshape((6, 128)).unwrap();
    let weights = made.weights().unwrap();
    let dense = weights.tensor("m.weight", DType::F32, &Device::Cpu).unwrap();
    assert_same_bits("dense", &dense, &by_hand);
    let quantised = weights.matrix("m.weight", FP8, &device()).unwrap();
    assert_same_bits("quantised", &quantised.dequantised(DType::F32).unwrap(), &by_hand);
    assert_eq!(quantised.bytes(), 6 * 128 + 6 * 2 * 4);
    let planned = Frozen { storage: Storage::Blocks(Format::E4m3, 64), ..FP8 };
    assert_eq!(planned.bytes(6, 128), quantised.bytes() as u64);
    assert_eq!(
        Checkpoint::open(&made.path()).unwrap().scalings(),
        BTreeMap::from([(Some(Grid::Block(64)), 1)])
    );
}

#[test]
fn what_is_coded_in_another_way_is_refused_by_name() {
    let (fp8, scale) = (codes(DType::F8E4M3), Tensor::new(&[0.5f32], &Device::Cpu).unwrap());
    let packed = Tensor::zeros((6, 64), DType::U8, &Device::Cpu).unwrap();
    let weight = ("m.weight", &fp8);
    for (made, told) in [
        (Made::new(&[("m.weight", &packed)], &[("m.comfy_quant", r#"{"format":"nvfp4"}"#)], &[]), "nvfp4"),
        (
            Made::new(&[weight], &[("m.comfy_quant", r#"{"format":"int8_tensorwise"}"#)], &[]),
            "int8_tensorwise",
        ),
        (Made::new(&[weight], &[("m.comfy_quant", "{")], &[]), "`m.comfy_quant` cannot be read"),
        (
            Made::new(
                &[weight],
                &[],
                &[("_quantization_metadata", r#"{"layers":{"m":{"format":"mxfp8"}}}"#)],
            ),
            "`m` is stored as mxfp8",
        ),
        (Made::new(&[("m.weight", &packed), ("m.weight_scale", &scale)], &[], &[]), "stored as U8"),
        (
            Made::new(
                &[weight, ("m.scale_weight", &Tensor::ones((6, 5), DType::F32, &Device::Cpu).unwrap())],
                &[],
                &[],
            ),
            "[6, 5] does not divide the weight's [6, 128]",
        ),
        // A scale without its weight is an unused tensor.
        (Made::new(&[weight, ("n.weight_scale", &scale)], &[], &[]), "n.weight_scale"),
    ] {
        let error = made.refusal();
        assert!(error.contains("made.safetensors") && error.contains(told), "{told} not in {error}");
    }
}

#[test]
fn a_code_or_a_scale_that_is_no_number_is_named() {
    let scale = Tensor::new(&[f32::NAN], &Device::Cpu).unwrap();
    let fp8 = codes(DType::F8E4M3);
    let error = |made: &Made, frozen| {
        made.weights().unwrap().matrix("m.weight", frozen, &device()).unwrap_err().to_string()
    };
    let made = Made::new(&[("m.weight", &fp8), ("m.scale_weight", &scale)], &[], &[]);
    for frozen in [FP8, Frozen::F32] {
        assert!(error(&made, frozen).contains("`m.scale_weight` holds a value that is not finite"));
    }
    let mut bytes = vec![0u8; 6 * 128];
    bytes[700] = 0xff;
    let bad = Tensor::from_raw_buffer(&bytes, DType::F8E4M3, &[6, 128], &Device::Cpu).unwrap();
    let made = Made::new(&[("m.weight", &bad)], &[], &[]);
    for frozen in [FP8, Frozen::F32] {
        assert!(error(&made, frozen).contains("`m.weight` holds a value that is not finite"));
        assert!(error(&made, frozen).contains("element 700"));
    }
}
