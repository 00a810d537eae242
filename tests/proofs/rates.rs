//! Learning rates: every schedule is its reference implementation's, runs keep the rates that they had, and what contradicts
//! itself is refused.

use proofs::{fixture, fixture_json};
use serde_json::Value;
use trainer::learning::lr::{LrSchedule, Rates, WarmUp};
use trainer::learning::optim::OptimizerConfig;
use trainer::tools::probe::schedule;

fn numbers(values: &Value) -> Vec<f64> {
    values.as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
}

#[test]
fn every_schedule_is_that_of_its_reference() {
    let golden = fixture_json("learning/schedules.json");
    let got = schedule::rates(&fixture("learning/schedules.json")).unwrap();
    let (golden, got) = (golden["lr_of_step"].as_object().unwrap(), got["lr_of_step"].as_object().unwrap());
    assert_eq!(got.len(), 15);
    for (name, expected) in golden {
        let (expected, got) = (numbers(expected), numbers(&got[name]));
        assert_eq!(expected.len(), got.len(), "{name}");
        for (step, (got, expected)) in got.into_iter().zip(expected).enumerate() {
            // Both are float64: the order of operations differs.
            assert!(
                (got - expected).abs() <= 1e-9 * expected.abs(),
                "{name} step {step}: {got}, not {expected}"
            );
        }
    }
}

fn config(text: &str) -> OptimizerConfig {
    toml::from_str(text).unwrap()
}

/// The rates of the three schedules that there always were, by the formula that they had, to the bit.
#[test]
fn runs_of_before_keep_their_rates_bit_for_bit() {
    for (warmup, steps) in [(0u64, 17u64), (10, 300), (50, 1000), (10, 3)] {
        for name in ["constant", "linear", "cosine"] {
            let rates = config(&format!("lr = 2e-4\nschedule = \"{name}\"\nwarmup = {warmup}")).rates(steps);
            for step in 0..steps {
                let progress = || (step - warmup) as f64 / (steps - warmup) as f64;
                let before = match name {
                    _ if step < warmup => 2e-4 * (step + 1) as f64 / (warmup + 1) as f64,
                    "constant" => 2e-4,
                    "linear" => 2e-4 * (1.0 - progress()),
                    _ => 2e-4 * 0.5 * (1.0 + (std::f64::consts::PI * progress()).cos()),
                };
                assert_eq!(rates.at(step).to_bits(), before.to_bits(), "{name}, {step} of {steps}");
            }
        }
    }
}

/// No update of a run is made with the rate 0 but where transformers' convention is asked for, and the peak is reached.
#[test]
fn a_warm_up_ends_at_the_peak_and_begins_where_it_is_told() {
    let rates = |text: &str| -> Rates { config(&format!("lr = 1.0\nwarmup = 8\n{text}")).rates(100) };
    for schedule in ["constant", "linear", "cosine", "polynomial", "inverse-sqrt", "rex"] {
        let of = |more: &str| rates(&format!("schedule = \"{schedule}\"\n[rate]\n{more}"));
        assert!((of("").at(0) - 1.0 / 9.0).abs() < 1e-15 && (of("").at(8) - 1.0).abs() < 1e-15, "{schedule}");
        assert_eq!((of("warmup_start = 0.0").at(0), of("warmup_start = 0.0").at(4)), (0.0, 0.5));
        assert_eq!((of("warmup_start = 0.25").at(0), of("warmup_start = 0.25").at(4)), (0.25, 0.625));
        // torch's ConstantLR.
        let third = of("warmup_start = 0.25\nwarmup_shape = \"constant\"");
        assert_eq!([0, 7, 8].map(|step| third.at(step)), [0.25, 0.25, 1.0], "{schedule}");
    }
    let one_cycle = rates("schedule = \"one-cycle\"");
    assert_eq!(one_cycle.warmup, WarmUp::above_zero(8), "which `check` refuses");
    let one_cycle = config("lr = 1.0\nschedule = \"one-cycle\"").rates(100);
    assert!((one_cycle.at(0) - 0.04).abs() < 1e-12 && (one_cycle.at(29) - 1.0).abs() < 1e-12);
    assert!((one_cycle.at(99) - 4e-6).abs() < 1e-18);
}

#[test]
fn contradictions_of_a_schedule_are_refused_by_their_key() {
    for (settings, steps, told) in [
        ("schedule = \"linear\"\n[rate]\ncycles = 2", 100, "optimizer.rate.cycles"),
        ("[rate]\nfloor = 0.1", 100, "optimizer.rate.floor"),
        ("schedule = \"cosine\"\n[rate]\nfloor = 1.0", 100, "optimizer.rate.floor"),
        ("schedule = \"cosine\"\n[rate]\ncycles = 0", 100, "optimizer.rate.cycles"),
        ("schedule = \"polynomial\"\n[rate]\npower = -1.0", 100, "optimizer.rate.power"),
        ("schedule = \"one-cycle\"\n[rate]\nphases = 4", 100, "optimizer.rate.phases"),
        ("schedule = \"one-cycle\"\n[rate]\nrise = 0.0", 100, "optimizer.rate.rise"),
        ("schedule = \"one-cycle\"", 3, "optimizer.rate.rise"),
        ("schedule = \"one-cycle\"\n[rate]\nphases = 3\nrise = 0.6", 100, "optimizer.rate.rise"),
        ("schedule = \"one-cycle\"\nwarmup = 5", 100, "optimizer.warmup"),
        ("schedule = \"one-cycle\"\n[rate]\nwarmup_start = 0.1", 100, "optimizer.rate.warmup_start"),
        ("warmup = 0\n[rate]\nwarmup_shape = \"constant\"", 100, "optimizer.rate.warmup_shape"),
        ("kind = \"adafactor\"\nrelative_step = true\nwarmup = 5", 100, "optimizer.warmup"),
        ("kind = \"schedule-free\"\nschedule = \"rex\"", 100, "optimizer.schedule"),
    ] {
        let config = config(settings);
        let why = config.check().and_then(|()| config.rates(steps).check()).unwrap_err().to_string();
        assert!(why.contains(told), "{settings}: {why}");
    }
    // A quick trial is one, whatever the warm-up of the real run.
    let note = |steps: u64| config("warmup = 100").rates(steps).note();
    assert!(note(3).unwrap().contains("optimizer.warmup = 100 is longer than the run of 3 steps"));
    assert_eq!(note(100), None);
    assert!(!LrSchedule::InverseSqrt.depends_on_length() && LrSchedule::Rex.depends_on_length());
}
