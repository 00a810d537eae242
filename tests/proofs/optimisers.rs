//! Every optimiser follows its reference implementation for 20 steps, and goes on bit for bit from a checkpoint.

use std::collections::BTreeMap;

use clap::Parser;
use data::Cursor;
use kernels::optimiser::State;
use kernels::{DType, Device, Tensor};
use models::dit::Gradients;
use proofs::small::{adapters, config, open_weights, pipeline};
use proofs::{Tolerance, assert_close, assert_same_bits, fixture, fixture_json, fixture_tensors, randn};
use serde_json::Value;
use trainer::cli::Arguments;
use trainer::learning::optim::{Optimizer, OptimizerConfig, OptimizerKind, Step};
use trainer::train::checkpoint::{self, Progress};

/// f32 operations in another order; each is the bound that the fixtures' README gives for the case.
fn tolerance(case: &str) -> Tolerance {
    Tolerance::absolute(match case {
        "muon_bf16_default" => 2e-3, // the iteration is in f32 here and in bfloat16 there
        _ if case.starts_with("prodigy") => 1e-5, // p0 - p cancels
        _ => 2e-6,
    })
}

#[test]
fn every_optimiser_follows_its_reference_for_20_steps() {
    let params = fixture_json("optimisers/params.json");
    let cases = fixture("optimisers/params.json");
    let inputs = fixture("optimisers/inputs.safetensors");
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.safetensors");
    for case in params["cases"].as_object().unwrap().keys() {
        let words = ["tandem", "--json", "probe", "optimizer", "--case", case].map(str::to_owned);
        let files = [("--cases", &cases), ("--input", &inputs), ("--output", &output)];
        let files = files.into_iter().flat_map(|(name, path)| [name.to_owned(), path.display().to_string()]);
        Arguments::try_parse_from(words.into_iter().chain(files)).unwrap().run().unwrap();
        let got = kernels::safetensors::load(&output, &Device::Cpu).unwrap();
        let compare = |name: &str, steps: &Value, expected: &Tensor| {
            for (row, step) in steps.as_array().unwrap().iter().enumerate() {
                let at = step.as_u64().unwrap() as usize - 1;
                let (got, expected) = (got[name].get(at).unwrap(), expected.get(row).unwrap());
                assert_close(&format!("{case} {name} step {step}"), &got, &expected, tolerance(case));
            }
        };
        let golden = fixture_tensors(&format!("optimisers/{case}.safetensors"));
        assert!(golden.len() >= 4, "{case}");
        for (name, expected) in &golden {
            match name.split_once('.').unwrap() {
                ("p", of) => compare(name, &params["stored_steps"][of], expected),
                _ => compare(name, &params["eval_steps"], expected),
            }
        }
    }
}

const KINDS: [OptimizerKind; 8] = [
    OptimizerKind::AdamW,
    OptimizerKind::AdamW8bit,
    OptimizerKind::Lion,
    OptimizerKind::Adafactor,
    OptimizerKind::ScheduleFree,
    OptimizerKind::Prodigy,
    OptimizerKind::Came,
    OptimizerKind::Muon,
];

/// Four updates are two, a checkpoint in a file, and two by a new optimiser that was restored from it: parameters, state, what is
/// exported, and the global state.
#[test]
fn every_optimiser_goes_on_from_a_checkpoint_bit_for_bit() {
    let dit = config(2, 24);
    let pipeline = pipeline(&dit, &open_weights(&dit), &adapters(&dit, 4, 1.0), &[2]);
    for kind in KINDS {
        let rule = OptimizerConfig { kind, lr: 0.1, ..OptimizerConfig::default() }.rule();
        let update = |optimizer: &mut Optimizer, number: u64| {
            let mut gradients = Gradients::default();
            for (name, state) in optimizer.states() {
                let random = randn(&format!("{name}{number}"), state.parameter.shape());
                gradients.add(name.clone(), random.to_device(state.parameter.device()).unwrap()).unwrap();
            }
            optimizer.update(&gradients, &Step { lr: 0.1, factor: 0.5, number }).unwrap();
        };
        let mut straight = Optimizer::new(&pipeline, rule).unwrap();
        (1..=4).for_each(|number| update(&mut straight, number));
        let mut halted = Optimizer::new(&pipeline, rule).unwrap();
        (1..=2).for_each(|number| update(&mut halted, number));
        let folder = tempfile::tempdir().unwrap();
        let progress = Progress { step: 2, cursor: Cursor::default(), ..Progress::default() };
        let path = checkpoint::save(folder.path(), progress, &halted.saved(), 1).unwrap();
        let mut resumed = Optimizer::new(&pipeline, rule).unwrap();
        resumed.restore(checkpoint::load(&path).unwrap().1).unwrap();
        (3..=4).for_each(|number| update(&mut resumed, number));
        assert_eq!(straight.saved().globals, resumed.saved().globals, "{kind}");
        let resumed: &BTreeMap<String, State> = resumed.states();
        for (name, state) in straight.states() {
            let other = &resumed[name];
            assert_same_bits(&format!("{kind} {name}"), &other.parameter, &state.parameter);
            assert_eq!(state.slots.len(), other.slots.len(), "{kind}");
            for (slot, other) in state.slots.iter().zip(&other.slots) {
                assert_eq!(slot.dtype(), other.dtype(), "{kind}");
                // Codes of 8 bits are compared as the numbers that they are.
                let numbers = |slot: &Tensor| slot.to_dtype(DType::F32).unwrap();
                assert_same_bits(&format!("{kind} state of {name}"), &numbers(other), &numbers(slot));
            }
        }
    }
}

/// A setting of another optimiser, and a value that cannot be, are refused by their key.
#[test]
fn settings_that_do_not_fit_the_optimiser_are_refused() {
    for (settings, told) in [
        ("kind = \"lion\"\nmomentum = 0.9", "optimizer.momentum"),
        ("kind = \"adamw\"\nd0 = 1e-6", "optimizer.d0"),
        ("kind = \"prodigy\"", "optimizer.lr"),
        ("kind = \"prodigy\"\nlr = 1.0\ngrowth_rate = 0.5", "optimizer.growth_rate"),
        ("kind = \"schedule-free\"\nschedule = \"cosine\"", "optimizer.schedule"),
        ("kind = \"adafactor\"\nrelative_step = true\nschedule = \"linear\"", "optimizer.schedule"),
        ("kind = \"muon\"\nmomentum = 1.0", "optimizer.momentum"),
        ("kind = \"came\"\nbeta3 = -0.1", "optimizer.beta3"),
    ] {
        let config: OptimizerConfig = toml::from_str(settings).unwrap();
        let why = config.check().unwrap_err().to_string();
        assert!(why.contains(told), "{settings}: {why}");
    }
    let unknown = toml::from_str::<OptimizerConfig>("kind = \"sgd\"").unwrap_err().to_string();
    assert!(unknown.contains("sgd") && unknown.contains("adamw-8bit"), "{unknown}");
}
