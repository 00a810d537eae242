//! MagCache and few-step sampling: which steps are skipped is known ahead, and the loops give what the reference loops gave.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kernels::Tensor;
use models::adapter::Adapters;
use models::dit::{
    Base, Conditioning, Context, Gradients, Keep, Layer, LayerId, Linear, Pass, Role, Streams,
};
use models::expert::Networks;
use models::published::{Magnitudes, Published};
use models::weights::{Frozen, Weights};
use proofs::{Tolerance, assert_close, device, fixture, fixture_json, fixture_tensors, randn};
use trainer::base::DitFiles;
use trainer::encode::PictureInputs;
use trainer::encode::prompt::ClipRequest;
use trainer::learning::NoiseRange;
use trainer::pipeline::Pipeline;
use trainer::sample::magcache::{CacheConfig, Halves, MagCache, Table, skipped};
use trainer::sample::{Prompted, SampleConfig, Session};
use trainer::solver::{Convention, Schedule, SolverKind};
use trainer::tools::probe::{self, Inputs};

/// The fixture's: twenty steps in f32, where sums in another order differ by 1e-5.
const LATENTS: Tolerance = Tolerance::absolute(2e-4);

fn preset(text: &str) -> MagCache {
    CacheConfig::Preset(text.to_owned()).settle("sample.cache").unwrap()
}

fn published(key: &str, with_picture: bool) -> &'static Magnitudes {
    Published::named(key).unwrap().magnitudes(with_picture, 832 * 480).unwrap()
}

fn planned(key: &str, steps: usize, high: usize, text: &str) -> Vec<usize> {
    let table = Table::from(published(key, false));
    let table = table.fitted(steps, table.high_steps.map(|_| high)).unwrap();
    skipped(&preset(text), &table, high, [Halves::Both; 2])
}

/// The lists of the reference rule for one network, and of the joint rule for two, as they were published or replayed.
#[test]
fn published_tables_give_the_published_lists() {
    let of = |key, steps, high, text| planned(key, steps, high, text);
    let counts = [
        ("t2v-1.3b", 50, "E012K2R02", 25),
        ("t2v-1.3b", 50, "E012K4R02", 29),
        ("t2v-14b", 50, "E024K6R02", 32),
        ("i2v-14b", 40, "E024K6R02", 25),
        ("ti2v-5b", 50, "E006K2R02", 25),
    ];
    for (key, steps, text, count) in counts {
        assert_eq!(of(key, steps, 0, text).len(), count, "{key}, {text}");
    }
    assert_eq!(
        of("t2v-1.3b", 50, 0, "E012K2R20"),
        [10, 11, 13, 14, 16, 17, 19, 20, 22, 23, 25, 26, 28, 29, 31, 32, 34, 35, 37, 38, 40, 41, 43, 45, 47]
    );
    assert_eq!(
        of("t2v-a14b", 40, 26, "E004K2R02"),
        [5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 21, 23, 24, 28, 29, 31, 33]
    );
    assert_eq!(of("t2v-a14b", 40, 26, "E006K2R04"), [10, 11, 13, 14, 16, 17, 19, 20, 22, 23, 25, 31, 33, 35]);
    assert_eq!(
        of("i2v-a14b", 40, 15, "E006K2R02"),
        [3, 4, 6, 7, 9, 10, 12, 13, 20, 21, 23, 24, 26, 27, 29, 31, 33]
    );
    assert_eq!(
        of("i2v-a14b", 40, 15, "E012K2R02"),
        [3, 4, 6, 7, 9, 10, 12, 13, 20, 21, 23, 24, 26, 27, 29, 30, 32, 34, 36]
    );
    assert_eq!(
        of("i2v-a14b", 40, 15, "E006K2R01"),
        [1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 17, 18, 20, 21, 23, 24, 26, 27, 29, 31, 33]
    );
}

/// Without retention the first step of each network still runs: there is nothing to add again.
#[test]
fn the_first_step_of_each_network_is_never_skipped() {
    for (key, steps, high) in
        [("t2v-a14b", 40, 26), ("t2v-a14b", 20, 1), ("t2v-a14b", 12, 12), ("t2v-14b", 30, 0)]
    {
        let skips = planned(key, steps, high, "E9K9R0");
        assert!(!skips.contains(&0) && !skips.contains(&high), "{key}, {steps} steps: {skips:?}");
        assert!(!skips.is_empty());
    }
}

/// Rows for other numbers of steps are the nearest old ones, halves to the even row, each expert's by itself.
#[test]
fn tables_fit_other_numbers_of_steps() {
    let ramp = |steps: usize| (1..=steps).map(|i| i as f64).collect::<Vec<f64>>();
    let rows = |table: &Table| table.cond.iter().map(|value| *value as usize - 1).collect::<Vec<_>>();
    let table = |steps, high_steps| Table { cond: ramp(steps), uncond: ramp(steps), high_steps, made: None };
    let fitted = table(50, None).fitted(20, None).unwrap();
    assert_eq!(rows(&fitted), [0, 3, 5, 8, 10, 13, 15, 18, 21, 23, 26, 28, 31, 34, 36, 39, 41, 44, 46, 49]);
    // 26 + 14 steps for 13 + 7: the expert for low noise begins with its own first row.
    let fitted = table(40, Some(26)).fitted(20, Some(13)).unwrap();
    assert_eq!(rows(&fitted)[12..14], [25, 26]);
    assert_eq!(rows(&fitted)[19], 39);
    assert!(table(40, None).fitted(20, Some(13)).unwrap_err().to_string().contains("two experts"));
    assert!(table(40, Some(26)).fitted(20, None).unwrap_err().to_string().contains("one network"));
    assert!(table(40, Some(40)).fitted(20, Some(13)).unwrap_err().to_string().contains("tandem calibrate"));
}

/// T2V-A14B changes experts where its real timesteps do: at step 26 of 40 with its own shift, 17 with shift 5.
#[test]
fn the_change_of_experts_follows_the_real_timesteps() {
    let range = NoiseRange::Of { expert: models::Expert::High, boundary: 0.875 };
    let high = |shift: f64| {
        let grid = Schedule::new(SolverKind::UniPc, Convention::Official, 40, shift).unwrap();
        grid.timesteps.iter().filter(|timestep| range.holds(**timestep)).count()
    };
    assert_eq!([high(12.0), high(5.0)], [26, 17]);
}

fn network(name: &str, split: &[usize]) -> Pipeline {
    let (config, weights) = DitFiles::at(&fixture("magcache").join(name), None).unwrap().open().unwrap();
    let mut first = 0;
    let stages = split.iter().map(|count| {
        first += count;
        (device(), first - count..first)
    });
    Pipeline::load(&weights, &config, &stages.collect::<Vec<_>>(), &Adapters::default(), Base::F32).unwrap()
}

fn looped(
    names: &[&str],
    input: &Path,
    settings: &Path,
    case: Option<&str>,
    split: &[usize],
) -> (Tensor, Vec<usize>) {
    let settings = probe::sample::Settings::read(settings, case).unwrap();
    let networks: Vec<Pipeline> = names.iter().map(|name| network(name, split)).collect();
    let (mut outputs, skipped) =
        probe::sample::run(&networks, &Inputs::open(input).unwrap(), &settings).unwrap();
    (outputs.remove("latents").unwrap(), skipped)
}

fn on_host(golden: &HashMap<String, Tensor>, name: &str) -> Tensor {
    golden[name].to_device(&kernels::Device::Cpu).unwrap()
}

#[test]
fn skipped_steps_give_the_latents_of_the_reference_loop() {
    let cases: [(&str, &[&str]); 2] =
        [("two_experts", &["high_noise_model", "low_noise_model"]), ("single", &["low_noise_model"])];
    for (name, networks) in cases {
        let (input, settings) =
            (fixture(&format!("magcache/{name}.safetensors")), fixture(&format!("magcache/{name}.json")));
        let (golden, told) = (
            fixture_tensors(&format!("magcache/{name}.safetensors")),
            fixture_json(&format!("magcache/{name}.json")),
        );
        for split in [&[3][..], &[1, 2]] {
            let (latents, skipped) = looped(networks, &input, &settings, None, split);
            assert_eq!(serde_json::json!(skipped), told["skipped"], "{name}: steps that are skipped");
            assert_close(name, &latents, &on_host(&golden, "magcache.latents"), LATENTS);
        }
    }
}

#[test]
fn few_step_loops_give_the_latents_of_the_reference_loops() {
    let (input, settings) = (fixture("fewstep/fewstep.safetensors"), fixture("fewstep/fewstep.json"));
    let golden = fixture_tensors("fewstep/fewstep.safetensors");
    let both: &[&str] = &["high_noise_model", "low_noise_model"];
    let cases = [
        ("wan21_distill_euler", &both[1..]),
        ("wan21_distill_lcm", &both[1..]),
        ("wan22_distill_euler", both),
        ("wan22_lightning8_euler", both),
        ("causvid4_euler", &both[1..]),
    ];
    for (case, networks) in cases {
        let (latents, skipped) = looped(networks, &input, &settings, Some(case), &[3]);
        assert!(skipped.is_empty());
        assert_close(case, &latents, &on_host(&golden, &format!("{case}.latents")), LATENTS);
    }
    // Shift 5 on Euler's grid is the grid that these models were distilled on.
    for (steps, name) in [(4, "grid.sigmas4"), (8, "grid.sigmas8")] {
        let grid = Schedule::new(SolverKind::Euler, Convention::Official, steps, 5.0).unwrap();
        let sigmas = Tensor::new(&grid.sigmas[..steps], &kernels::Device::Cpu).unwrap();
        assert_close(name, &sigmas, &on_host(&golden, name), Tolerance::absolute(1e-6));
    }
}

/// A layer that counts how often it runs.
#[derive(Debug)]
struct Counted {
    inner: Box<dyn Layer>,
    runs: Arc<AtomicUsize>,
}

impl Layer for Counted {
    fn id(&self) -> LayerId {
        self.inner.id()
    }

    fn forward(
        &self,
        streams: Streams,
        context: &Context,
        pass: &Pass,
        keep: Keep,
    ) -> models::Result<(Streams, models::dit::Saved)> {
        self.runs.fetch_add(1, Ordering::Relaxed);
        self.inner.forward(streams, context, pass, keep)
    }

    fn backward(
        &self,
        saved: models::dit::Saved,
        d_streams: Streams,
        context: &Context,
        pass: &Pass,
        gradients: &mut Gradients,
    ) -> models::Result<Streams> {
        self.inner.backward(saved, d_streams, context, pass, gradients)
    }

    fn linears(&self) -> Vec<&Linear> {
        self.inner.linears()
    }

    fn matrices_mut(&mut self) -> Vec<&mut Tensor> {
        self.inner.matrices_mut()
    }

    fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        self.inner.tensors_mut()
    }

    fn share(&self) -> Box<dyn Layer> {
        Box::new(Counted { inner: self.inner.share(), runs: self.runs.clone() })
    }

    fn reload(&mut self, weights: &Weights, changed: &Weights, frozen: Frozen) -> models::Result<()> {
        self.inner.reload(weights, changed, frozen)
    }
}

/// On every stage, in both halves of the guidance, and where clips of other numbers of steps are in flight beside it.
#[test]
fn a_step_that_is_skipped_runs_no_block_on_any_stage() {
    for split in [&[3][..], &[1, 2]] {
        let mut pipeline = network("low_noise_model", split);
        let runs = Arc::new(AtomicUsize::new(0));
        for stage in pipeline.stages_mut() {
            let counted = |inner| -> Box<dyn Layer> { Box::new(Counted { inner, runs: runs.clone() }) };
            stage.dit.layers = std::mem::take(&mut stage.dit.layers).into_iter().map(counted).collect();
        }
        let dit = pipeline.config().clone();
        let clip = |steps: usize, guidance: f64| {
            let base = SampleConfig::default().request(dit.defaults(Networks::Whole), [48, 64], 5, 1);
            let text = |name: &str| Conditioning::new().with(Role::TEXT, randn(name, (1, 7, 24)));
            Prompted {
                request: ClipRequest { steps, guidance, ..base },
                positive: text("positive"),
                negative: text("negative"),
                noise_bcthw: randn("noise", (1, 16, 2, 8, 6)),
                shown: PictureInputs::default(),
            }
        };
        // Three layers; two halves of five computed steps of nine, and one half of four of five.
        let clips = [clip(9, 4.0), clip(5, 1.0)];
        let mut session = Session::new(&clips).unwrap().skipping(&[vec![2, 3, 5, 8], vec![1]]);
        let flow = session
            .run(std::slice::from_ref(&pipeline), NoiseRange::All, |_| ControlFlow::Continue(()))
            .unwrap();
        assert!(flow.is_continue());
        assert_eq!(runs.load(Ordering::Relaxed), 3 * (2 * 5 + 4), "{split:?}");
    }
}

/// A table is made of what was measured: of the exact run the reference statistics of every step, but for the change of experts,
/// where two networks would be compared.
#[test]
fn a_measured_clip_gives_the_statistics_of_the_reference() {
    const STATISTICS: f64 = 1e-4; // the fixture's
    let cases: [(&str, &[&str]); 2] =
        [("two_experts", &["high_noise_model", "low_noise_model"]), ("single", &["low_noise_model"])];
    for (name, names) in cases {
        let golden = fixture_tensors(&format!("magcache/{name}.safetensors"));
        let text = |name: &str| Conditioning::new().with(Role::TEXT, golden[name].unsqueeze(0).unwrap());
        let base = SampleConfig::default().request(
            network(names[0], &[3]).config().defaults(Networks::Whole),
            [48, 64],
            5,
            1,
        );
        let high = names.len() - 1;
        let high_steps = (high == 1).then_some(9);
        let clips = [Prompted {
            request: ClipRequest { steps: 20, guidance: 4.0, guidance_high: 4.0, high_steps, ..base },
            positive: text("context"),
            negative: text("context_null"),
            noise_bcthw: golden["noise"].unsqueeze(0).unwrap(),
            shown: PictureInputs::default(),
        }];
        let mut session = Session::new(&clips).unwrap().measuring(0);
        let ranges = match high {
            0 => vec![NoiseRange::All],
            _ => models::Expert::ALL.map(|expert| NoiseRange::Of { expert, boundary: 0.875 }).to_vec(),
        };
        for (name, range) in names.iter().zip(ranges) {
            // Two stages: what all of them add together is measured on the last one.
            let flow = session.run(&[network(name, &[1, 2])], range, |_| ControlFlow::Continue(())).unwrap();
            assert!(flow.is_continue());
        }
        let expected: Vec<Vec<Vec<f32>>> = on_host(&golden, "calibration").to_vec3().unwrap();
        let changes = session.changes(0);
        assert_eq!(changes.len(), 2 * (19 - high), "{name}: steps that were measured");
        for (step, half, change) in changes {
            let row = &expected[step - 1][*half as usize];
            for (got, expected) in [change.ratio, change.deviation, change.turn].iter().zip(row) {
                let error = (got - f64::from(*expected)).abs();
                assert!(error < STATISTICS, "{name}, step {step}, {half:?}: {change:?}, not {row:?}");
            }
        }
    }
}
