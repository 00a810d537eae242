//! The bench reports the same fields as the PyTorch program for comparison, so that a script can compute ratios.

use std::collections::BTreeSet;
use std::sync::Arc;

use kernels::transfer::Route;
use kernels::{DType, Device, attention};
use models::adapter::AdapterKind;
use models::umt5::Umt5;
use models::vae::{Bands, Tiling, Vae};
use proofs::device;
use serde_json::Value;
use trainer::machine::devices::DevicesConfig;
use trainer::machine::forecast::Networks;
use trainer::machine::memory::MemoryConfig;
use trainer::machine::precision::PrecisionRequest;
use trainer::tools::bench::{
    self, AttentionBench, ClipSize, DitBench, DitSource, Repeats, StepBench, VaeBench,
};

/// The other program, embedded in the proofs, which may run without the sources.
const PEER: &str = include_str!("../../bench/torch_peer.py");

const REPEATS: Repeats = Repeats { warmup: 0, iters: 1, profile: true };
/// A step of two micro-batches.
fn one(rank: usize) -> StepBench {
    StepBench { kind: AdapterKind::Lora, rank, batch: 1, accumulate: 2, networks: Networks::One }
}

const SIZE: ClipSize = ClipSize { width: 32, height: 32, frames: 5 };

/// The field names in the peer's call `say(what="<what>", ...)` that does not report an error.
fn peers_names(what: &str) -> BTreeSet<String> {
    let call = format!("say(what=\"{what}\",");
    let calls = PEER.match_indices(&call).map(|(at, _)| &PEER[at + "say(".len()..]);
    let of_call = |call: &str| -> BTreeSet<String> {
        let mut depth = 1;
        let end = call.find(|c| {
            depth += i32::from("([{".contains(c)) - i32::from(")]}".contains(c));
            depth == 0
        });
        // A name is after the opening bracket or a comma, and before a single equals sign.
        let named = |(at, _): (usize, &str)| {
            let name = call[..at].rsplit([',', '(', ' ', '\n']).next()?;
            let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
            is_name.then(|| name.to_owned())
        };
        call[..end.unwrap()].match_indices('=').filter_map(named).collect()
    };
    let names = calls.map(of_call).find(|names| !names.contains("error"));
    names.unwrap_or_else(|| panic!("the peer tells nothing of {what}"))
}

#[track_caller]
fn assert_told(what: &str, row: &Value) {
    // Compilation is PyTorch's own business.
    let wanted = peers_names(what).into_iter().filter(|name| name != "compile");
    let missing: Vec<String> = wanted.filter(|name| row.get(name).is_none_or(Value::is_null)).collect();
    assert!(missing.is_empty(), "{what}: not told: {missing:?} in {row}");
}

fn tiny<'a>(devices: &'a DevicesConfig) -> DitBench<'a> {
    DitBench {
        source: DitSource::Preset("tiny"),
        precision: PrecisionRequest::default().settle(devices.processor()),
        devices: devices.clone(),
        memory: MemoryConfig::default(),
        size: SIZE,
        repeats: REPEATS,
    }
}

#[test]
fn the_bench_tells_what_the_peer_tells() {
    let devices = DevicesConfig::default();
    let step = bench::step(&tiny(&devices), one(2)).unwrap();
    assert_told("train", &step);
    assert_eq!((&step["tokens"], &step["size"]), (&8.into(), &"32x32".into()));
    // Forecast and measurement are reported together, device by device.
    let count = |name: &str| step[name].as_array().unwrap().len();
    assert_eq!(count("forecast_gib"), count("peak_gib"), "{step}");
    assert_told("infer", &bench::forward(&tiny(&devices)).unwrap());

    let sizes = AttentionBench { tokens: 64, heads: 2, head_size: 8, dtype: DType::F32, repeats: REPEATS };
    let told = bench::attention(sizes, &device()).unwrap();
    assert_told("attention", &told);
    assert_eq!(told["backend"], attention::engine(&device(), DType::F32, 8).name);

    let vae = Vae::seeded(bench::vae_preset("tiny").unwrap(), 0, DType::F32, &device()).unwrap();
    let vae = Arc::new(vae);
    for count in [1, 2] {
        let bands = Bands::new(vec![vae.clone(); count], Route::Auto).unwrap();
        let told =
            bench::vae(&VaeBench { bands, size: SIZE, tiling: Tiling::Off, repeats: REPEATS }).unwrap();
        assert_told("vae2.1", &told);
        assert_eq!(told["devices"], count);
    }
    let precision = PrecisionRequest::default().settle(devices.processor());
    let umt5 = Umt5::seeded(bench::umt5_preset("tiny").unwrap(), 0, precision.text(), &device()).unwrap();
    assert_told("umt5-xxl", &bench::text("tiny", &umt5, 8, REPEATS).unwrap());
}

/// The classes of a profile hold nearly all of the time that a stage works, and no second is counted twice.
///
/// What is left are casts and copies between the operations of `kernels`: less than half of the time, and an operation
/// that is counted twice goes past all of it. On the CPU, whose clock does not count the wait for a launch.
#[test]
fn the_classes_of_a_profile_sum_to_the_time_of_a_stage() {
    let devices = DevicesConfig { stages: vec!["cpu".into()], ..Default::default() };
    let bench = DitBench { size: ClipSize { width: 128, height: 128, frames: 9 }, ..tiny(&devices) };
    let step = bench::step(&bench, one(4)).unwrap();
    let number = |value: &Value| value.as_f64().unwrap();
    let assert_whole = |told: &Value, busy: f64| {
        let of = |name: &str| number(&told[name]);
        let classes = of("gemm_s") + of("attention_s") + of("elementwise_s") + of("copy_s");
        assert!(of("gemm_s") > 0.0 && of("elementwise_s") > 0.0, "{told}");
        assert!((0.5..1.001).contains(&(classes / busy)), "{told}");
    };
    let profile = &step["profile"];
    for stage in profile["stages"].as_array().unwrap() {
        let of = |name: &str| number(&stage[name]);
        assert_whole(stage, of("busy_s"));
        assert!(of("attention_s") > 0.0, "{stage}");
        assert!((0.0..1.0).contains(&of("bubble")) && of("busy_s") <= number(&profile["s"]), "{stage}");
    }
    let forward = bench::forward(&bench).unwrap();
    let profile = &forward["profile"];
    assert_whole(&profile["stages"][0], number(&profile["s"]));
    let vae = Vae::seeded(bench::vae_preset("tiny").unwrap(), 0, DType::F32, &Device::Cpu).unwrap();
    let size = ClipSize { width: 64, height: 64, frames: 9 };
    let bands = Bands::one(Arc::new(vae)).unwrap();
    let vae = VaeBench { bands, size, tiling: Tiling::Off, repeats: REPEATS };
    let told = bench::vae(&vae).unwrap();
    let profile = &told["decode_profile"];
    assert_whole(profile, number(&profile["s"]));
}
