//! DoRA, LoHa and LoKr: DoRA against PEFT, and all of them in the place that they have in the model.

use std::collections::BTreeMap;

use kernels::weight::Weight;
use kernels::{DType, Device, Tensor, dora, loha, lokr, low_rank};
use models::adapter::files::read;
use models::adapter::{Adapter, AdapterKind, Adapters, Change, Delta, DoraPair, Site};
use models::dit::BlockPlan;
use proofs::small::{config, micro_batch, pipeline, trained, weights};
use proofs::{Tolerance, assert_close, fixture, fixture_tensors, randn};

/// An independent f32 implementation of one small layer.
const PEFT: Tolerance = Tolerance { absolute: 2e-6, relative: 2e-5 };
/// A step of 1e-2 along a direction of length 1 in a loss near 1: f32 rounding (1e-7 / 2e-2), and its third derivative.
const SLOPE: Tolerance = Tolerance { absolute: 1e-4, relative: 2e-2 };

/// PEFT's own file, forward and gradients: what training sees is what PEFT trains.
#[test]
fn dora_is_pefts() {
    let golden = fixture_tensors("dora/peft_layer.safetensors");
    let file = read(&fixture("dora")).unwrap();
    let change = &file.modules["blocks.0.self_attn.q"];
    assert_eq!(change.kind(), AdapterKind::Dora);
    let weight = Weight::Dense(golden["weight"].clone());
    let mut delta = Delta::new(change, 1.0).unwrap().to_device(&proofs::device()).unwrap();
    delta.settle(&weight).unwrap();

    let (x, dy) = (&golden["x"], &golden["dy"]);
    let product = kernels::linear::forward(x, &weight, None, None).unwrap();
    let site = Site { weight: &weight, product: Some(&product) };
    let y = (delta.forward(x, site).unwrap() + &product).unwrap().broadcast_add(&golden["bias"]).unwrap();
    assert_close("output", &y, &golden["y"], PEFT);

    let back = delta.backward(x, dy, site).unwrap();
    let dy_of_product = (dy + back.d_product.unwrap()).unwrap();
    let dx = kernels::linear::backward_input(&dy_of_product, &weight, Some(&back.dx)).unwrap();
    assert_close("input", &dx, &golden["dx"], PEFT);
    let gradients: BTreeMap<&str, Tensor> = back.gradients.into_iter().collect();
    for (name, key) in [("lora_A.weight", "da"), ("lora_B.weight", "db"), ("magnitude", "d_magnitude")] {
        assert_close(key, &gradients[name], &golden[key], PEFT);
    }

    let cpu = |t: &Tensor| t.to_device(&Device::Cpu).unwrap();
    let merged = fixture_tensors("dora/merged.safetensors");
    let got = change.merged(&cpu(&merged["weight"]), 1.0).unwrap();
    assert_close("merged", &got, &cpu(&merged["merged"]), PEFT);
    // ComfyUI divides by the lengths of the base: with the lengths for that it gets the same weight.
    let Change::Dora(dora) = delta.to_change(Some(&weight)).unwrap() else { panic!("no DoRA") };
    let base = dora.magnitude.of_base().unwrap();
    let factor = (cpu(base) / cpu(&merged["weight"]).sqr().unwrap().sum(1).unwrap().sqrt().unwrap()).unwrap();
    let changed = (cpu(&merged["weight"]) + cpu(&dora.pair.delta().unwrap())).unwrap();
    let comfy = changed.broadcast_mul(&factor.unsqueeze(1).unwrap()).unwrap();
    assert_close("ComfyUI's weight", &comfy, &cpu(&merged["merged"]), PEFT);
}

/// The lengths of the changed rows without the changed matrix.
#[test]
fn merged_norms_are_those_of_the_merged_weight() {
    let (w, a, b) = (randn("w", (1500, 12)), randn("a", (3, 12)), randn("b", (1500, 3)));
    let (weight, factors) =
        (Weight::Dense(w.clone()), low_rank::Factors { a: a.clone(), b: b.clone(), scale: 0.7 });
    let got = dora::merged_norm(&weight, &dora::row_squares(&weight).unwrap(), &factors).unwrap();
    let merged = (w + (b.matmul(&a).unwrap() * 0.7).unwrap()).unwrap();
    let expected = merged.sqr().unwrap().sum(1).unwrap().sqrt().unwrap();
    assert_close("lengths", &got, &expected, Tolerance::relative(1e-5));
}

/// Every kind on layers that share an input, on single ones and on chunked ones, with plain LoRAs between them: the
/// gradient of each tensor is the slope of the loss. The factors of a DoRA are left to PEFT's values: its lengths pass no
/// gradient, so the loss has another slope.
#[test]
fn gradients_of_every_kind_are_slopes_of_the_loss() {
    let dit = config(2, 32);
    let base = weights(&dit);
    let small = |name: &str, rows: usize, columns: usize| (randn(name, (rows, columns)) * 0.3).unwrap();
    let mut adapters = Adapters::default();
    for (i, (module, out, input)) in dit.adaptable_modules().into_iter().enumerate() {
        let name = |part: &str| format!("{module}.{part}");
        let pair =
            || low_rank::Factors { a: small(&name("a"), 2, input), b: small(&name("b"), out, 2), scale: 0.9 };
        let delta = match i % 4 {
            0 => Delta::Lora(pair()),
            1 => Delta::fresh_dora(pair()),
            2 => Delta::Loha(loha::Factors {
                w1_a: small(&name("1a"), out, 2),
                w1_b: small(&name("1b"), 2, input),
                w2_a: small(&name("2a"), out, 2),
                w2_b: small(&name("2b"), 2, input),
                scale: 1.4,
            }),
            _ => Delta::Lokr(lokr::Factors {
                w1: lokr::Half::Full(small(&name("k1"), 4, 8)),
                w2: lokr::Half::Low(small(&name("k2a"), out / 4, 2), small(&name("k2b"), 2, input / 8)),
                scale: 0.8,
            }),
        };
        adapters.attach(module, Adapter::trainable(delta));
    }
    for dropout in [None, Some(0.25)] {
        let mut model = pipeline(&dit, &base, &adapters, &[1, 1]);
        model.set_ffn_tokens(5);
        let batches = [micro_batch("kinds", 2, 9, dropout)];
        let (_, gradients) = trained(&model, &batches, BlockPlan::default());
        let parameters: BTreeMap<String, Tensor> =
            model.stages().iter().flat_map(|stage| stage.adapters.parameters()).collect();
        assert!(gradients.keys().eq(parameters.keys()), "every tensor gets a gradient");
        for (name, parameter) in &parameters {
            let is_dora =
                parameters.contains_key(&format!("{}.magnitude", name.split(".lora_").next().unwrap()));
            if is_dora {
                continue;
            }
            // The direction of the gradient itself: its slope is the gradient's length.
            let gradient = gradients[name].to_device(parameter.device()).unwrap();
            let length = gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            assert!(length > 1e-6, "{name}: no gradient");
            let mut loss_at = |by: f64| {
                let moved = (parameter + ((&gradient / f64::from(length)).unwrap() * by).unwrap()).unwrap();
                let one = BTreeMap::from([(name.clone(), moved)]);
                model.stages_mut().iter_mut().for_each(|stage| stage.adapters.set_parameters(&one));
                f64::from(trained(&model, &batches, BlockPlan::default()).0[0])
            };
            let slope = ((loss_at(1e-2) - loss_at(-1e-2)) / 2e-2) as f32;
            loss_at(0.0);
            let tensor = |v: f32| Tensor::new(&[v], &Device::Cpu).unwrap();
            assert_close(&format!("{name}, dropout {dropout:?}"), &tensor(length), &tensor(slope), SLOPE);
        }
    }
}

/// A file in both rules' lengths needs the base once; what is written then is read by either program.
#[test]
fn a_dora_goes_from_pefts_rule_to_comfyuis_and_back() {
    use models::adapter::files::{Precision, Style, write};
    let mut file = read(&fixture("dora")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dora");
    let refused = write(&path, &file, Style::Comfy, Precision::Float32).unwrap_err().to_string();
    assert!(refused.contains("--base") && refused.contains("blocks.0.self_attn.q"), "{refused}");
    let weight = fixture_tensors("dora/merged.safetensors")["weight"].to_device(&Device::Cpu).unwrap();
    let Change::Dora(dora) = file.modules["blocks.0.self_attn.q"].clone() else { panic!("no DoRA") };
    let whole: DoraPair = dora.with_base(&weight).unwrap();
    let expected = Change::Dora(whole.clone()).merged(&weight, 0.7).unwrap();
    file.modules.insert("blocks.0.self_attn.q".to_owned(), Change::Dora(whole));
    for style in [Style::Comfy, Style::ComfyAlpha, Style::Kohya, Style::Diffusers, Style::Peft] {
        let place = folder.path().join(format!("{style:?}"));
        write(&place, &file, style, Precision::Float32).unwrap();
        let back = read(&place).unwrap();
        let got = back.modules["blocks.0.self_attn.q"].merged(&weight, 0.7).unwrap();
        assert_close(&format!("{style:?}"), &got, &expected, PEFT);
    }
    assert_eq!(expected.dtype(), DType::F32);
}
