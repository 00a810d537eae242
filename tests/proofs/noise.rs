//! Noise levels: drawn from the documented distributions, rejected and not clamped at their ends, weighted as published,
//! and a function of seed, step and slot alone.

use std::collections::HashSet;

use kernels::random::Key;
use proofs::fixture_tensors;
use trainer::learning::noise::{Distribution, Streams, TimestepConfig, Weighting, bsmntw};

const DRAWS: u64 = 20_000;
/// Kolmogorov and Smirnov's distance of 20 000 right draws is beyond this once in a thousand times: 1.95 / sqrt(n).
pub(crate) const KS: f64 = 0.0138;

/// The standard normal distribution function, by Abramowitz and Stegun 7.1.26: within 1.5e-7.
pub(crate) fn normal_cdf(z: f64) -> f64 {
    let x = z.abs() / std::f64::consts::SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * x);
    let factors = [1.061_405_429, -1.453_152_027, 1.421_413_741, -0.284_496_736, 0.254_829_592];
    let tail = factors.iter().fold(0.0, |sum, factor| (sum + factor) * t) * (-x * x).exp();
    if z > 0.0 { 1.0 - tail / 2.0 } else { tail / 2.0 }
}

/// The share of draws that a distribution should have below `sigma`, from its formula.
fn cdf(config: &TimestepConfig, sigma: f64) -> f64 {
    let shift = config.shift();
    let unshifted = sigma / (shift - (shift - 1.0) * sigma);
    let logit = (unshifted / (1.0 - unshifted)).ln();
    match config.distribution {
        Distribution::Uniform => unshifted,
        Distribution::Shift | Distribution::Sigmoid => normal_cdf(logit / config.scale),
        Distribution::LogitNormal => normal_cdf((logit - config.mean) / config.std),
    }
}

/// The largest distance of the draws from `expected`.
pub(crate) fn distance(config: &TimestepConfig, expected: impl Fn(f64) -> f64) -> f64 {
    let streams = Streams::new(5);
    let mut sigmas: Vec<f64> =
        (0..DRAWS).map(|i| config.sigma(streams.sigma(i / 4, i % 4)).unwrap()).collect();
    sigmas.sort_by(f64::total_cmp);
    let gap = |(i, &sigma): (usize, &f64)| {
        let (below, above) = (i as f64 / DRAWS as f64, (i + 1) as f64 / DRAWS as f64);
        (expected(sigma) - below).abs().max((expected(sigma) - above).abs())
    };
    sigmas.iter().enumerate().map(gap).fold(0.0, f64::max)
}

fn configs() -> Vec<TimestepConfig> {
    let default = TimestepConfig::default();
    let of = |distribution| TimestepConfig { distribution, ..default.clone() };
    vec![
        default.clone(),
        TimestepConfig { shift: Some(12.0), scale: 0.8, ..default.clone() },
        of(Distribution::Uniform),
        TimestepConfig { shift: Some(5.0), ..of(Distribution::Uniform) },
        TimestepConfig { scale: 1.7, ..of(Distribution::Sigmoid) },
        TimestepConfig { mean: -0.6, std: 0.7, ..of(Distribution::LogitNormal) },
    ]
}

#[test]
fn draws_follow_their_distribution() {
    for config in configs() {
        let distance = distance(&config, |sigma| cdf(&config, sigma));
        assert!(distance < KS, "{config:?}: {distance}");
    }
    // The bound can be missed: shift 3 is not shift 2.8.
    let shift_3 = TimestepConfig::default();
    let other = TimestepConfig { shift: Some(2.8), ..shift_3.clone() };
    assert!(distance(&shift_3, |sigma| cdf(&other, sigma)) > KS);
}

#[test]
fn a_range_cuts_the_distribution_and_does_not_bend_it() {
    let (min, max) = (0.35, 0.8);
    for config in configs() {
        let cut = TimestepConfig { min, max, ..config.clone() };
        let (low, high) = (cdf(&config, min), cdf(&config, max));
        let expected = |sigma: f64| {
            assert!((min..=max).contains(&sigma), "{sigma} is outside");
            (cdf(&config, sigma) - low) / (high - low)
        };
        let distance = distance(&cut, expected);
        assert!(distance < KS, "{cut:?}: {distance}");
    }
}

#[test]
fn a_range_that_is_never_met_is_refused() {
    let far = TimestepConfig {
        distribution: Distribution::LogitNormal,
        mean: -20.0,
        std: 0.1,
        min: 0.9,
        ..TimestepConfig::default()
    };
    let text = far.check().unwrap_err().to_string();
    assert!(text.contains("train.timesteps.min"), "{text}");
    for (min, max) in [(0.5, 0.5), (0.6, 0.4), (-0.1, 1.0), (0.0, 1.1), (f64::NAN, 1.0)] {
        assert!(TimestepConfig { min, max, ..TimestepConfig::default() }.check().is_err(), "{min} .. {max}");
    }
}

#[test]
fn the_bell_equals_its_golden_table() {
    let golden = fixture_tensors("schedulers/tables.safetensors");
    let values = |name: &str| golden[name].to_vec1::<f32>().unwrap();
    let (timesteps, expected) = (values("train.timesteps_shift5"), values("train.bsmntw_weight_shift5"));
    for (timestep, expected) in timesteps.into_iter().zip(expected) {
        // Weights up to 2, stored in float32 after float32 arithmetic over a thousand of them.
        let got = bsmntw(f64::from(timestep) / 1000.0);
        assert!((got - f64::from(expected)).abs() < 2e-5, "{timestep}: {got}, expected {expected}");
    }
    let weighting = |weighting| TimestepConfig { weighting, ..TimestepConfig::default() }.weight(0.3);
    assert_eq!((weighting(Weighting::None), weighting(Weighting::Bsmntw)), (1.0, bsmntw(0.3)));
}

/// The correlation of two rows of numbers.
fn correlation(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(x * y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn a_draw_is_a_function_of_seed_purpose_step_and_slot_alone() {
    let keys = |seed: u64, step: u64, slot: u64| -> [Key; 5] {
        let s = Streams::new(seed);
        [
            s.sigma(step, slot),
            s.noise(step, slot),
            s.caption(step, slot),
            s.dropout(step, slot),
            s.eval(step, slot),
        ]
    };
    let mut all = HashSet::new();
    for (seed, step, slot) in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1), (1, 2, 3), (1, 3, 2)] {
        for (key, again) in keys(seed, step, slot).into_iter().zip(keys(seed, step, slot)) {
            assert_eq!(key.normals(9), again.normals(9), "the same draw gives other numbers");
            assert!(all.insert(key), "two draws share a stream: seed {seed}, step {step}, slot {slot}");
        }
    }
    const COUNT: usize = 40_000;
    let rows: Vec<Vec<f32>> = all.iter().map(|key| key.normals(COUNT)).collect();
    for (i, a) in rows.iter().enumerate() {
        for b in &rows[i + 1..] {
            // Independent numbers have a standard deviation of 1 / sqrt(n); five of them.
            let correlation = correlation(a, b);
            assert!(
                correlation.abs() < 5.0 / (COUNT as f64).sqrt(),
                "two streams go together: {correlation}"
            );
        }
    }
}
