//! Losses: each is its reference implementation's, with masks and without, and so is its gradient.

use kernels::Tensor;
use kernels::loss::{Penalty, Reduction, Terms, loss};
use models::dit::BlockPlan;
use proofs::small::{adapters, config, micro_batch, open_weights, pipeline, trained};
use proofs::{
    Tolerance, assert_close, assert_same_bits, device, fixture, fixture_json, fixture_tensors, randn,
};
use trainer::learning::loss::LossConfig;
use trainer::learning::mask;
use trainer::pipeline::{MicroBatch, Objective};
use trainer::tools::probe::{self, Inputs};

#[test]
fn every_loss_and_its_gradient_are_those_of_the_reference() {
    let golden = fixture_json("learning/losses.json");
    let tensors = fixture_tensors("learning/losses.safetensors");
    let inputs = Inputs::open(&fixture("learning/losses.safetensors")).unwrap();
    let (got, outputs) = probe::loss::run(&fixture("learning/losses.json"), &inputs).unwrap();
    let losses = golden["losses"].as_object().unwrap();
    assert_eq!(losses.len(), 40);
    for (name, expected) in losses {
        let (expected, got) = (expected.as_f64().unwrap(), got["losses"][name].as_f64().unwrap());
        // f32 sums here, f64 there.
        assert!((got - expected).abs() <= 1e-5 * expected, "{name}: {got}, not {expected}");
    }
    let (mut masks, mut gradients) = (0, 0);
    for (name, expected) in &tensors {
        let is_mask = name.ends_with(".latent") || name.starts_with("weight_");
        if name.starts_with("grad.") {
            let most = expected.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert_close(name, &outputs[name], expected, Tolerance::absolute(1e-5 * f64::from(most)));
            gradients += 1;
        } else if is_mask {
            assert_close(name, &outputs[name], expected, Tolerance::absolute(1e-6));
            masks += 1;
        }
    }
    assert_eq!((masks, gradients), (5, 24));
    for (name, expected) in golden["weights"].as_object().unwrap() {
        for (got, expected) in
            got["weights"][name].as_array().unwrap().iter().zip(expected.as_array().unwrap())
        {
            let (got, expected) = (got.as_f64().unwrap(), expected.as_f64().unwrap());
            assert!((got - expected).abs() <= 1e-5 * expected.abs() + 1e-12, "{name}: {got}, not {expected}");
        }
    }
}

const PENALTIES: [Penalty; 4] = [Penalty::Squared, Penalty::Absolute, Penalty::Huber, Penalty::PseudoHuber];
const REDUCTIONS: [Reduction; 3] = [Reduction::Elements, Reduction::Samples, Reduction::Batch];

/// A mask of ones changes no bit of any loss, beside frames that are left out too; one of zeros makes no loss, and no number
/// that is none.
#[test]
fn a_mask_of_ones_is_no_mask() {
    let shape = (2, 3, 5, 4, 6);
    let (p, y) = (randn("p", shape), randn("y", shape));
    let samples = Tensor::new(&[0.7f32, 1.3], &device()).unwrap();
    let scale = Tensor::new(&[0.2f32, 0.05], &device()).unwrap();
    let ones = Tensor::full(1f32, (2, 1, 5, 4, 6), &device()).unwrap();
    let given: Vec<f32> = [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0].to_vec();
    let given = Tensor::from_vec(given, (2, 1, 5, 1, 1), &device()).unwrap();
    for (penalty, reduction) in PENALTIES.into_iter().flat_map(|p| REDUCTIONS.map(|r| (p, r))) {
        for counted in [None, Some(&given)] {
            let of = |weights: Option<&Tensor>| {
                let terms =
                    Terms { penalty, scale: Some(&scale), samples: &samples, counted, weights, reduction };
                loss(&p, &y, &terms).unwrap()
            };
            let what = format!("{penalty:?} {reduction:?}, frames left out: {}", counted.is_some());
            assert_same_bits(&what, &of(Some(&ones)).value, &of(None).value);
            assert_same_bits(&what, &of(Some(&ones)).d_prediction, &of(None).d_prediction);
            let nothing = of(Some(&ones.zeros_like().unwrap()));
            assert_eq!(nothing.value.to_scalar::<f32>().unwrap(), 0.0, "{what}");
            let most = nothing.d_prediction.abs().unwrap().max_all().unwrap();
            assert_eq!(most.to_scalar::<f32>().unwrap(), 0.0, "{what}");
        }
    }
}

/// The first micro-batch with `objective`.
fn batch(objective: Objective) -> [MicroBatch; 1] {
    [MicroBatch { objective, ..micro_batch("masked", 2, 5, None) }]
}

/// The pipeline's own loss: what a mask leaves out changes no gradient, a mask of ones changes no bit, and two stages do what one
/// does.
#[test]
fn what_a_mask_leaves_out_is_not_learnt() {
    let dit = config(2, 24);
    let pipelines = [vec![2], vec![1, 1]]
        .map(|split| pipeline(&dit, &open_weights(&dit), &adapters(&dit, 3, 0.8), &split));
    let shape = (2, 1, 2, 4, 6);
    let left: Vec<f32> = (0..2 * 2 * 4 * 6).map(|i| if i % 6 < 3 { 1.0 } else { 0.0 }).collect();
    let left = Tensor::from_vec(left, shape, &device()).unwrap();
    for (penalty, reduction) in PENALTIES.into_iter().flat_map(|p| REDUCTIONS.map(|r| (p, r))) {
        let of = |weights: Option<Tensor>| {
            batch(Objective { penalty, scale: vec![0.3, 0.1], weights, reduction, ..Objective::default() })
        };
        let what = format!("{penalty:?} {reduction:?}");
        let trained = |batch: &[MicroBatch]| trained(&pipelines[0], batch, BlockPlan::default());
        let plain = trained(&of(None));
        let ones = trained(&of(Some(Tensor::full(1f32, shape, &device()).unwrap())));
        assert_eq!(plain.0, ones.0, "{what}");
        plain.1.iter().for_each(|(name, gradient)| assert_same_bits(name, &ones.1[name], gradient));
        let masked = trained(&of(Some(left.clone())));
        assert_ne!(plain.0, masked.0, "{what}");
        let mut other = of(Some(left.clone()));
        let outside = (left.affine(-7.0, 7.0).unwrap()).broadcast_as(other[0].target.shape()).unwrap();
        other[0].target = (&other[0].target + outside).unwrap();
        let other = trained(&other);
        assert_eq!(masked.0, other.0, "{what}");
        masked.1.iter().for_each(|(name, gradient)| assert_same_bits(name, &other.1[name], gradient));
        let split = proofs::small::trained(&pipelines[1], &of(Some(left.clone())), BlockPlan::default());
        assert_eq!(masked.0, split.0, "{what}");
        masked.1.iter().for_each(|(name, gradient)| assert_same_bits(name, &split.1[name], gradient));
    }
}

#[test]
fn a_mask_of_another_length_is_refused() {
    for (frames, height, width) in [(16, 16, 16), (5, 12, 16), (5, 16, 20)] {
        let pixels = Tensor::full(1f32, (1, frames, height, width), &device()).unwrap();
        let why = mask::of_latents(&pixels, 8).unwrap_err().to_string();
        assert!(why.contains(&format!("{frames} frames")), "{why}");
    }
    let still = Tensor::full(1f32, (1, 1, 16, 24), &device()).unwrap();
    assert_eq!(mask::of_latents(&still, 8).unwrap().dims(), [1, 1, 2, 3]);
}

#[test]
fn settings_that_do_not_fit_the_loss_are_refused() {
    for (settings, told) in [
        ("c = 0.1", "train.loss.c"),
        ("kind = \"l1\"\nc_schedule = \"snr\"", "train.loss.c_schedule"),
        ("kind = \"huber\"\nscale = \"2c\"", "train.loss.scale"),
        ("kind = \"huber\"\nc = 0.0", "train.loss.c"),
        ("kind = \"huber\"\nc = 2.0\nc_schedule = \"exponential\"", "train.loss.c"),
    ] {
        let config: LossConfig = toml::from_str(settings).unwrap();
        let why = config.check().unwrap_err().to_string();
        assert!(why.contains(told), "{settings}: {why}");
    }
    let unknown = toml::from_str::<LossConfig>("kind = \"log-cosh\"").unwrap_err().to_string();
    assert!(unknown.contains("log-cosh") && unknown.contains("pseudo-huber"), "{unknown}");
}
