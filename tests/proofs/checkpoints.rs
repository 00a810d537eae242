//! Checkpoints: damage to them is found before a run goes on with it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{Device, Tensor};
use data::Cursor;
use kernels::adamw::State;
use models::weights::{Checkpoint, write_safetensors};
use proofs::{assert_same_bits, randn};
use trainer::Error;
use trainer::checkpoint::{self, Progress, States};

fn progress(step: u64) -> Progress {
    Progress { step, cursor: Cursor { epoch: 1, position: 2 }, metrics_bytes: 345, ..Progress::default() }
}

fn states(shape: (usize, usize)) -> States {
    let state = |name: &str| State {
        parameter: randn(&format!("{name}.parameter"), shape),
        first: randn(&format!("{name}.first"), shape),
        second: randn(&format!("{name}.second"), shape).sqr().unwrap(),
    };
    let names = ["blocks.0.self_attn.q.lora_A", "blocks.0.self_attn.q.lora_B"];
    names.into_iter().map(|name| (name.to_owned(), state(name))).collect()
}

fn save(folder: &Path, step: u64, states: &States) -> std::path::PathBuf {
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
    for (name, state) in states((2, 3)) {
        assert_same_bits(&name, &loaded[&name].second, &state.second);
    }
}

/// What the versions before wrote.
#[test]
fn a_checkpoint_without_checksums_is_still_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = save(folder.path(), 5, &states((2, 3)));
    let file = Checkpoint::open(&path).unwrap();
    let tensors: Vec<(String, Tensor)> = file
        .names()
        .map(|name| (name.to_owned(), file.tensor(name, candle_core::DType::F32, &Device::Cpu).unwrap()))
        .collect();
    let header: BTreeMap<String, String> =
        file.metadata().clone().into_iter().filter(|(key, _)| key != "tandem.checksums").collect();
    assert_eq!(header.len(), 1, "{header:?}");
    write_safetensors(&path, tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)), &header).unwrap();
    let (found, loaded) = checkpoint::load(&path).unwrap();
    assert_eq!((found, loaded.len()), (progress(5), 2));
}
