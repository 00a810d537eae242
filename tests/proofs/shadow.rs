//! Plans run the model's own code: on shadows it takes what it takes on tensors, to the byte.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use kernels::ledger::Ledger;
use kernels::transfer::Route;
use kernels::weight::Format;
use kernels::{DType, Device, Tensor};
use models::adapter::{AdapterKind, LoraConfig, Target};
use models::clip::{Clip, ClipSizes};
use models::dit::{Architecture, Base, BlockPlan, Conditioning, DitConfig, Keep, KeepPlace, Role};
use models::umt5::{Umt5, Umt5Sizes};
use models::vae::{Generation, Sizes, Tiles, Tiling, Vae};
use models::weights::{Frozen, Storage, Weights};
use proofs::control::ControlModel;
use proofs::small::{adapters, config, each_kind, micro_batch, uniform, weights};
use trainer::encode::PictureInputs;
use trainer::encode::prompt::ClipRequest;
use trainer::learning::NoiseRange;
use trainer::learning::optim::{Optimizer, OptimizerConfig, Step, checked_norm};
use trainer::machine::forecast::{
    Calls, ClipShape, Engine, Forecaster, Held, Neighbours, Rehearsal, Residuals, Scene, StagePlan, Task, Way,
};
use trainer::pipeline::{Pipeline, StepOutcome};
use trainer::sample::{Prompted, Session};
use trainer::solver::{Convention, SolverKind};

/// Blocks of the models here.
const LAYERS: usize = 3;
/// Every way to keep a block, and every place for it.
pub(crate) const PLANS: [BlockPlan; 5] = [
    BlockPlan { keep: Keep::Input, place: KeepPlace::Device },
    BlockPlan { keep: Keep::Attention, place: KeepPlace::Device },
    BlockPlan { keep: Keep::All, place: KeepPlace::Device },
    BlockPlan { keep: Keep::Input, place: KeepPlace::Host },
    BlockPlan { keep: Keep::All, place: KeepPlace::HostUntilUsed },
];

/// What a stage took: at its peak, by what, and at the end.
#[derive(Debug, PartialEq)]
pub(crate) struct Taken {
    peak: u64,
    by_label: Vec<(&'static str, u64)>,
    pub(crate) left: u64,
}

/// What a step of `task` takes on stage `index` of `count`, of real tensors or of shadows.
pub(crate) fn taken(task: &Task, plan: &StagePlan, at: [usize; 2], is_shadow: bool) -> Taken {
    taken_by(task, &plan.blocks, at, is_shadow, |rehearsal| {
        rehearsal.step(&plan.keep, plan.ffn_tokens).unwrap();
    })
}

/// What `work` takes on the stage `index` of `count` that has `blocks`.
fn taken_by(
    task: &Task,
    blocks: &Range<usize>,
    [index, count]: [usize; 2],
    is_shadow: bool,
    work: impl Fn(&mut Rehearsal),
) -> Taken {
    let ledger = Ledger::new(1);
    let (own, beside, host) = match is_shadow {
        true => {
            (Device::shadow_cpu(Some(ledger.clone())), Device::shadow_cpu(None), Device::shadow_cpu(None))
        }
        false => (Device::counted_cpu(ledger.clone()), Device::Cpu, Device::Cpu),
    };
    let beside = |is_there: bool| is_there.then(|| (beside.clone(), Route::Auto));
    let (previous, next) = (beside(index > 0), beside(index + 1 < count));
    let scene = Scene { index, count, own, previous, next, host };
    let weights = Weights::seeded(task.dit.tensors(), 1);
    let mut rehearsal = Rehearsal::new(task, &weights, blocks.clone(), scene).unwrap();
    work(&mut rehearsal);
    let mut by_label = ledger.at_peak();
    by_label.retain(|(_, bytes)| *bytes > 0);
    by_label.sort_unstable();
    Taken { peak: ledger.peak(), by_label, left: ledger.live() }
}

/// Checks that both take the same, on one stage and on each of two, with blocks treated as `plan` and those behind the first
/// as `behind`.
pub(crate) fn assert_shadow(what: &str, task: &Task, [plan, behind]: [BlockPlan; 2], ffn_tokens: usize) {
    let layers = task.config().layers;
    for (index, count, blocks) in [(0, 1, 0..layers), (0, 2, 0..1), (1, 2, 1..layers)] {
        let keep = blocks.clone().map(|n| if n == 0 { plan } else { behind }).collect();
        let stage = StagePlan { blocks, keep, ffn_tokens };
        let [real, shadow] = [false, true].map(|is_shadow| taken(task, &stage, [index, count], is_shadow));
        assert!(real.peak > real.left && real.left > 0, "{what}: nothing was counted, {real:?}");
        assert_eq!(shadow, real, "{what}, stage {index} of {count}, {plan:?} and {behind:?}");
        // A forecast plays layers that are alike once.
        let at = neighbours(index, count);
        let forecast = Forecaster::new(task).stage(Engine::Cpu, &stage, at).unwrap();
        assert_eq!(forecast.peak, real.peak, "{what}, forecast of stage {index} of {count}");
    }
}

/// A stage beside others in the same memory.
fn neighbours(index: usize, count: usize) -> Neighbours {
    let way = |is_there: bool| is_there.then_some(Way::Same);
    Neighbours { index, count, previous: way(index > 0), next: way(index + 1 < count) }
}

pub(crate) fn task(dit: impl Into<Arc<dyn Architecture>>, targets: &[Target]) -> Task<'_> {
    let plain = Task::without_training(dit, Base::F32, (2, 4, 6));
    Task { targets, rank: 2, accumulate: 3, ..plain }
}

#[test]
fn a_shadow_of_a_step_takes_what_the_step_takes() {
    for dit in each_kind(LAYERS) {
        let targets = LoraConfig::default().select(&dit.adaptable_modules()).unwrap();
        let task = task(&dit, &targets);
        let what = format!("{:?}", dit.kind);
        for plan in PLANS {
            assert_shadow(&what, &task, [plan, plan], 12);
        }
        assert_shadow(&what, &task, [PLANS[0], PLANS[2]], 5);
        assert_shadow(&what, &Task { batch: 2, dropout: true, ..task.clone() }, [PLANS[3], PLANS[1]], 5);
    }
}

#[test]
fn a_shadow_takes_the_same_of_every_adapter_and_base() {
    let dit = config(LAYERS, 24);
    let targets = LoraConfig::default().select(&dit.adaptable_modules()).unwrap();
    let plain = task(&dit, &targets);
    for kind in [AdapterKind::Lora, AdapterKind::Dora, AdapterKind::Loha, AdapterKind::Lokr] {
        for dropout in [false, true] {
            let task = Task { kind, dropout, batch: 2, ..plain.clone() };
            assert_shadow(&format!("{kind:?}, dropout {dropout}"), &task, [PLANS[0], PLANS[2]], 5);
        }
    }
    let bases = [
        (DType::BF16, Storage::Dense, DType::F32),
        (DType::BF16, Storage::Dense, DType::BF16),
        (DType::F32, Storage::Quantised(Format::E4m3), DType::F32),
        (DType::BF16, Storage::Quantised(Format::Int8), DType::BF16),
    ];
    for (compute, storage, stream) in bases {
        let base = Base { stream, ..Base::new(Frozen { compute, storage }) };
        for kind in [AdapterKind::Lora, AdapterKind::Dora] {
            let task = Task { base, kind, ..plain.clone() };
            assert_shadow(&format!("{kind:?} on {base:?}"), &task, [PLANS[1], PLANS[2]], 12);
        }
    }
    // GPUs multiply integers in rows of a multiple of sixteen.
    let wide = config(LAYERS, 64);
    let wide_targets = LoraConfig::default().select(&wide.adaptable_modules()).unwrap();
    for compute in [DType::F32, DType::BF16] {
        let base = Base::new(Frozen { compute, storage: Storage::Quantised(Format::RotatedInt8) });
        let task = Task { base, ..self::task(&wide, &wide_targets) };
        for kind in [AdapterKind::Lora, AdapterKind::Dora] {
            let task = Task { kind, ..task.clone() };
            assert_shadow(&format!("{kind:?} on {base:?}"), &task, [PLANS[1], PLANS[2]], 40);
        }
    }
    let few: Vec<Target> = targets.iter().step_by(3).cloned().collect();
    assert_shadow(
        "adapters on a third of the layers",
        &Task { targets: &few, ..plain },
        PLANS[..2].try_into().unwrap(),
        12,
    );
}

/// A model with a side chain, injections, a token in front and conditioning of its own is planned like a plain one.
#[test]
fn a_shadow_of_a_control_model_takes_what_the_model_takes() {
    let model = ControlModel::small();
    let modules = model.adaptable_modules().into_iter();
    let all: Vec<Target> = modules.map(|(module, out, input)| Target { module, out, input }).collect();
    let is_plain = |target: &Target| target.module.starts_with("blocks.");
    let (plain, chained): (Vec<Target>, Vec<Target>) = all.iter().cloned().partition(is_plain);
    assert!(!plain.is_empty() && !chained.is_empty());
    for targets in [all, plain, chained] {
        let task = Task { batch: 2, ..task(model.shared(), &targets) };
        for plan in PLANS {
            assert_shadow("control", &task, [plan, plan], 5);
        }
        assert_shadow("control", &Task { dropout: true, ..task.clone() }, [PLANS[0], PLANS[2]], 12);
        for (index, count, blocks) in [(0, 1, 0..4), (0, 2, 0..2), (1, 2, 2..4)] {
            let single = Task { batch: 1, accumulate: 1, ..task.clone() };
            let [real, shadow] = [false, true].map(|is_shadow| {
                taken_by(&single, &blocks, [index, count], is_shadow, |rehearsal| {
                    rehearsal.calls(&in_flight(SolverKind::UniPc, Residuals::None), 5).unwrap();
                })
            });
            assert_eq!(shadow, real, "calls of the control model, stage {index} of {count}");
        }
    }
}

/// The pipeline that trains, not only a stage that is played alone, takes what its shadow does.
#[test]
fn a_pipeline_takes_what_its_shadow_takes() {
    let dit = config(LAYERS, 24);
    let targets = LoraConfig::default().select(&dit.adaptable_modules()).unwrap();
    for plan in PLANS {
        let ledger = Ledger::new(1);
        let device = Device::counted_cpu(ledger.clone());
        let fresh = adapters(&dit, 2, 1.0);
        let mut pipeline =
            Pipeline::load(&weights(&dit), &dit, &[(device, 0..LAYERS)], &fresh, Base::F32).unwrap();
        pipeline.set_ffn_tokens(5);
        let mut optimizer = Optimizer::new(&pipeline, OptimizerConfig::default().rule()).unwrap();
        optimizer.publish(&mut pipeline);
        ledger.reset_peak();
        let text_len = dit.text_len;
        let batches: Vec<_> = (0..3).map(|m| micro_batch(&format!("m{m}"), 2, text_len, Some(0.1))).collect();
        let StepOutcome { gradients, .. } = pipeline.train(&batches, &uniform(&pipeline, plan)).unwrap();
        checked_norm(&gradients, optimizer.states().keys()).unwrap();
        optimizer.update(&gradients, &Step { lr: 0.1, factor: 1.0, number: 1 }).unwrap();
        optimizer.publish(&mut pipeline);
        let task = Task { batch: 2, dropout: true, ..task(&dit, &targets) };
        let stage = StagePlan { blocks: 0..LAYERS, keep: vec![plan; LAYERS], ffn_tokens: 5 };
        assert_eq!(taken(&task, &stage, [0, 1], true).peak, ledger.peak(), "{plan:?}");
    }
}

/// Clips in flight: with guidance and a picture, and a smaller one without, by every solver.
fn in_flight(solver: SolverKind, residuals: Residuals) -> Calls {
    let shape = |latents, halves| ClipShape { latents, halves, solver, has_picture: true, residuals };
    Calls::Clips(vec![shape((2, 4, 6), 2), shape((1, 4, 6), 1)])
}

/// Of a piece that continues another, which has the tokens of the frames before too.
#[test]
fn a_shadow_of_a_clip_that_continues_takes_what_it_takes() {
    let dit = each_kind(LAYERS).into_iter().find(|dit| dit.control.speech.is_some()).unwrap();
    let targets = LoraConfig::default().select(&dit.adaptable_modules()).unwrap();
    let latents = (2, 8, 8);
    let (solver, has_picture) = (SolverKind::UniPc, false);
    for residuals in [Residuals::None, Residuals::Kept] {
        let shape = |halves| ClipShape { latents, halves, solver, has_picture, residuals };
        let calls = Calls::Clips(vec![shape(2), shape(1)]);
        let peaks = [false, true].map(|continues| {
            let task = Task { accumulate: 1, latents, continues, ..task(&dit, &targets) };
            [(0, 1, 0..3), (0, 2, 0..1), (1, 2, 1..3)].map(|(index, count, blocks)| {
                let [real, shadow] = [false, true].map(|is_shadow| {
                    taken_by(&task, &blocks, [index, count], is_shadow, |rehearsal| {
                        rehearsal.calls(&calls, 5).unwrap();
                    })
                });
                assert_eq!(shadow, real, "{continues}, {residuals:?}, stage {index} of {count}");
                real.peak
            })
        });
        assert!(peaks[0].iter().zip(peaks[1]).all(|(alone, behind)| *alone < behind), "{peaks:?}");
    }
}

/// Of the held-out loss and of clips, on one stage and on each of two.
#[test]
fn a_shadow_of_calls_takes_what_the_calls_take() {
    for dit in each_kind(LAYERS) {
        let targets = LoraConfig::default().select(&dit.adaptable_modules()).unwrap();
        let task = Task { accumulate: 1, ..task(&dit, &targets) };
        let mut all = vec![Calls::HeldOut];
        all.extend(
            [SolverKind::UniPc, SolverKind::Euler, SolverKind::DpmPp2m, SolverKind::Lcm]
                .map(|kind| in_flight(kind, Residuals::None)),
        );
        all.push(in_flight(SolverKind::UniPc, Residuals::Kept));
        all.push(in_flight(SolverKind::UniPc, Residuals::Measured));
        for calls in all {
            for (index, count, blocks) in [(0, 1, 0..3), (0, 2, 0..1), (1, 2, 1..3)] {
                let what = format!("{:?}, {calls:?}, stage {index} of {count}", dit.kind);
                let [real, shadow] = [false, true].map(|is_shadow| {
                    taken_by(&task, &blocks, [index, count], is_shadow, |rehearsal| {
                        rehearsal.calls(&calls, 5).unwrap();
                    })
                });
                assert!(real.peak > real.left && real.left > 0, "{what}: nothing was counted, {real:?}");
                assert_eq!(shadow, real, "{what}");
                let at = neighbours(index, count);
                let held = Held { ranges: vec![blocks.clone()], own: 0, at };
                let forecast = Forecaster::new(&task).calls(Engine::Cpu, (&held, 5), at, &calls).unwrap();
                assert_eq!(forecast.peak, real.peak, "{what}, as forecast");
            }
        }
    }
}

/// A clip of so many latent frames and such a guidance, whose noise is on `device`.
fn prompted(
    dit: &DitConfig,
    device: &Device,
    (frames, guidance): (usize, f64),
    solver: SolverKind,
) -> Prompted {
    let noise = Tensor::zeros((1, 16, frames, 4, 6), DType::F32, device).unwrap();
    let states = || Tensor::zeros((1, dit.text_len, dit.text_dim), DType::F32, &Device::Cpu).unwrap();
    let cond = || Conditioning::new().with(Role::TEXT, states());
    let request = ClipRequest {
        prompt: String::new(),
        negative: String::new(),
        width: 48,
        height: 32,
        frames: 4 * frames as u32 - 3,
        steps: 6,
        guidance,
        guidance_high: guidance,
        shift: 5.0,
        seed: 0,
        solver,
        convention: Convention::Official,
        high_steps: None,
        preset: None,
        timesteps: None,
        image: None,
        last_image: None,
        conditions: Default::default(),
    };
    let shown = PictureInputs::default();
    Prompted { request, positive: cond(), negative: cond(), noise_bcthw: noise, shown }
}

/// Clips that a session makes, and held-out samples that go through the pipeline, take what their shadows do.
#[test]
fn a_session_takes_what_its_shadow_takes() {
    let dit = config(LAYERS, 24);
    let targets = LoraConfig::default().select(&dit.adaptable_modules()).unwrap();
    let task = Task { accumulate: 1, ..task(&dit, &targets) };
    let ledger = Ledger::new(1);
    let device = Device::counted_cpu(ledger.clone());
    let fresh = adapters(&dit, 2, 1.0);
    let split = [(device.clone(), 0..LAYERS)];
    let mut pipeline = Pipeline::load(&weights(&dit), &dit, &split, &fresh, Base::F32).unwrap();
    pipeline.set_ffn_tokens(5);
    let optimizer = Optimizer::new(&pipeline, OptimizerConfig::default().rule()).unwrap();
    optimizer.publish(&mut pipeline);
    // The residual of the second clip is there while the first one computes again.
    let skips = [vec![1, 3], vec![1, 2, 3, 4]];
    for (solver, residuals) in [
        (SolverKind::UniPc, Residuals::None),
        (SolverKind::Euler, Residuals::None),
        (SolverKind::DpmPp2m, Residuals::None),
        (SolverKind::Lcm, Residuals::None),
        (SolverKind::UniPc, Residuals::Kept),
        (SolverKind::Euler, Residuals::Measured),
    ] {
        let clips = [(2, 5.0), (1, 1.0)].map(|clip| prompted(&dit, &device, clip, solver));
        ledger.reset_peak();
        let mut session = Session::new(&clips).unwrap();
        match residuals {
            Residuals::None => {}
            Residuals::Kept => session = session.skipping(&skips),
            Residuals::Measured => session = session.measuring(0),
        }
        let flow = session
            .run(std::slice::from_ref(&pipeline), NoiseRange::All, |_| ControlFlow::Continue(()))
            .unwrap();
        assert!(flow.is_continue());
        let shadow = taken_by(&task, &(0..LAYERS), [0, 1], true, |rehearsal| {
            rehearsal.calls(&in_flight(solver, residuals), 5).unwrap();
        });
        assert_eq!(shadow.peak, ledger.peak(), "{solver:?}, {residuals:?}");
    }
}

/// Where each of two devices has the whole network for clips, beside what it trains, they take what their shadows do: the one
/// that takes the solver's steps to the byte, the other no more.
#[test]
fn groups_of_devices_take_what_their_shadows_take() {
    let dit = config(LAYERS, 24);
    let targets = LoraConfig::default().select(&dit.adaptable_modules()).unwrap();
    let task = Task { accumulate: 1, ..task(&dit, &targets) };
    let ledgers = [Ledger::new(1), Ledger::new(1)];
    let ranges = vec![0..1, 1..LAYERS];
    let devices = ledgers.each_ref().map(|ledger| Device::counted_cpu(ledger.clone()));
    let split: Vec<_> = devices.into_iter().zip(ranges.clone()).collect();
    let mut pipeline =
        Pipeline::load(&weights(&dit), &dit, &split, &adapters(&dit, 2, 1.0), Base::F32).unwrap();
    pipeline.set_ffn_tokens(5);
    let optimizer = Optimizer::new(&pipeline, OptimizerConfig::default().rule()).unwrap();
    optimizer.publish(&mut pipeline);
    let alone = ledgers.each_ref().map(Ledger::live);
    for is_cached in [false, true] {
        let clips = [prompted(&dit, &split[0].0, (2, 5.0), SolverKind::UniPc)];
        let groups = pipeline.grouped(2).unwrap();
        ledgers.iter().for_each(Ledger::reset_peak);
        let mut session = Session::new(&clips).unwrap();
        if is_cached {
            session = session.skipping(&[vec![1, 3]]);
        }
        let flow = session.run(&groups, NoiseRange::All, |_| ControlFlow::Continue(())).unwrap();
        assert!(flow.is_continue());
        drop((groups, session));
        drop(clips);
        let shape = ClipShape {
            latents: (2, 4, 6),
            halves: 1,
            solver: SolverKind::UniPc,
            has_picture: false,
            residuals: if is_cached { Residuals::Kept } else { Residuals::None },
        };
        for (own, ledger) in ledgers.iter().enumerate() {
            let at = Neighbours { index: 0, count: 1, previous: None, next: None };
            let held = Held { ranges: ranges.clone(), own, at };
            let (place, calls) = (neighbours(own, 2), Calls::Clips(vec![shape]));
            let forecast = Forecaster::new(&task).calls(Engine::Cpu, (&held, 5), place, &calls).unwrap();
            let what = format!("device {own}, skipping {is_cached}");
            match own {
                0 => assert_eq!(forecast.peak, ledger.peak(), "{what}"),
                _ => {
                    assert!(forecast.peak >= ledger.peak(), "{what}: {} of {}", ledger.peak(), forecast.peak)
                }
            }
            assert_eq!(ledger.live(), alone[own], "{what}: the copies are gone");
        }
    }
}

/// What `work` takes of a device, of real tensors and of shadows.
fn both(work: impl Fn(&Device) -> models::Result<Tensor>) -> [(u64, u64); 2] {
    [Device::counted_cpu as fn(Ledger) -> Device, |ledger| Device::shadow_cpu(Some(ledger))].map(|device| {
        let ledger = Ledger::new(1);
        let made = work(&device(ledger.clone())).unwrap();
        assert!(made.elem_count() > 0);
        (ledger.peak(), ledger.live())
    })
}

/// Whole and in tiles, of both generations, in both dtypes: a clip into latents, and latents into a clip.
#[test]
fn a_shadow_of_a_vae_takes_what_the_vae_takes() {
    for (generation, latent) in [(Generation::Wan21, 16), (Generation::Wan22, 48)] {
        let sizes = Sizes { generation, latent, encoder: 8, decoder: 8 };
        let ratio = generation.spatial_ratio();
        let tiles = Tiles { size: (4 * ratio, 4 * ratio), stride: (2 * ratio, 2 * ratio) };
        for dtype in [DType::F32, DType::BF16] {
            for tiling in [Tiling::Off, Tiling::On(tiles)] {
                let encoded = both(|device| {
                    let video = Tensor::zeros((1, 3, 9, 6 * ratio, 4 * ratio), DType::F32, device)?;
                    Vae::seeded(sizes, 0, dtype, device)?.encode(&video, tiling)
                });
                assert_eq!(encoded[0], encoded[1], "encoding, {generation:?}, {dtype:?}, {tiling:?}");
                let decoded = both(|device| {
                    let latents = Tensor::zeros((1, latent, 3, 6, 4), DType::F32, device)?;
                    Vae::seeded(sizes, 0, dtype, device)?.decode(&latents, tiling)
                });
                assert_eq!(decoded[0], decoded[1], "decoding, {generation:?}, {dtype:?}, {tiling:?}");
                let frames = both(|device| {
                    let latents = Tensor::zeros((1, latent, 3, 6, 4), DType::F32, device)?;
                    let vae = Vae::seeded(sizes, 0, dtype, device)?;
                    vae.decode_frames(&latents, tiling, &mut |_| ControlFlow::Continue(()))?;
                    Ok(latents)
                });
                assert_eq!(frames[0], frames[1], "frames, {generation:?}, {dtype:?}, {tiling:?}");
            }
        }
    }
}

#[test]
fn shadows_of_encoders_take_what_the_encoders_take() {
    let text = Umt5Sizes {
        vocabulary: 50,
        width: 24,
        layers: 2,
        heads: 3,
        inner: 12,
        feed_forward: 40,
        buckets: 32,
    };
    for frozen in [Frozen::F32, Frozen { compute: DType::F32, storage: Storage::Quantised(Format::Int8) }] {
        let taken = both(|device| Umt5::seeded(text, 0, frozen, device)?.encode(&[3, 1, 4, 1, 5, 9, 2, 6]));
        assert_eq!(taken[0], taken[1], "text encoder, {frozen:?}");
    }
    let sizes = ClipSizes { width: 24, heads: 2, layers: 3, feed_forward: 40, patch: 4, rows: 17 };
    for dtype in [DType::F32, DType::BF16] {
        let taken = both(|device| {
            let pixels = Tensor::zeros((1, 3, 16, 16), DType::F32, device)?;
            Clip::seeded(sizes, 0, dtype, device)?.encode(&pixels)
        });
        assert_eq!(taken[0], taken[1], "CLIP, {dtype:?}");
    }
}
