//! Learning rates of parts of an adapter, the limit of a change's norm, and averages of the adapters.

use std::collections::BTreeMap;

use data::Cursor;
use kernels::Tensor;
use kernels::optimiser::State;
use models::adapter::{AdapterKind, LoraConfig, Target};
use models::dit::Gradients;
use models::expert::Expert;
use proofs::small::{adapters, config, open_weights, pipeline};
use proofs::{Tolerance, assert_close, assert_same_bits, randn};
use trainer::learning::ema::EmaConfig;
use trainer::learning::optim::{NormLimit, Optimizer, OptimizerConfig, OptimizerKind, Step};
use trainer::train::checkpoint::{self, Progress};

const LR: f64 = 0.1;
const GROUPS: &str = "lr = 0.1\nlr_b_ratio = 4.0\nlr_high = 0.05\nlr_by_module = { \"ffn.*\" = 0.3, \"blocks.1.self_attn.*\" = 0.02 }";

fn read(text: &str) -> OptimizerConfig {
    toml::from_str(text).unwrap()
}

fn targets() -> Vec<Target> {
    LoraConfig::default().select(&config(2, 24).adaptable_modules()).unwrap()
}

/// An update of every tensor by a gradient of its own.
fn update(optimizer: &mut Optimizer, number: u64, lr: f64) {
    let mut gradients = Gradients::default();
    for (name, state) in optimizer.states() {
        let random = randn(&format!("{name}{number}"), state.parameter.shape());
        gradients.add(name.clone(), random.to_device(state.parameter.device()).unwrap()).unwrap();
    }
    optimizer.update(&gradients, &Step { lr, factor: 0.5, number }).unwrap();
}

#[test]
fn a_tensor_has_the_rate_of_its_group() {
    let groups = read(GROUPS);
    groups.check().unwrap();
    groups.check_groups(AdapterKind::Lora, &targets(), &[Expert::High]).unwrap();
    for (name, expert, rate) in [
        ("blocks.0.self_attn.q.lora_A.weight", None, 0.1),
        ("blocks.0.self_attn.q.lora_B.weight", None, 0.4),
        ("blocks.0.self_attn.q.lora_A.weight", Some(Expert::High), 0.05),
        ("blocks.0.self_attn.q.lora_B.weight", Some(Expert::Low), 0.4),
        ("blocks.1.self_attn.q.lora_A.weight", Some(Expert::High), 0.02),
        ("blocks.1.ffn.0.lora_B.weight", Some(Expert::High), 1.2),
        ("blocks.1.ffn.0.magnitude", None, 0.3),
    ] {
        let got = groups.factor(name, expert) * LR;
        assert!((got - rate).abs() < 1e-12, "{name} {expert:?}: {got}, not {rate}");
    }
}

/// Each tensor of a run with groups moves as in a run of its own rate alone, to rounding of the rate, under every optimiser that may have groups.
#[test]
fn groups_move_as_runs_of_their_own_rate() {
    let dit = config(2, 24);
    let pipeline = pipeline(&dit, &open_weights(&dit), &adapters(&dit, 4, 1.0), &[2]);
    let groups = read(GROUPS);
    for kind in [
        OptimizerKind::AdamW,
        OptimizerKind::AdamW8bit,
        OptimizerKind::Lion,
        OptimizerKind::Adafactor,
        OptimizerKind::ScheduleFree,
        OptimizerKind::Came,
        OptimizerKind::Muon,
    ] {
        let rule = OptimizerConfig { kind, ..OptimizerConfig::default() }.rule();
        let mut grouped = Optimizer::new(&pipeline, rule).unwrap().at_rates(|name| groups.factor(name, None));
        (1..=3).for_each(|number| update(&mut grouped, number, LR));
        let mut compared = 0;
        for factor in [1.0, 4.0, 0.3 / LR] {
            let mut alone = Optimizer::new(&pipeline, rule).unwrap();
            (1..=3).for_each(|number| update(&mut alone, number, LR * factor));
            for (name, state) in grouped.states() {
                if groups.factor(name, None) == factor {
                    // The rate is a product in the one and a number in the other; the same weight of schedule-free is a quotient.
                    let tolerance = Tolerance { absolute: 1e-6, relative: 1e-6 };
                    assert_close(
                        &format!("{kind} {name}"),
                        &state.parameter,
                        &alone.states()[name].parameter,
                        tolerance,
                    );
                    compared += 1;
                }
            }
        }
        assert!(compared > 10, "{kind}: {compared} tensors compared");
    }
}

#[test]
fn groups_that_contradict_each_other_are_refused() {
    for (settings, kind, told) in [
        ("lr_by_module = { \"ffn.*\" = 1e-5, \"blocks.0.*\" = 1e-4 }", AdapterKind::Lora, "blocks.0.ffn.0"),
        ("lr_by_module = { \"fnn.*\" = 1e-5 }", AdapterKind::Lora, "fnn.*"),
        ("lr_b_ratio = 16.0", AdapterKind::Loha, "optimizer.lr_b_ratio"),
        ("norm_limit = 1.0", AdapterKind::Dora, "optimizer.norm_limit"),
        ("lr_low = 1e-4", AdapterKind::Lora, "optimizer.lr_low"),
    ] {
        let why = read(settings).check_groups(kind, &targets(), &[Expert::High]).unwrap_err().to_string();
        assert!(why.contains(told), "{settings}: {why}");
    }
    for (settings, told) in [
        ("kind = \"prodigy\"\nlr = 1.0\nlr_b_ratio = 2.0", "optimizer.lr_b_ratio"),
        ("kind = \"adafactor\"\nrelative_step = true\nlr_high = 1e-4", "optimizer.lr_high"),
        ("kind = \"schedule-free\"\nnorm_limit = 1.0", "optimizer.norm_limit"),
        ("lr_by_module = { \"ffn.*\" = 0.0 }", "optimizer.lr_by_module"),
    ] {
        let why = read(settings).check().unwrap_err().to_string();
        assert!(why.contains(told), "{settings}: {why}");
    }
}

/// The Frobenius norm of `scale` B A, from the product itself.
fn norms(states: &BTreeMap<String, State>, scale: f64) -> Vec<f64> {
    let of = |(name, a): (&String, &State)| {
        let module = name.strip_suffix(".lora_A.weight")?;
        let b = &states[&format!("{module}.lora_B.weight")];
        let change = b.parameter.matmul(&a.parameter).unwrap();
        let square = change.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        Some(f64::from(square).sqrt() * scale)
    };
    states.iter().filter_map(of).collect()
}

#[test]
fn changes_above_the_norm_limit_are_scaled_to_it_and_others_are_left() {
    let dit = config(2, 24);
    let pipeline = pipeline(&dit, &open_weights(&dit), &adapters(&dit, 4, 1.0), &[2]);
    let scale = 0.7;
    let run = |limit: Option<NormLimit>| {
        let mut optimizer =
            Optimizer::new(&pipeline, OptimizerConfig::default().rule()).unwrap().limited(limit);
        update(&mut optimizer, 1, LR);
        optimizer
    };
    let free = run(None);
    let before = norms(free.states(), scale);
    let mut sorted = before.clone();
    sorted.sort_by(f64::total_cmp);
    let most = sorted[sorted.len() / 2] * 1.0001;
    let limited = run(Some(NormLimit { most, scale }));
    let after = norms(limited.states(), scale);
    for (before, after) in before.iter().zip(&after) {
        assert!(
            (after - before.min(most)).abs() < 1e-5 * most,
            "{before} became {after}, the limit is {most}"
        );
    }
    assert!(before.iter().any(|norm| *norm > most) && before.iter().any(|norm| *norm < most));
}

/// The average is that of its formula from the parameters of every step, in f32; a checkpoint in the middle changes no bit of it,
/// and what is shown is what was asked for.
#[test]
fn an_average_is_its_formula_and_goes_on_bit_for_bit() {
    let dit = config(2, 24);
    let pipeline = pipeline(&dit, &open_weights(&dit), &adapters(&dit, 4, 1.0), &[1, 1]);
    let decay = 0.9;
    for (kind, momentum) in [
        (OptimizerKind::AdamW, None),
        (OptimizerKind::AdamW8bit, None),
        (OptimizerKind::Adafactor, None),
        (OptimizerKind::Adafactor, Some(0.9)),
        (OptimizerKind::Prodigy, None),
    ] {
        let rule = OptimizerConfig { kind, momentum, lr: LR, ..OptimizerConfig::default() }.rule();
        let ema = EmaConfig { decay, files: false, ..EmaConfig::default() };
        let new = || Optimizer::new(&pipeline, rule).unwrap().averaged(ema).unwrap();
        let (mut straight, mut plain) = (new(), Optimizer::new(&pipeline, rule).unwrap());
        let mut expected: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        let numbers = |x: &Tensor| -> Vec<f64> {
            x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f64::from).collect()
        };
        for (name, state) in straight.states() {
            expected.insert(name.clone(), numbers(&state.parameter));
        }
        for number in 1..=4 {
            update(&mut straight, number, LR);
            update(&mut plain, number, LR);
            for (name, state) in straight.states() {
                assert_same_bits(name, &state.parameter, &plain.states()[name].parameter);
                let now = numbers(&state.parameter);
                let average = expected.get_mut(name).unwrap();
                average.iter_mut().zip(now).for_each(|(a, p)| *a = decay * *a + (1.0 - decay) * p);
            }
        }
        let (clips, files) = (straight.in_clips(), straight.in_files());
        assert!(clips.is_another() && !files.is_another());
        for (name, state) in straight.states() {
            assert_same_bits(name, files.of(state), &state.parameter);
            for (got, expected) in numbers(clips.of(state)).iter().zip(&expected[name]) {
                assert!((got - expected).abs() < 1e-6, "{kind} {name}: {got}, not {expected}");
            }
        }

        let mut halted = new();
        (1..=2).for_each(|number| update(&mut halted, number, LR));
        let folder = tempfile::tempdir().unwrap();
        let progress = Progress { step: 2, cursor: Cursor::default(), ..Progress::default() };
        let path = checkpoint::save(folder.path(), progress, &halted.saved(), 1).unwrap();
        let saved = checkpoint::load(&path).unwrap().1;
        let mut resumed = new();
        resumed.restore(saved.clone()).unwrap();
        (3..=4).for_each(|number| update(&mut resumed, number, LR));
        for (name, state) in straight.states() {
            let other = &resumed.states()[name];
            assert_same_bits(&format!("{kind} {name}"), &other.parameter, &state.parameter);
            assert_same_bits(&format!("{kind} average of {name}"), clips.of(other), clips.of(state));
        }
        // A run without an average does not go on from it, nor the other way round.
        assert!(Optimizer::new(&pipeline, rule).unwrap().restore(saved).is_err(), "{kind}");
        assert!(new().restore(plain.saved()).is_err(), "{kind}");
    }
}

#[test]
fn averages_that_are_used_by_nothing_are_refused() {
    for (settings, told) in [
        ("decay = 1.0", "train.ema.decay"),
        ("decay = 0.9\nclips = false\nfiles = false", "train.ema.decay"),
        ("files = false", "train.ema.files"),
    ] {
        let ema: EmaConfig = toml::from_str(settings).unwrap();
        let why = ema.check().unwrap_err().to_string();
        assert!(why.contains(told), "{settings}: {why}");
    }
    let kept = EmaConfig { decay: 0.9, ..EmaConfig::default() };
    let why = read("kind = \"schedule-free\"").check_average(&kept).unwrap_err().to_string();
    assert!(why.contains("train.ema.decay") && why.contains("schedule-free"), "{why}");
}
