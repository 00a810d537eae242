//! Merging, extracting and resizing give the expected weights.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use kernels::{DType, Device, Tensor, loha, lokr};
use models::adapter::files::{AdapterFile, LoraPair, read};
use models::adapter::{ApplyMode, Change, Rank, Source, apply, average, extract, resize};
use models::dit;
use models::names;
use models::weights::{Checkpoint, Copied, Patch, Patches, Weights, write_copy};
use proofs::{Tolerance, assert_close, assert_same_bits, fixture, fixture_tensors, randn, tiny_weights};

/// The golden merged weights were added in float64: one float32 rounding of values near 1.
const MERGED: Tolerance = Tolerance::absolute(1e-6);
/// Factors found in f64 and stored in f32.
const FACTORS: Tolerance = Tolerance { absolute: 1e-6, relative: 2e-6 };
/// Half a step of e4m3 (4 bits of mantissa with the hidden one) of the largest number.
const E4M3: Tolerance = Tolerance::relative(1.0 / 28.0);
/// bf16 has 8 bits.
const BF16: Tolerance = Tolerance::relative(1.0 / 256.0);

fn cpu(name: &str, shape: (usize, usize)) -> Tensor {
    randn(name, shape).to_device(&Device::Cpu).unwrap()
}

fn tensor(weights: &Weights, name: &str) -> Tensor {
    weights.tensor(name, DType::F32, &Device::Cpu).unwrap()
}

/// The tiny model with the golden adapter in its weights.
fn merged(strength: f64) -> (dit::DitConfig, Weights) {
    let (config, weights) = tiny_weights("official");
    let file = read(&fixture("lora/t2v/kohya.safetensors")).unwrap();
    let source = Source { name: "kohya".to_owned(), file, strength };
    let patches = apply(&[source], &config, ApplyMode::Merged).unwrap().patches;
    (config.clone(), weights.patched(patches))
}

#[test]
fn merged_weights_are_the_golden_ones_in_every_format() {
    let (config, weights) = merged(1.0);
    let golden: BTreeMap<String, Tensor> = fixture_tensors("lora/t2v/merged_weights_diffusers.safetensors")
        .into_iter()
        .map(|(key, t)| {
            let module = names::module_from_diffusers(key.strip_suffix(".weight").unwrap()).unwrap();
            (format!("{module}.weight"), t.to_device(&Device::Cpu).unwrap())
        })
        .collect();
    assert_eq!(golden.len(), 20);
    for (name, expected) in &golden {
        assert_close(name, &tensor(&weights, name), expected, MERGED);
    }
    let folder = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(fixture("dit/t2v/config_official.json")).unwrap();
    for (copied, tolerance) in [(Copied::Bf16, BF16), (Copied::Fp16, BF16), (Copied::Fp8Scaled, E4M3)] {
        let path = folder.path().join("merged.safetensors");
        let written = write_copy(&path, &weights, &config.tensors(), copied, &BTreeMap::new(), |_| {
            ControlFlow::Continue(())
        });
        written.unwrap().unwrap();
        let (read_config, back) = models::open_dit(&path, Some(&text)).unwrap();
        assert_eq!(read_config, config);
        for spec in config.tensors() {
            let what = format!("{copied:?}: {}", spec.name);
            assert_close(&what, &tensor(&back, &spec.name), &tensor(&weights, &spec.name), tolerance);
        }
        let is_fp8 = |name: &str| Checkpoint::open(&path).unwrap().dtype(name).unwrap().name() == "F8_E4M3";
        assert_eq!(is_fp8("blocks.0.ffn.0.weight"), copied == Copied::Fp8Scaled);
        assert!(!is_fp8("text_embedding.0.weight") && !is_fp8("blocks.1.modulation"));
    }
    let path = folder.path().join("broken off.safetensors");
    let broken_off =
        write_copy(&path, &weights, &config.tensors(), Copied::Bf16, &BTreeMap::new(), |name| match name {
            "blocks.1.ffn.2.weight" => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        });
    assert!(broken_off.unwrap().is_none());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing half-written stays");
}

/// Makes the last number of a tensor another.
#[derive(Debug)]
struct Last(f32);

impl Patch for Last {
    fn patched(&self, weight: Tensor) -> models::Result<Tensor> {
        let mut numbers = weight.flatten_all()?.to_vec1::<f32>()?;
        numbers[weight.elem_count() - 1] = self.0;
        Ok(Tensor::from_vec(numbers, weight.shape(), &Device::Cpu)?)
    }
}

/// One number in a model that its copy cannot hold, and the tensor is named.
#[test]
fn a_copy_holds_every_number_or_is_not_made() {
    const NAME: &str = "blocks.1.ffn.2.weight";
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("copy.safetensors");
    for (number, copied) in [
        (f32::NAN, Copied::Bf16),
        (f32::NAN, Copied::Fp8Scaled),
        (f32::INFINITY, Copied::Bf16),
        (f32::NEG_INFINITY, Copied::Fp16),
        (1e6, Copied::Fp16),
    ] {
        let mut patches = Patches::default();
        patches.add(NAME.to_owned(), Last(number));
        let (config, weights) = tiny_weights("official");
        let weights = weights.patched(patches);
        let go = |_: &str| ControlFlow::Continue(());
        let error = write_copy(&path, &weights, &config.tensors(), copied, &BTreeMap::new(), go).unwrap_err();
        assert!(error.to_string().contains(NAME), "{number} as {copied:?}: {error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing half-written stays");
    }
}

/// What is not changed keeps the codes and the scale that its file has; what is changed is made from the decoded sum.
#[test]
fn merging_into_fp8_leaves_the_codes_of_other_matrices_alone() {
    let text = std::fs::read_to_string(fixture("dit/t2v/config_official.json")).unwrap();
    let path = fixture("fp8/scaled_fp8_old.safetensors");
    let (config, weights) = models::open_dit(&path, Some(&text)).unwrap();
    let module = "blocks.0.self_attn.q";
    let pair = LoraPair { a: cpu("a", (2, 32)), b: cpu("b", (32, 2)), alpha: None };
    let file =
        AdapterFile { modules: BTreeMap::from([(module.to_owned(), pair.into())]), ..Default::default() };
    let source = Source { name: "one".to_owned(), file, strength: 0.5 };
    let patches = apply(&[source], &config, ApplyMode::Merged).unwrap().patches;
    let weights = weights.patched(patches);
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("merged.safetensors");
    let go = |_: &str| ControlFlow::Continue(());
    write_copy(&copy, &weights, &config.tensors(), Copied::Fp8Scaled, &BTreeMap::new(), go).unwrap().unwrap();
    let (old, new) = (Checkpoint::open(&path).unwrap(), Checkpoint::open(&copy).unwrap());
    let mut same = 0;
    for name in new.names().filter(|name| name.starts_with("blocks.") && name.ends_with(".weight")) {
        if new.dtype(name).unwrap().name() == "F8_E4M3" && name != format!("{module}.weight") {
            assert_eq!(new.bytes(name).unwrap(), old.bytes(name).unwrap(), "{name}");
            same += 1;
        }
    }
    assert_eq!(same, 19);
    let name = format!("{module}.weight");
    let (_, back) = models::open_dit(&copy, Some(&text)).unwrap();
    assert_close("the changed one", &tensor(&back, &name), &tensor(&weights, &name), E4M3);
}

/// If the rank suffices nothing is lost; if it does not, the result is the best of its rank.
#[test]
fn resizing_keeps_what_the_singular_values_say() {
    let pair = LoraPair { a: cpu("a", (5, 30)), b: cpu("b", (20, 5)), alpha: Some(7.0) };
    let change = Change::Lora(pair.clone());
    let whole = resize(&change, Rank::Fixed(5), 1).unwrap();
    assert_close("the same rank", &whole.pair.delta().unwrap(), &pair.delta().unwrap(), FACTORS);
    assert!((whole.energy - 1.0).abs() < 1e-9);
    // The full decomposition of the product itself.
    let full = extract(&pair.delta().unwrap(), Rank::Fixed(20), 1).unwrap();
    for rank in 1..5 {
        let got = resize(&change, Rank::Fixed(rank), 1).unwrap();
        assert_eq!(got.pair.rank(), rank);
        let best =
            full.pair.b.narrow(1, 0, rank).unwrap().matmul(&full.pair.a.narrow(0, 0, rank).unwrap()).unwrap();
        assert_close(&format!("rank {rank}"), &got.pair.delta().unwrap(), &best, FACTORS);
        let share = resize(&change, Rank::Energy(got.energy - 1e-6, 9), 1).unwrap();
        assert_eq!(share.pair.rank(), rank, "the smallest rank that keeps {}", got.energy);
    }
    assert_eq!(
        resize(&change, Rank::Fixed(64), 1).unwrap().pair.rank(),
        5,
        "more than there is is of no use"
    );

    let loha = Change::Loha(loha::Factors {
        w1_a: cpu("1a", (20, 2)),
        w1_b: cpu("1b", (2, 30)),
        w2_a: cpu("2a", (20, 3)),
        w2_b: cpu("2b", (3, 30)),
        scale: 0.6,
    });
    let (w1, w2) = (cpu("w1", (4, 5)), cpu("w2", (5, 6)));
    let lokr = Change::Lokr(lokr::Factors { w1: lokr::Half::Full(w1), w2: lokr::Half::Full(w2), scale: 1.0 });
    for (change, rank) in [(loha, 6), (lokr, 20)] {
        let got = resize(&change, Rank::Fixed(rank), 1).unwrap();
        assert_close(
            change.kind().name(),
            &got.pair.delta().unwrap(),
            &change.delta().unwrap().unwrap(),
            FACTORS,
        );
    }
}

/// A matrix too large for the full decomposition, with a spectrum that falls slowly, is the hard case of a sketch.
#[test]
fn a_sketch_is_nearly_as_good_as_the_full_decomposition() {
    let (out, input) = (460, 520);
    // 1/sqrt(i) of random directions, which are nearly orthogonal.
    let scales: Vec<f32> = (0..out).map(|i| 1.0 / ((i + 1) as f32).sqrt()).collect();
    let scales = Tensor::from_vec(scales, (out, 1), &Device::Cpu).unwrap();
    let right = cpu("right", (out, input)).broadcast_mul(&scales).unwrap();
    let delta = (cpu("left", (out, out)).matmul(&right).unwrap() / out as f64).unwrap();
    let full = extract(&delta, Rank::Fixed(out), 1).unwrap();
    assert!(full.energy > 1.0 - 1e-9);
    let values: Vec<f32> = full.pair.b.sqr().unwrap().sum(0).unwrap().to_vec1().unwrap();
    let squares: Vec<f64> = values.iter().map(|value| f64::from(*value).powi(2)).collect();
    let total: f64 = squares.iter().sum();
    for rank in [8, 32, 64] {
        let best = squares[..rank].iter().sum::<f64>() / total;
        let got = extract(&delta, Rank::Fixed(rank), 1).unwrap();
        assert!(
            got.energy > 0.999 * best && got.energy < best * (1.0 + 1e-6),
            "rank {rank}: {} of {best}",
            got.energy
        );
        let error = (got.pair.delta().unwrap() - &delta).unwrap().sqr().unwrap().sum_all().unwrap();
        let lost = f64::from(error.to_scalar::<f32>().unwrap()) / total;
        assert!(
            (lost - (1.0 - got.energy)).abs() < 1e-4,
            "the energy told is the energy kept: {lost} and {}",
            got.energy
        );
        let again = extract(&delta, Rank::Fixed(rank), 1).unwrap();
        assert_same_bits("the same seed", &again.pair.a, &got.pair.a);
    }
}

/// The difference of a merged model and its base is the adapter that was merged.
#[test]
fn extraction_undoes_merging() {
    let (_, base) = tiny_weights("official");
    let (config, tuned) = merged(0.8);
    let file = read(&fixture("lora/t2v/comfy_ab.safetensors")).unwrap();
    for (module, ..) in config.adaptable_modules() {
        let name = format!("{module}.weight");
        let delta = (tensor(&tuned, &name) - tensor(&base, &name)).unwrap();
        let got = extract(&delta, Rank::Fixed(4), 1).unwrap();
        let expected = (file.modules[&module].delta().unwrap().unwrap() * 0.8).unwrap();
        assert_close(&module, &got.pair.delta().unwrap(), &expected, MERGED);
        assert!(got.energy > 0.999, "{module}: rank 4 holds all of it, {}", got.energy);
    }
}

/// Steps of one run have one scale, so the mean of their factors is that of the numbers that were trained.
#[test]
fn an_average_is_the_mean_of_every_tensor() {
    let pair = |name: &str, rank: usize| LoraPair {
        a: cpu(&format!("{name}.a"), (rank, 6)),
        b: cpu(&format!("{name}.b"), (5, rank)),
        alpha: Some(8.0),
    };
    let half =
        |name: &str| lokr::Half::Low(cpu(&format!("{name}.0"), (3, 2)), cpu(&format!("{name}.1"), (2, 3)));
    let file = |name: &str| {
        let of = |part: &str| format!("{name}.{part}");
        let dora = Change::Dora(models::adapter::DoraPair {
            pair: pair(&of("dora"), 4),
            magnitude: models::adapter::Magnitude::OfMerged(
                randn(&of("m"), 5).to_device(&Device::Cpu).unwrap(),
            ),
        });
        let loha = Change::Loha(loha::Factors {
            w1_a: cpu(&of("1a"), (5, 2)),
            w1_b: cpu(&of("1b"), (2, 6)),
            w2_a: cpu(&of("2a"), (5, 2)),
            w2_b: cpu(&of("2b"), (2, 6)),
            scale: 0.5,
        });
        let lokr = Change::Lokr(lokr::Factors {
            w1: lokr::Half::Full(cpu(&of("w1"), (2, 2))),
            w2: half(&of("w2")),
            scale: 1.0,
        });
        let changes = [("lora", pair(&of("lora"), 4).into()), ("dora", dora), ("loha", loha), ("lokr", lokr)];
        let modules = changes.map(|(module, change)| (module.to_owned(), change)).into();
        AdapterFile { modules, ..AdapterFile::default() }
    };
    let (one, two) = (file("one"), file("two"));
    let mean = average(&[(one.clone(), 1.0), (two.clone(), 3.0)]).unwrap();
    for (module, change) in &mean.modules {
        assert_eq!(
            (change.kind(), change.scale()),
            (one.modules[module].kind(), one.modules[module].scale())
        );
        let parts = one.modules[module].tensors().into_iter().zip(two.modules[module].tensors());
        for ((name, tensor), ((_, a), (_, b))) in change.tensors().into_iter().zip(parts) {
            let expected = ((a * 0.25).unwrap() + (b * 0.75).unwrap()).unwrap();
            assert_same_bits(&format!("{module}.{name}"), tensor, &expected);
        }
    }
    let mut other = two.clone();
    other.modules.insert("lora".to_owned(), pair("short", 2).into());
    let mut fewer = two.clone();
    fewer.modules.remove("loha");
    for (second, weight, told) in [
        (other, 1.0, "lora has not the same kind, rank and scale"),
        (fewer, 1.0, "only some change loha"),
        (two, -1.0, "positive sum"),
    ] {
        let why = average(&[(one.clone(), 1.0), (second, weight)]).unwrap_err().to_string();
        assert!(why.contains(told), "{why}");
    }
}
