//! Presets named after other trainers: noise levels, weights and scales follow those trainers' formulas.

use trainer::error::Error;
use trainer::learning::noise::TimestepConfig;
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
