//! Noise levels: drawn from the documented distributions, rejected and not clamped at their ends, weighted as published,
//! and a function of seed, step and slot alone.

use std::collections::HashSet;

use kernels::random::Key;
use proofs::{fixture, fixture_json, fixture_tensors};
use trainer::learning::noise::{
    Distribution, EVAL_SIGMAS, Grid, Place, Streams, TimestepConfig, Weighting, bsmntw,
};
use trainer::tools::probe::timesteps;

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
        Distribution::Logsnr => normal_cdf((2.0 * logit + config.mean) / config.std),
        Distribution::Style => unshifted.cbrt(),
        Distribution::Content => 1.0 - (1.0 - unshifted).cbrt(),
        // Beta(2, 2).
        Distribution::Beta => unshifted * unshifted * (3.0 - 2.0 * unshifted),
        Distribution::Mode => {
            // Counted over a grid of u.
            let mode =
                |u: f64| 1.0 - u - config.scale * ((std::f64::consts::FRAC_PI_2 * u).cos().powi(2) - 1.0 + u);
            (0..10_000).filter(|i| mode((f64::from(*i) + 0.5) / 1e4) < unshifted).count() as f64 / 1e4
        }
        other => panic!("{other:?} depends on the size of a clip"),
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
        TimestepConfig { mean: 1.0, std: 2.0, ..of(Distribution::Logsnr) },
        TimestepConfig { scale: 1.29, shift: Some(3.0), ..of(Distribution::Mode) },
        TimestepConfig { scale: -0.5, ..of(Distribution::Mode) },
        of(Distribution::Beta),
        of(Distribution::Content),
        of(Distribution::Style),
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

/// Every map of the golden values. A grid may put a number that is at one of its points on either side of it.
#[test]
fn noise_levels_equal_their_golden_values() {
    let golden = fixture_json("learning/timesteps.json");
    let got = timesteps::sigmas(&fixture("learning/timesteps.json")).unwrap();
    let (golden, got) = (golden["cases"].as_array().unwrap(), got["cases"].as_array().unwrap());
    assert_eq!(golden.len(), 40);
    let number = |value: &serde_json::Value| value.as_f64().unwrap();
    for (expected, got) in golden.iter().zip(got) {
        let name = expected["name"].as_str().unwrap();
        assert_eq!((&expected["name"], &expected["input"]), (&got["name"], &got["input"]));
        for (key, value) in expected["params"].as_object().unwrap() {
            let (value, got) = (number(value), number(&got["params"][key]));
            assert!((value - got).abs() <= 1e-12 * value.abs(), "{name} {key}: {got}, not {value}");
        }
        let (rows, mut moved) = (expected["sigma"].as_array().unwrap(), 0);
        for (i, (expected, got)) in rows.iter().zip(got["sigma"].as_array().unwrap()).enumerate() {
            let gap = (number(expected) - number(got)).abs();
            // One timestep of 1000, or the widest gap between two rows of the table; at most one draw in fifty is so near to one.
            let step = if name.ends_with("_grid") { 1.000_001e-3 } else { 1e-4 };
            let is_grid = name.ends_with("_grid") || name.starts_with("quantile");
            moved += usize::from(gap > 1e-6);
            assert!(gap <= if is_grid { step } else { 1e-6 }, "{name} {i}: {got}, not {expected}");
        }
        assert!(moved <= 1, "{name}: {moved} draws fell on another point of the grid");
    }
}

/// The histogram that a plan shows is that of the draws, and stratified draws fall into every part of it alike.
#[test]
fn the_histogram_is_that_of_the_draws() {
    const PARTS: usize = 10;
    for config in configs() {
        let config = TimestepConfig { min: 0.15, max: 0.93, ..config };
        for stratified in [false, true] {
            let config = TimestepConfig { stratified, ..config.clone() };
            config.check().unwrap();
            let (histogram, mut counted) = (config.histogram(PARTS), [0u32; PARTS]);
            assert!((histogram.iter().sum::<f64>() - 1.0).abs() < 1e-12, "{config:?}");
            for i in 0..DRAWS {
                let place = Place { index: (i % 4) as usize, count: 4 };
                let sigma = config.sigma_at(Streams::new(3).sigma(i / 4, i % 4), place).unwrap();
                counted[((sigma * PARTS as f64) as usize).min(PARTS - 1)] += 1;
            }
            for (part, (share, count)) in histogram.iter().zip(counted).enumerate() {
                let got = f64::from(count) / DRAWS as f64;
                // Five deviations of a share of that many draws.
                assert!(
                    (got - share).abs() < 5.0 * 0.5 / (DRAWS as f64).sqrt(),
                    "{config:?} {part}: {got}, {share}"
                );
            }
        }
    }
}

/// Each of the samples of a step has a draw in its own part of the distribution; alone it has all of it, and a draw is a function
/// of its place.
#[test]
fn stratified_draws_share_the_distribution_out() {
    let config = TimestepConfig { stratified: true, ..TimestepConfig::default() };
    let whole = TimestepConfig { stratified: false, ..config.clone() };
    let count = 8;
    for step in 0..50 {
        for index in 0..count {
            let key = Streams::new(9).sigma(step, index as u64);
            let sigma = config.sigma_at(key, Place { index, count }).unwrap();
            let below = 1.0 - whole.share_from(sigma);
            let part = index as f64 / count as f64;
            assert!(below > part - 1e-6 && below < part + 1.0 / count as f64 + 1e-6, "{index}: {below}");
            assert_eq!(sigma, config.sigma_at(key, Place { index, count }).unwrap());
        }
    }
}

#[test]
fn a_shift_by_size_is_that_of_the_clip() {
    let flux = TimestepConfig { distribution: Distribution::FluxShift, ..TimestepConfig::default() };
    let key = Streams::new(1).sigma(0, 0);
    assert!(flux.sigma(key).unwrap_err().to_string().contains("flux-shift"), "it needs a size");
    let small = flux.for_tokens(256);
    let fixed = TimestepConfig { shift: Some(0.5f64.exp()), ..TimestepConfig::default() };
    assert_eq!(small.sigma(key).unwrap(), fixed.sigma(key).unwrap());
    assert!(flux.for_tokens(4096).sigma(key).unwrap() > small.sigma(key).unwrap());
    assert!(
        EVAL_SIGMAS.iter().all(|sigma| flux.for_tokens(4096).share_from(*sigma) > small.share_from(*sigma))
    );
}

/// A grid gives its points and no other number.
#[test]
fn a_grid_is_drawn_from() {
    let of = |grid| TimestepConfig { grid, ..TimestepConfig::default() };
    let (descending, quantiles) = (of(Grid::Descending), of(Grid::Quantiles));
    let descending = TimestepConfig { distribution: Distribution::LogitNormal, mean: 1.0, ..descending };
    let mut mean = 0.0;
    for i in 0..2000 {
        let key = Streams::new(4).sigma(i, 0);
        let sigma = descending.sigma(key).unwrap();
        assert!((sigma * 1000.0 - (sigma * 1000.0).round()).abs() < 1e-9, "{sigma}");
        mean += sigma / 2000.0;
        // Shift 3 of the table's first and last row.
        let sigma = quantiles.sigma(key).unwrap();
        assert!((0.06..0.993).contains(&sigma), "{sigma}");
    }
    assert!(mean < 0.35, "a large index is little noise: {mean}");
    assert!((1.0 - descending.share_from(0.5) - 0.841).abs() < 1e-3);
}

/// Weights by sigma, and their golden values.
#[test]
fn weights_equal_their_golden_values() {
    let golden = fixture_json("learning/losses.json");
    let rows = |value: &serde_json::Value| -> Vec<f64> {
        value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
    };
    let sigmas = rows(&golden["sigmas"]);
    for (name, weighting) in [
        ("sigma_sqrt", Weighting::SigmaSqrt),
        ("cosmap", Weighting::Cosmap),
        ("bell", Weighting::Bell),
        ("sigma", Weighting::Sigma),
        ("min_snr_velocity", Weighting::MinSnrVelocity),
        ("min_snr_vpred", Weighting::MinSnrVpred),
    ] {
        for (sigma, expected) in sigmas.iter().zip(rows(&golden["weights"][name])) {
            let got = weighting.at(*sigma, 5.0);
            // The bell is a difference that is 0 at its ends.
            assert!(
                (got - expected).abs() <= 1e-5 * expected.abs() + 1e-12,
                "{name} at {sigma}: {got}, not {expected}"
            );
        }
    }
    let table = &golden["bell_index_table"];
    for (index, (bell, half)) in
        rows(&table["index"]).iter().zip(rows(&table["bell"]).into_iter().zip(rows(&table["half_bell"])))
    {
        let sigma = 1.0 - index / 1000.0;
        let close = |got: f64, expected: f64| (got - expected).abs() <= 1e-5 * expected + 1e-12;
        assert!(close(Weighting::Bell.at(sigma, 5.0), bell), "bell at {index}");
        assert!(close(Weighting::HalfBell.at(sigma, 5.0), half), "half bell at {index}");
    }
    assert!(Weighting::SigmaSqrt.at(0.0, 5.0) <= 1e6 && Weighting::MinSnrVpred.at(0.0, 5.0) == 0.0);
}

#[test]
fn settings_that_do_not_fit_the_distribution_are_refused() {
    for (settings, told) in [
        ("distribution = \"mode\"\nscale = 1.8", "train.timesteps.scale"),
        ("distribution = \"uniform\"\nalpha = 2.0", "train.timesteps.alpha"),
        ("distribution = \"beta\"\nbeta = 0.0", "train.timesteps.beta"),
        ("distribution = \"qwen-shift\"\nshift = 3.0", "train.timesteps.shift"),
        ("gamma = 5.0", "train.timesteps.gamma"),
        ("weighting = \"min-snr-velocity\"\ngamma = -1.0", "train.timesteps.gamma"),
        ("stratified = true\ngrid = \"quantiles\"", "train.timesteps.grid"),
    ] {
        let config: TimestepConfig = toml::from_str(settings).unwrap();
        let why = config.check().unwrap_err().to_string();
        assert!(why.contains(told), "{settings}: {why}");
    }
    let unknown = toml::from_str::<TimestepConfig>("distribution = \"cosine\"").unwrap_err().to_string();
    assert!(unknown.contains("cosine") && unknown.contains("logsnr"), "{unknown}");
}
