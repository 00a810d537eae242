//! Matrices that stay in host memory: every number is that of the model on the device, and the device has room for two blocks of
//! them at most.

use kernels::device::Repeatability;
use kernels::weight::Format;
use kernels::{DType, Device, Tensor};
use models::adapter::{AdapterKind, Adapters, LoraConfig};
use models::dit::{Base, BlockPlan, Keep, KeepPlace, Streamed};
use models::published;
use models::weights::{Frozen, Patch, Patches, Storage, Weights};
use proofs::small::{adapters, config, micro_batch, trained, velocities, weights};
use proofs::{assert_same_bits, device, second_device};
use trainer::machine::forecast::{Engine, Forecaster, Neighbours, StagePlan, Task};
use trainer::pipeline::{MicroBatch, NetworkInput, Pipeline};

const LAYERS: usize = 4;

fn batches() -> Vec<MicroBatch> {
    (0..3).map(|m| micro_batch(&format!("m{m}"), 1 + m % 2, 9 + m, Some(0.2))).collect()
}

/// Steps with all kinds of recomputation and parking beside it, and calls, of one stage and of two, in f32 and quantised; of a
/// DoRA too, which reads the matrices.
#[test]
fn streamed_weights_give_the_bits_of_resident_ones() {
    let dit = config(LAYERS, 24);
    let dora = LoraConfig { kind: AdapterKind::Dora, rank: Some(2), ..LoraConfig::default() };
    let targets = dora.select(&dit.adaptable_modules()).unwrap();
    let dora = Adapters::fresh(&targets, &dora, 3, &Device::Cpu).unwrap();
    let int8 = Frozen { compute: DType::F32, storage: Storage::Quantised(Format::Int8) };
    let integers = Frozen { storage: Storage::Quantised(Format::RotatedInt8), ..int8 };
    let plain = || adapters(&dit, 3, 0.7);
    let cases = [(Frozen::F32, plain()), (int8, plain()), (integers, plain()), (Frozen::F32, dora)];
    let own = weights(&dit);
    let plans = [
        BlockPlan::default(),
        BlockPlan { keep: Keep::All, place: KeepPlace::Host },
        BlockPlan { keep: Keep::Input, place: KeepPlace::HostUntilUsed },
    ];
    for (frozen, adapters) in &cases {
        for split in [vec![(device(), 0..LAYERS)], vec![(device(), 0..2), (second_device(), 2..LAYERS)]] {
            let load = |streamed| {
                let base = Base { streamed, ..Base::new(*frozen) };
                let mut pipeline = Pipeline::load(&own, &dit, &split, adapters, base).unwrap();
                pipeline.set_ffn_tokens(5);
                pipeline
            };
            let resident = load(Streamed::NONE);
            let inputs: Vec<NetworkInput> = batches().into_iter().map(|batch| batch.input).collect();
            let expected = velocities(&resident, &inputs);
            for streamed in [Streamed::STEPS[2], Streamed::ALL] {
                let streaming = load(streamed);
                let what = format!("{streamed:?}, {} stages, {frozen:?}", split.len());
                for plan in plans {
                    let (losses, gradients) = trained(&resident, &batches(), plan);
                    let (got_losses, got) = trained(&streaming, &batches(), plan);
                    assert_eq!(got_losses, losses, "{what}, {plan:?}");
                    assert_eq!(got.len(), gradients.len());
                    for (name, gradient) in &gradients {
                        assert_same_bits(&format!("{name}, {what}, {plan:?}"), &got[name], gradient);
                    }
                }
                let groups = streaming.grouped(split.len()).unwrap();
                for network in groups.iter().chain([&streaming]) {
                    for (got, expected) in velocities(network, &inputs).iter().zip(&expected) {
                        assert_same_bits(&what, got, expected);
                    }
                }
            }
        }
    }
}

/// Adds one to each number.
#[derive(Debug)]
struct PlusOne;

impl Patch for PlusOne {
    fn patched(&self, weight: Tensor) -> models::Result<Tensor> {
        Ok((weight + 1.0)?)
    }
}

/// Full deltas that clips have: what is put onto a network whose matrices are in host memory, and taken off again, is what
/// it is on resident ones; scales of quantised matrices, biases and norms included.
#[test]
fn changed_weights_are_reloaded_into_streamed_blocks() {
    let dit = config(LAYERS, 24);
    let changed = [
        "blocks.1.ffn.0.weight",
        "blocks.2.self_attn.q.weight",
        "blocks.2.self_attn.q.bias",
        "blocks.3.modulation",
        "head.head.bias",
    ];
    let patches = || {
        let mut patches = Patches::default();
        changed.iter().for_each(|name| patches.add((*name).to_owned(), PlusOne));
        patches
    };
    let (own, patched) = (weights(&dit), weights(&dit).patched(patches()));
    let int8 = Frozen { compute: DType::F32, storage: Storage::Quantised(Format::Int8) };
    let inputs: Vec<NetworkInput> = batches().into_iter().map(|batch| batch.input).collect();
    for frozen in [Frozen::F32, int8] {
        let runs = [Streamed::NONE, Streamed::STEPS[2], Streamed::ALL].map(|streamed| {
            let base = Base { streamed, ..Base::new(frozen) };
            let none = Adapters::default();
            let mut pipeline = Pipeline::load(&own, &dit, &[(device(), 0..LAYERS)], &none, base).unwrap();
            let mut reloaded = |from: &Weights| {
                let stage = &mut pipeline.stages_mut()[0];
                let place = stage.device.clone();
                stage.dit.reload(from, &patched, base, &place).unwrap();
                velocities(&pipeline, &inputs)
            };
            [reloaded(&own), reloaded(&patched), reloaded(&own)]
        });
        let [resident, half, all] = &runs;
        for (i, expected) in resident.iter().enumerate() {
            for run in [half, all] {
                for (got, expected) in run[i].iter().zip(expected) {
                    assert_same_bits(&format!("{frozen:?}, reload {i}"), got, expected);
                }
            }
        }
        assert_same_bits("taken off again", &all[2][0], &all[0][0]);
        let moved = (&all[1][0] - &all[0][0]).unwrap().abs().unwrap().max_all().unwrap();
        assert!(moved.to_scalar::<f32>().unwrap() > 0.01, "the deltas change nothing");
    }
}

/// On a GPU, as forecast: two blocks' matrices at a time, and those of all blocks in host memory.
#[test]
fn streamed_weights_take_two_blocks_of_the_device_and_the_rest_of_the_host() {
    let dit = published::Published::named("t2v-14b").unwrap().dit();
    let targets = LoraConfig::default().select(&dit.adaptable_modules()).unwrap();
    let blocks = 0..dit.layers;
    let peak = |streamed| {
        let base = Base { streamed, ..Base::new(Frozen::dense(DType::BF16)) };
        let task = Task { targets: &targets, rank: 16, ..Task::without_training(&dit, base, (5, 60, 104)) };
        let block = BlockPlan { keep: Keep::Input, place: KeepPlace::Device };
        let plan = StagePlan { blocks: blocks.clone(), keep: vec![block; dit.layers], ffn_tokens: 4096 };
        let at = Neighbours { index: 0, count: 1, previous: None, next: None };
        let engine = Engine::Cudnn(Repeatability::Fast);
        Forecaster::new(&task).stage(engine, &plan, at).unwrap()
    };
    let of = |count: usize| Base::new(Frozen::dense(DType::BF16)).matrix_bytes(&dit, &(0..count));
    let (resident, all, half) = (peak(Streamed::NONE), peak(Streamed::ALL), peak(Streamed::STEPS[2]));
    assert_eq!((resident.host, all.host, half.host), (0, of(dit.layers), of(dit.layers / 2)));
    // What a block computes with is at its peak while the matrices of two are there.
    let near = |saved: u64, blocks: usize| saved.abs_diff(of(blocks)) < of(1) / 4;
    assert!(near(resident.peak - all.peak, dit.layers - 2), "{} of {}", all.peak, resident.peak);
    assert!(near(resident.peak - half.peak, dit.layers / 2 - 2), "{} of {}", half.peak, resident.peak);
}
