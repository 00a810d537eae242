//! Checkpoints: damage to them is found before a run resumes from them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use data::Cursor;
use kernels::optimiser::State;
use kernels::{Device, Tensor};
use models::weights::{Checkpoint, write_safetensors};
use proofs::{assert_same_bits, randn};
use trainer::Error;
use trainer::learning::optim::{Average, Saved};
use trainer::train::checkpoint::{self, Progress};

fn progress(step: u64) -> Progress {
    Progress { step, cursor: Cursor { epoch: 1, position: 2 }, metrics_bytes: 345, ..Progress::default() }
}

fn states(shape: (usize, usize)) -> Saved {
    let state = |name: &str| State {
        parameter: randn(&format!("{name}.parameter"), shape),
        slots: vec![
            randn(&format!("{name}.first"), shape),
            randn(&format!("{name}.second"), shape).sqr().unwrap(),
        ],
    };
    let names = ["blocks.0.self_attn.q.lora_A", "blocks.0.self_attn.q.lora_B"];
    let tensors = names.into_iter().map(|name| (name.to_owned(), state(name))).collect();
    let globals = BTreeMap::from([("d".to_owned(), 0.1 + 0.2)]);
    Saved { rule: "adamw".into(), globals, tensors, average: Average::None }
}

fn save(folder: &Path, step: u64, states: &Saved) -> std::path::PathBuf {
    checkpoint::save(folder, progress(step), states, 3).unwrap()
}

#[test]
fn every_flipped_bit_of_a_checkpoint_is_found_and_the_one_before_is_named() {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), 10, &states((2, 3)));
    let path = save(folder.path(), 20, &states((2, 3)));
    let whole = fs::read(&path).unwrap();
    for bit in 0..whole.len() * 8 {
        let mut damaged = whole.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &damaged).unwrap();
        let error = checkpoint::load(&path).err().unwrap_or_else(|| panic!("bit {bit} went unnoticed"));
        let told = error.to_string();
        let is_named = told.contains("step-000020.safetensors is damaged")
            && told.contains("the one before it, step-000010.safetensors");
        assert!(matches!(error, Error::DamagedCheckpoint { .. }) && is_named, "bit {bit}: {told}");
    }
    for length in [0, 7, 100, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        let told = checkpoint::load(&path).unwrap_err().to_string();
        assert!(told.contains("damaged") && told.contains("step-000010"), "{length} bytes: {told}");
    }
    fs::write(&path, &whole).unwrap();
    let (found, loaded) = checkpoint::load(&path).unwrap();
    assert_eq!(found, progress(20));
    assert_eq!(loaded.globals, states((2, 3)).globals);
    for (name, state) in states((2, 3)).tensors {
        assert_same_bits(&name, &loaded.tensors[&name].parameter, &state.parameter);
        for (got, expected) in loaded.tensors[&name].slots.iter().zip(&state.slots) {
            assert_same_bits(&name, got, expected);
        }
    }
}

/// What the versions before wrote: without a word of the optimiser, and before that without checksums.
#[test]
fn a_checkpoint_without_checksums_is_still_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = save(folder.path(), 5, &states((2, 3)));
    let file = Checkpoint::open(&path).unwrap();
    let tensors: Vec<(String, Tensor)> = file
        .names()
        .map(|name| (name.to_owned(), file.tensor(name, kernels::DType::F32, &Device::Cpu).unwrap()))
        .collect();
    let header = |keys: &[&str]| -> BTreeMap<String, String> {
        file.metadata().clone().into_iter().filter(|(key, _)| keys.contains(&key.as_str())).collect()
    };
    let mut with_checksums = header(&["tandem.progress", "tandem.checksums"]);
    let mut checksums: BTreeMap<String, String> =
        serde_json::from_str(&with_checksums["tandem.checksums"]).unwrap();
    assert!(checksums.remove("tandem.optimiser").is_some());
    with_checksums.insert("tandem.checksums".into(), serde_json::to_string(&checksums).unwrap());
    for header in [with_checksums, header(&["tandem.progress"])] {
        let views = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        write_safetensors(&path, views, &header).unwrap();
        let (found, loaded) = checkpoint::load(&path).unwrap();
        assert_eq!((found, loaded.tensors.len()), (progress(5), 2));
        assert_eq!((loaded.rule.as_str(), loaded.globals.len()), ("adamw", 0));
    }
}
