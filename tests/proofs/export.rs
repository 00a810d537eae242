//! Export: what is written is what was trained. The adapter read back, and the weights it is merged into, give the
//! velocity of the model that is still in training.

use std::collections::BTreeMap;

use kernels::{DType, Tensor};
use models::adapter::files::{AdapterFile, Precision, Style, read, write};
use models::adapter::{Adapter, Adapters, Delta, LoraConfig, Scaling};
use models::weights::Weights;
use proofs::small::{pipeline, velocities};
use proofs::{
    Tolerance, assert_close, assert_same_bits, device, difference, fixture, fixture_tensors, golden_input,
    randn, tiny_weights,
};
use trainer::pipeline::Pipeline;

/// An independent forward in f32: the fixtures' tolerance for outputs.
const GOLDEN: Tolerance = Tolerance::absolute(1.5e-4);
/// The same forward with the scale at another place, or with the delta added to the weights first: f32 rounding.
const SAME: Tolerance = Tolerance::absolute(2e-5);

const STYLES: [Style; 3] = [Style::Comfy, Style::Diffusers, Style::Kohya];

/// The tiny model of the fixtures with `adapters`, on two stages.
fn model(adapters: &Adapters) -> Pipeline {
    let (config, weights) = tiny_weights("official");
    pipeline(&config, &weights, adapters, &[1, 1])
}

/// The tiny model with `strength` times the deltas of `file` added to its weights, and no adapter.
fn merged(file: &AdapterFile, strength: f64) -> Pipeline {
    let (config, weights) = tiny_weights("official");
    let mut tensors = BTreeMap::new();
    for name in weights.names() {
        let weight = weights.tensor(name, DType::F32, &device()).unwrap();
        let delta =
            name.strip_suffix(".weight").and_then(|module| file.modules.get(module)?.delta().unwrap());
        let sum = match delta {
            Some(delta) => (weight + (delta.to_device(&device()).unwrap() * strength).unwrap()).unwrap(),
            None => weight,
        };
        tensors.insert(name.to_owned(), sum);
    }
    pipeline(&config, &Weights::from_tensors(tensors), &Adapters::default(), &[config.layers])
}

/// The adapter of a file as sampling uses it: frozen, at `strength`.
fn frozen(file: &AdapterFile, strength: f64) -> Adapters {
    let mut adapters = Adapters::default();
    for (module, change) in &file.modules {
        let delta = Delta::new(change, strength).unwrap().to_device(&device()).unwrap();
        adapters.attach(module.clone(), Adapter::frozen(delta));
    }
    adapters
}

fn velocity(pipeline: &Pipeline) -> Tensor {
    velocities(pipeline, &[golden_input(&fixture_tensors("dit/t2v/io.safetensors"))]).remove(0)
}

/// Adapters as training leaves them: some of the modules, both factors random, scaled by the rule of `scaling`.
fn live(scaling: Scaling) -> Adapters {
    let config = LoraConfig { rank: Some(5), alpha: Some(3.7), scaling, ..LoraConfig::default() };
    let (dit, _) = tiny_weights("official");
    let targets = config.select(&dit.adaptable_modules()).unwrap();
    let mut adapters = Adapters::fresh(&targets, &config, 9, &device()).unwrap();
    let trained = adapters.parameters().into_iter().map(|(name, parameter)| {
        let moved = (&parameter + (randn(&name, parameter.shape()) * 0.2).unwrap()).unwrap();
        (name, moved)
    });
    adapters.set_parameters(&trained.collect());
    adapters
}

#[test]
fn an_exported_adapter_is_the_one_in_training() {
    let folder = tempfile::tempdir().unwrap();
    let base = velocity(&model(&Adapters::default()));
    for scaling in [Scaling::Standard, Scaling::RsLora] {
        let live = live(scaling);
        let expected = velocity(&model(&live));
        assert!(difference(&expected, &base).0 > 0.1, "the adapter does nothing");
        let file = trainer::train::export::adapter_file(&live).unwrap();
        for style in STYLES {
            let what = format!("{style:?}, {scaling:?}");
            let path = folder.path().join("adapter.safetensors");
            write(&path, &file, style, Precision::Float32).unwrap();
            let back = read(&path).unwrap();
            assert_close(&what, &velocity(&model(&frozen(&back, 1.0))), &expected, SAME);
            assert_close(&format!("{what}, merged"), &velocity(&merged(&back, 1.0)), &expected, SAME);
        }
    }
}

/// Half precision moves the velocity by no more than its own rounding: 2^-8 in each factor of a delta that itself moves
/// the velocity by about 1.
#[test]
fn an_adapter_in_bfloat16_is_near_the_one_in_training() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.safetensors");
    let live = live(Scaling::Standard);
    let (base, expected) = (velocity(&model(&Adapters::default())), velocity(&model(&live)));
    let file = trainer::train::export::adapter_file(&live).unwrap();
    for style in STYLES {
        write(&path, &file, style, Precision::Bfloat16).unwrap();
        let got = velocity(&model(&frozen(&read(&path).unwrap(), 1.0)));
        let (moved, error) = (difference(&expected, &base).0, difference(&got, &expected).0);
        assert!(error < 0.02 * moved, "{style:?}: {error}, where the adapter moves {moved}");
    }
}

#[test]
fn golden_adapters_give_golden_velocities() {
    let golden = fixture_tensors("lora/t2v/merged_output.safetensors");
    assert_close("base", &velocity(&model(&Adapters::default())), &golden["output_base"], GOLDEN);
    for name in ["comfy_ab", "comfy_updown_alpha", "kohya", "peft_diffusers", "peft_diffusers_folded"] {
        let file = read(&fixture(&format!("lora/t2v/{name}.safetensors"))).unwrap();
        for (strength, key) in [(1.0, "output_merged"), (0.5, "output_merged_strength_0.5")] {
            let what = format!("{name} at {strength}");
            let attached = velocity(&model(&frozen(&file, strength)));
            assert_close(&what, &attached, &golden[key], GOLDEN);
            assert_close(
                &format!("{what}, merged"),
                &velocity(&merged(&file, strength)),
                &golden[key],
                GOLDEN,
            );
        }
        let unmerged = velocity(&model(&frozen(&file, 1.0)));
        assert_close(&format!("{name}, PEFT"), &unmerged, &golden["output_adapter_unmerged"], GOLDEN);
    }
}

/// Two adapters at once are the sum of their deltas.
#[test]
fn adapters_add_up() {
    let file = trainer::train::export::adapter_file(&live(Scaling::Standard)).unwrap();
    let mut two = frozen(&file, 0.3);
    for (module, adapters) in frozen(&file, 0.7).iter() {
        adapters.iter().for_each(|adapter| two.attach(module.to_owned(), adapter.clone()));
    }
    assert_close("0.3 + 0.7", &velocity(&model(&two)), &velocity(&model(&frozen(&file, 1.0))), SAME);
    let none = velocity(&model(&frozen(&file, 0.0)));
    assert_same_bits("strength 0", &none, &velocity(&model(&Adapters::default())));
}
