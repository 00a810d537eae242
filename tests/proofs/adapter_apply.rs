//! Adapters put to a model do what adding their changes to the weights by hand does, wherever they belong.

use std::collections::BTreeMap;

use kernels::{DType, Device, Tensor, loha, lokr};
use models::adapter::files::AdapterFile;
use models::adapter::{Adapters, ApplyMode, Change, DoraPair, LoraPair, Magnitude, Source, apply};
use models::dit::DitConfig;
use models::weights::Weights;
use proofs::small::{config, micro_batch, pipeline, tensors, velocities};
use proofs::{Tolerance, assert_close, difference, randn};
use trainer::pipeline::NetworkInput;

/// The same forward in f32 with the delta merged into the weights, or unmerged.
const SAME: Tolerance = Tolerance { absolute: 2e-5, relative: 2e-5 };

fn cpu(name: &str, shape: (usize, usize)) -> Tensor {
    (randn(name, shape).to_device(&Device::Cpu).unwrap() * 0.3).unwrap()
}

fn pair(name: &str, (out, input): (usize, usize), rank: usize, scale: f64) -> LoraPair {
    LoraPair::new(cpu(&format!("{name}.a"), (rank, input)), cpu(&format!("{name}.b"), (out, rank)), scale)
        .unwrap()
}

fn input() -> [NetworkInput; 1] {
    [micro_batch("input", 2, 9, None).input]
}

/// The small model with the tensors of its weights through `f`.
fn changed(dit: &DitConfig, f: impl Fn(&str, Tensor) -> Tensor) -> Tensor {
    let all: BTreeMap<String, Tensor> = tensors(dit)
        .into_iter()
        .map(|(name, t)| (name.clone(), f(&name, t.to_device(&Device::Cpu).unwrap())))
        .collect();
    velocities(&pipeline(dit, &Weights::from_tensors(all), &Adapters::default(), &[1, 1]), &input()).remove(0)
}

/// The small model with `sources` put to it.
fn applied(dit: &DitConfig, sources: &[Source], mode: ApplyMode) -> Tensor {
    let applied = apply(sources, dit, mode).unwrap();
    let weights = Weights::from_tensors(tensors(dit)).patched(applied.patches);
    let adapters = applied.adapters.part(&proofs::device(), |_| true).unwrap();
    velocities(&pipeline(dit, &weights, &adapters, &[1, 1]), &input()).remove(0)
}

fn source(file: AdapterFile, strength: f64) -> Source {
    Source { name: "a.safetensors".to_owned(), file, strength }
}

/// Embeddings, head, norms, biases and modulation, where no layer of a block is: each must reach the model's output.
#[test]
fn what_lies_outside_the_layers_of_the_blocks_reaches_the_output() {
    let dit = config(2, 32);
    let modules = [
        "patch_embedding",
        "text_embedding.0",
        "text_embedding.2",
        "time_embedding.0",
        "time_embedding.2",
        "time_projection.1",
        "head.head",
    ];
    let parameters = [
        "blocks.0.norm3.bias",
        "blocks.1.norm3.weight",
        "blocks.1.self_attn.norm_q.weight",
        "blocks.0.cross_attn.v.bias",
        "blocks.1.modulation",
        "head.modulation",
        "blocks.0.ffn.2.weight",
    ];
    let shapes: BTreeMap<String, Vec<usize>> = dit.tensors().into_iter().map(|s| (s.name, s.shape)).collect();
    let plain = changed(&dit, |_, t| t);
    let mut all = AdapterFile::default();
    let mut files = Vec::new();
    for module in modules {
        let shape = &shapes[&format!("{module}.weight")];
        let dims = (shape[0], shape[1..].iter().product());
        let file = AdapterFile {
            modules: BTreeMap::from([(module.to_owned(), pair(module, dims, 2, 0.7).into())]),
            ..Default::default()
        };
        all.modules.extend(file.modules.clone());
        files.push((module, file));
    }
    for name in parameters {
        let shape = &shapes[name];
        let tensor = (randn(name, shape.as_slice()).to_device(&Device::Cpu).unwrap() * 0.2).unwrap();
        let file =
            AdapterFile { differences: BTreeMap::from([(name.to_owned(), tensor)]), ..Default::default() };
        all.differences.extend(file.differences.clone());
        files.push((name, file));
    }
    for (name, file) in files {
        let (moved, _) = difference(&applied(&dit, &[source(file, 1.0)], ApplyMode::Unmerged), &plain);
        assert!(moved > 1e-4, "{name} changes the output by {moved:.1e} only");
    }
    for strength in [1.0, -0.4] {
        let by_hand = changed(&dit, |name, t| {
            let delta = match name.strip_suffix(".weight").and_then(|m| all.modules.get(m)?.delta().unwrap())
            {
                Some(delta) => Some(delta.reshape(t.shape()).unwrap()),
                None => all.differences.get(name).cloned(),
            };
            delta.map_or(t.clone(), |delta| (t + (delta * strength).unwrap()).unwrap())
        });
        let got = applied(&dit, &[source(all.clone(), strength)], ApplyMode::Unmerged);
        assert_close(&format!("strength {strength}"), &got, &by_hand, SAME);
    }
}

/// Every kind, unmerged (activations) and merged (the matrix), at a strength of its own.
#[test]
fn every_kind_does_the_same_beside_the_weights_and_inside_them() {
    let dit = config(2, 32);
    let dims = |module: &str| {
        let (_, out, input) = dit.adaptable_modules().into_iter().find(|(name, ..)| name == module).unwrap();
        (out, input)
    };
    let lengths = |name: &str, out: usize| {
        ((randn(name, out).to_device(&Device::Cpu).unwrap() * 0.2).unwrap() + 1.1).unwrap()
    };
    let module = |name: &str, of: &dyn Fn((usize, usize)) -> Change| (name.to_owned(), of(dims(name)));
    let loha = |(out, input): (usize, usize)| {
        Change::Loha(loha::Factors {
            w1_a: cpu("w1_a", (out, 3)),
            w1_b: cpu("w1_b", (3, input)),
            w2_a: cpu("w2_a", (out, 3)),
            w2_b: cpu("w2_b", (3, input)),
            scale: 1.3,
        })
    };
    let lokr = |(out, input): (usize, usize)| {
        let w2 = lokr::Half::Low(cpu("k2_a", (out / 4, 2)), cpu("k2_b", (2, input / 8)));
        Change::Lokr(lokr::Factors { w1: lokr::Half::Full(cpu("k1", (4, 8))), w2, scale: 0.8 })
    };
    let dora = |magnitude: fn(Tensor) -> Magnitude| {
        move |(out, input): (usize, usize)| {
            let pair = pair("dora", (out, input), 3, 0.9);
            Change::Dora(DoraPair { pair, magnitude: magnitude(lengths("m", out)) })
        }
    };
    let modules = BTreeMap::from([
        module("blocks.0.self_attn.q", &|dims| pair("q", dims, 2, 0.5).into()),
        module("blocks.0.self_attn.k", &loha),
        module("blocks.0.cross_attn.v", &lokr),
        module("blocks.1.self_attn.v", &dora(Magnitude::OfMerged)),
        module("blocks.1.ffn.0", &dora(Magnitude::OfBase)),
        module("blocks.1.ffn.2", &lokr),
    ]);
    let file = AdapterFile { modules, ..Default::default() };
    let plain = changed(&dit, |_, t| t);
    for strength in [1.0, 0.35] {
        let beside = applied(&dit, &[source(file.clone(), strength)], ApplyMode::Unmerged);
        let inside = applied(&dit, &[source(file.clone(), strength)], ApplyMode::Merged);
        assert_close(&format!("strength {strength}"), &beside, &inside, SAME);
        assert!(difference(&beside, &plain).0 > 1e-2);
    }
    // One kind on top of another, on one layer: changes add up.
    let other = AdapterFile {
        modules: BTreeMap::from([module("blocks.1.self_attn.v", &|dims| pair("v", dims, 2, 0.5).into())]),
        ..Default::default()
    };
    let together =
        applied(&dit, &[source(file.clone(), 1.0), source(other.clone(), 0.6)], ApplyMode::Unmerged);
    let by_hand = changed(&dit, |name, t| match name.strip_suffix(".weight") {
        Some(module) => {
            let delta = |file: &AdapterFile, strength: f64| match file.modules.get(module) {
                Some(change) => (change.merged(&t, strength).unwrap() - &t).unwrap(),
                None => t.zeros_like().unwrap(),
            };
            ((&t + delta(&file, 1.0)).unwrap() + delta(&other, 0.6)).unwrap()
        }
        None => t,
    });
    assert_close("two adapters", &together, &by_hand, SAME);
}

#[test]
fn image_modules_are_left_out_by_name_and_foreign_ones_refused() {
    let dit = config(2, 32);
    let one = |module: &str, dims| {
        let modules = BTreeMap::from([(module.to_owned(), pair("x", dims, 2, 1.0).into())]);
        source(AdapterFile { modules, ..Default::default() }, 1.0)
    };
    let both = [
        one("blocks.0.cross_attn.k_img", (32, 32)),
        one("img_emb.proj.1", (8, 8)),
        one("blocks.1.ffn.0", (40, 32)),
    ];
    let applied = apply(&both, &dit, ApplyMode::Unmerged).unwrap();
    let left: Vec<&str> = applied.left_out.iter().map(|(_, module)| module.as_str()).collect();
    assert_eq!(left, ["blocks.0.cross_attn.k_img", "img_emb.proj.1"]);
    assert_eq!(applied.adapters.iter().count(), 1);
    for (module, dims, words) in [
        ("blocks.0.ffn.0", (40, 48), "has it 40 x 32"),
        ("blocks.9.ffn.0", (40, 32), "lacks it"),
        ("head.head", (64, 33), "has it 64 x 32"),
    ] {
        let text = apply(&[one(module, dims)], &dit, ApplyMode::Unmerged).unwrap_err().to_string();
        assert!(text.contains(module) && text.contains(words) && text.contains("a.safetensors"), "{text}");
    }
    let name = "blocks.0.norm3.bias";
    let differences =
        BTreeMap::from([(name.to_owned(), Tensor::zeros(31, DType::F32, &Device::Cpu).unwrap())]);
    let file = AdapterFile { differences, ..Default::default() };
    let text = apply(&[source(file, 1.0)], &dit, ApplyMode::Unmerged).unwrap_err().to_string();
    assert!(text.contains(name) && text.contains("[31]"), "{text}");
}
