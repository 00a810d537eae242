//! Presets named after other trainers: noise levels, weights and scales follow those trainers' formulas.

use kernels::optimiser::State;
use kernels::{Device, Tensor};
use proofs::fixture_json;
use serde_json::Value;
use trainer::error::Error;
use trainer::learning::ema;
use trainer::learning::noise::distribution::{ROWS, descending, row, row_of};
use trainer::learning::noise::{Grid, Input, TimestepConfig};
use trainer::learning::optim::{Items, OptimizerKind, Step, clip_factor};
use trainer::recipe::Recipe;

use crate::noise::{KS, distance, normal_cdf};

const SECTIONS: &str = "[model]\nfolder = \"m\"\n[data]\nfolder = \"c\"\n";

fn read(text: &str) -> Result<Recipe, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("recipe.toml");
    std::fs::write(&path, format!("{SECTIONS}{text}")).unwrap();
    Recipe::read(&path)
}

fn like(name: &str) -> Recipe {
    read(&format!("[train]\nlike = \"{name}\"\n")).unwrap()
}

fn logit(x: f64) -> f64 {
    (x / (1.0 - x)).ln()
}

/// The share of timesteps below 1000 sigma, as each trainer draws them.
///
/// musubi-tuner, `timestep_sampling = "shift"`: t = sigmoid(z), then t <- s t / (1 + (s - 1) t) with s = 3.
/// diffusion-pipe, `logit_normal`, and ai-toolkit, `sigmoid`: t = sigmoid(z).
/// DiffSynth-Studio: an even choice out of t = 5 u / (1 + 4 u) with u = 1, 0.999, ... 0.001.
fn share_below(trainer: &str, sigma: f64) -> f64 {
    match trainer {
        "musubi-tuner" => normal_cdf(logit(sigma / (3.0 - 2.0 * sigma))),
        "diffusion-pipe" | "ai-toolkit" => normal_cdf(logit(sigma)),
        _ => {
            (1..=1000).filter(|u| f64::from(5 * u) / f64::from(1000 + 4 * u) <= sigma).count() as f64 / 1000.0
        }
    }
}

#[test]
fn noise_is_drawn_as_each_trainer_draws_it() {
    for trainer in ["musubi-tuner", "diffusion-pipe", "ai-toolkit", "diffsynth-studio"] {
        let config = like(trainer).train.timesteps;
        // DiffSynth's grid has a thousand places, and ours none.
        let bound = KS + 1e-3;
        let distance = distance(&config, |sigma| share_below(trainer, sigma));
        assert!(distance < bound, "{trainer}: {distance}");
    }
    // None of the three would pass for another.
    let musubi = like("musubi-tuner").train.timesteps;
    assert!(distance(&musubi, |sigma| share_below("ai-toolkit", sigma)) > 10.0 * KS);
    assert!(distance(&musubi, |sigma| share_below("diffsynth-studio", sigma)) > 5.0 * KS);
}

/// DiffSynth-Studio's own scripts give the shares of the experts for high noise as 0.417 (from 0.875) and 0.358 (from 0.9); its
/// bell is 0 at pure noise and 1 on average over its grid.
#[test]
fn diffsynth_weighs_and_shares_as_published() {
    let config = like("diffsynth-studio").train.timesteps;
    let grid: Vec<f64> = (1..=1000).map(|u| f64::from(5 * u) / f64::from(1000 + 4 * u)).collect();
    for (boundary, published) in [(0.875, 0.417), (0.9, 0.358)] {
        let share = grid.iter().filter(|sigma| **sigma >= boundary).count() as f64 / 1000.0;
        assert!((share - published).abs() < 1.5e-3, "{boundary}: {share}");
        let ours = 1.0 - share_below("diffsynth-studio", boundary);
        assert!((ours - published).abs() < 1.5e-3, "{boundary}: {ours}");
    }
    let bell = |sigma: f64| (-2.0 * (sigma - 0.5) * (sigma - 0.5)).exp() - (-0.5f64).exp();
    let mean = grid.iter().map(|sigma| bell(*sigma)).sum::<f64>() / 1000.0;
    for sigma in [0.01, 0.2, 0.5, 0.77, 0.95, 1.0] {
        let (got, expected) = (config.weight(sigma), bell(sigma) / mean);
        // Sums of a thousand doubles.
        assert!((got - expected).abs() < 1e-9, "{sigma}: {got}, expected {expected}");
    }
    for other in ["musubi-tuner", "diffusion-pipe", "ai-toolkit"] {
        assert_eq!(like(other).train.timesteps.weight(0.95), 1.0, "{other} weighs nothing");
    }
}

#[test]
fn a_change_counts_and_is_clipped_as_in_each_trainer() {
    let scale = |name: &str| like(name).adapter.alpha() / like(name).adapter.rank() as f64;
    assert_eq!(scale("musubi-tuner"), 1.0 / 32.0, "its alpha is 1");
    for other in ["diffusion-pipe", "ai-toolkit", "diffsynth-studio"] {
        assert_eq!(scale(other), 1.0, "{other}: alpha is the rank");
    }
    let optimizer = |name: &str| like(name).optimizer;
    assert_eq!(optimizer("diffsynth-studio").clip_norm, 0.0, "it clips nothing");
    assert_eq!(
        (optimizer("diffusion-pipe").betas(), optimizer("diffusion-pipe").warmup()),
        ([0.9, 0.99], 100)
    );
    assert_eq!((optimizer("musubi-tuner").lr, optimizer("ai-toolkit").weight_decay), (2e-4, 1e-4));
    assert_eq!(optimizer("ai-toolkit").eps, 1e-6, "it sets its own");
    for of_8_bit in ["musubi-tuner", "ai-toolkit"] {
        assert_eq!(optimizer(of_8_bit).kind, OptimizerKind::AdamW8bit, "{of_8_bit}");
    }
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

fn assert_near(what: &str, got: &[f64], expected: &Value, bound: f64) {
    for (i, (got, expected)) in got.iter().zip(numbers(expected)).enumerate() {
        assert!((got - expected).abs() <= bound, "{what} {i}: {got}, not {expected}");
    }
}

/// Ten steps of each trainer's own arithmetic, from the formulas that it publishes (tests/fixtures/presets/make_presets.py): the
/// draws of noise levels, their weights, the rates, what becomes of a tensor, and of its average.
#[test]
fn ten_steps_are_those_of_each_trainer() {
    let golden = fixture_json("presets/presets.json");
    let (u, n) = (numbers(&golden["u"]), numbers(&golden["n"]));
    for (name, expected) in golden["presets"].as_object().unwrap() {
        let recipe = like(name);
        let timesteps = &recipe.train.timesteps;
        let draw = timesteps.draw();
        let sigma = |step: usize| {
            let x = if draw.input() == Input::Normal { n[step] } else { u[step] };
            let drawn = match timesteps.grid {
                Grid::None => draw.sigma(x),
                Grid::Descending => descending(draw.sigma(x)),
                Grid::Quantiles => row(draw, row_of(u[step], ROWS)),
            };
            trainer::solver::shifted(drawn, timesteps.shift())
        };
        let sigmas: Vec<f64> = (0..10).map(sigma).collect();
        let weights: Vec<f64> = sigmas.iter().map(|sigma| timesteps.weight(*sigma)).collect();
        assert_near(&format!("{name} sigma"), &sigmas, &expected["sigma"], 1e-9);
        assert_near(&format!("{name} weight"), &weights, &expected["weight"], 1e-9);
        let scale = recipe.adapter.scale();
        assert_near(&format!("{name} scale"), &[scale], &serde_json::json!([expected["scale"]]), 1e-12);

        let (rates, rule) = (recipe.optimizer.rates(1000), recipe.optimizer.rule());
        let tensor = |value: &Value| {
            let numbers: Vec<f32> = numbers(value).into_iter().map(|number| number as f32).collect();
            Tensor::from_vec(numbers, (4, 6), &Device::Cpu).unwrap()
        };
        let read = |x: &Tensor| -> Vec<f64> {
            x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f64::from).collect()
        };
        let mut state: State = rule.begin(&tensor(&golden["p0"])).unwrap();
        let (mut globals, mut average) = (rule.globals(), state.parameter.clone());
        for step in 0..10 {
            let lr = rates.at(step as u64);
            assert_near(&format!("{name} rate"), &[lr], &serde_json::json!([expected["lr"][step]]), 1e-12);
            let gradient = tensor(&golden["grad"][step]);
            let norm = read(&gradient).iter().map(|g| g * g).sum::<f64>().sqrt();
            let factor = clip_factor(norm, recipe.optimizer.clip_norm);
            let mut items = [Items { rate: 1.0, tensors: vec![(&mut state, &gradient)] }];
            rule.update(&mut items, &mut globals, &Step { lr, factor, number: step as u64 + 1 }).unwrap();
            // f32 here, f64 there; PyTorch clips by the norm and a millionth.
            let what = format!("{name} step {step}");
            assert_near(&what, &read(&state.parameter), &expected["p"][step], 1e-7);
            if recipe.train.ema.is_kept() {
                average = ema::step(&average, &state.parameter, recipe.train.ema.decay).unwrap();
                assert_near(&format!("{what}, average"), &read(&average), &expected["average"][step], 1e-7);
            }
        }
        assert_eq!(recipe.train.ema.is_kept(), expected.get("average").is_some(), "{name}");
    }
}

/// What a recipe sets in place of a default takes the defaults with it that would contradict it.
#[test]
fn a_preset_contradicts_no_key_of_the_recipe() {
    for (trainer, train, optimizer) in [
        ("diffsynth-studio", "", "warmup = 0"),
        ("diffusion-pipe", "timesteps = { stratified = true }", "schedule = \"one-cycle\""),
        ("musubi-tuner", "timesteps = { distribution = \"flux-shift\" }", ""),
        ("ai-toolkit", "", "kind = \"schedule-free\""),
    ] {
        let text = format!("[train]\nlike = \"{trainer}\"\n{train}\n[optimizer]\n{optimizer}\n");
        let recipe = read(&text).unwrap();
        recipe.train.timesteps.check().unwrap();
        recipe.optimizer.check().unwrap();
        recipe.optimizer.check_average(&recipe.train.ema).unwrap();
    }
}

/// The recipe's values take precedence; the values that the preset sets are reported, and no others.
#[test]
fn the_recipe_goes_before_the_preset() {
    let text = "[train]\nlike = \"musubi-tuner\"\ntimesteps = { shift = 7.0 }\n[adapter]\nalpha = 16\n[optimizer]\nlr = 3e-5\n";
    let recipe = read(text).unwrap();
    assert_eq!(
        (recipe.train.timesteps.shift(), recipe.adapter.alpha(), recipe.optimizer.lr),
        (7.0, 16.0, 3e-5)
    );
    let told: Vec<&str> = recipe.taken.iter().map(|taken| taken.key).collect();
    assert!(told.contains(&"train.caption_dropout") && recipe.train.caption_dropout == 0.0, "{told:?}");
    for written in ["train.timesteps.shift", "adapter.alpha", "optimizer.lr"] {
        assert!(!told.contains(&written), "{written} is reported and was not set");
    }
    let plain = read("").unwrap();
    assert_eq!((plain.taken.len(), &plain.train.timesteps), (0, &TimestepConfig::default()));
    assert!(
        recipe.taken.iter().all(|taken| taken.to_string().starts_with(taken.key) && !taken.source.is_empty())
    );
    let refused = read("[train]\nlike = \"kohya\"\n").unwrap_err().to_string();
    assert!(refused.contains("kohya") && refused.contains("musubi-tuner"), "{refused}");
}
