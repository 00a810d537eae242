//! Memory is planned: a forecast agrees with a count by hand, grows and shrinks as it must, and what is chosen by it fits
//! where it has to.

use kernels::DType;
use kernels::device::Repeatability;
use kernels::weight::Format;
use models::adapter::{AdapterKind, LoraConfig, Target};
use models::dit::{Base, BlockPlan, DitConfig, Keep, KeepPlace, SideChain, Streamed};
use models::weights::{Frozen, Storage};
use proofs::project::Project;
use std::collections::BTreeMap;
use trainer::bytes::Bytes;
use trainer::learning::ema::EmaConfig;
use trainer::learning::optim::OptimizerConfig;
use trainer::machine::forecast::{
    Decoding, Engine, Forecaster, LossTask, Neighbours, Networks, StageMemory, StagePlan, Task, Way,
};
use trainer::machine::memory::{
    Card, Choice, KeepConfig, Machine, MemoryConfig, Offload, Room, Shape, Shapes, WeightPlace, choose,
    settle,
};
use trainer::plan::Plan;
use trainer::tools::bench::dit_preset;

const GIB: u64 = 1 << 30;
const FP8: Storage = Storage::Quantised(Format::E4m3);
const CUDNN: Engine = Engine::Cudnn(Repeatability::Fast);

/// Latents of 480x832 pixels.
const fn clip(frames: usize) -> (usize, usize, usize) {
    (frames.div_ceil(4), 60, 104)
}

/// A published model with an adapter on all modules.
struct Model {
    dit: DitConfig,
    targets: Vec<Target>,
}

impl Model {
    fn new(name: &str) -> Self {
        let dit = dit_preset(name).unwrap();
        let targets = LoraConfig::default().select(&dit.adaptable_modules()).unwrap();
        Self { dit, targets }
    }

    fn task(&self, storage: Storage, latents: (usize, usize, usize), accumulate: usize) -> Task<'_> {
        let base = Base::new(Frozen { compute: DType::BF16, storage });
        let Self { dit, targets } = self;
        Task {
            dit: dit.into(),
            base,
            targets,
            kind: AdapterKind::Lora,
            factor: None,
            rank: 32,
            ranks: BTreeMap::new(),
            dropout: false,
            batch: 1,
            accumulate,
            small: None,
            replicas: 1,
            latents,
            continues: false,
            networks: Networks::One,
            decoding: Decoding::Beside,
            rule: OptimizerConfig::default().rule(),
            ema: EmaConfig::default(),
            norm_limit: None,
            objective: LossTask::default(),
        }
    }
}

fn cards(gib: &[f64]) -> Machine {
    let card = |(index, gib): (usize, &f64)| Card {
        name: format!("cuda:{index}"),
        engine: CUDNN,
        room: Room::AtMost((gib * GIB as f64) as u64),
        taken: 0,
        flops: 200e12,
        integer_ops: 800e12,
        link: 20e9,
    };
    let stages: Vec<Card> = gib.iter().enumerate().map(card).collect();
    Machine { ways: vec![Way::Host; stages.len() - 1], stages, host: 96 * GIB }
}

/// All blocks on one GPU, all treated alike.
fn alone(task: &Task, plan: BlockPlan, ffn_tokens: usize) -> StageMemory {
    let layers = task.config().layers;
    let plan = StagePlan { blocks: 0..layers, keep: vec![plan; layers], ffn_tokens };
    let at = Neighbours { index: 0, count: 1, previous: None, next: None };
    Forecaster::new(task).stage(CUDNN, &plan, at).unwrap()
}

/// At video lengths the peak of a block without adapters is the backward of its self-attention, and what is alive then
/// can be counted on two hands.
#[test]
fn a_block_takes_what_a_hand_counts() {
    let mut dit = dit_preset("t2v-14b").unwrap();
    dit.layers = 2;
    let model = Model { dit, targets: Vec::new() };
    let task = model.task(Storage::Dense, clip(81), 1);
    let stream = 32760 * 5120 * 4;
    let half = stream / 2;
    let lse = 40 * 32760 * 4;
    let block = stream // its input
        + stream // the gradient that goes past the attention
        + 3 * half // queries, keys and values as projected,
        + 2 * half // normed and turned,
        + 3 * half // and their gradients
        + 2 * half + lse // the output and its gradient
        + 20 * 32760 * (128 * 4 + 8); // cuDNN's sums, of half the heads at a time
    let kept = stream; // the input of the first block
    let rest = (32 << 20) // cuBLASLt
        + 512 * 5120 * 2 + 32760 * 128 * 4 // text and rotary tables
        + 4096 * 512 * 4 + 2 * 21 * 60 * 104 * 16 * 4; // what came from the host and is not yet used up
    let counted = task.base.bytes(&model.dit, &(0..2)) + block + kept + rest;
    let forecast = alone(&task, BlockPlan::default(), 1024).peak;
    // Tensors below a MiB, and micro-batches that are used up by then.
    let tolerance = 32 << 20;
    assert!(forecast.abs_diff(counted) < tolerance, "{} and {}", Bytes(forecast), Bytes(counted));
}

/// The branch that looks at a picture takes its weights, keys and values of 257 rows, an attention over them, and where
/// everything is kept, that one's output: for each block a stream in bf16 and what 257 rows are.
#[test]
fn the_branch_of_a_picture_is_counted() {
    let (text, picture) = (Model::new("t2v-14b"), Model::new("i2v-14b"));
    let plan = |keep| BlockPlan { keep, place: KeepPlace::Device };
    let forecast = |model: &Model, keep| alone(&model.task(Storage::Dense, clip(17), 1), plan(keep), 1024);
    let weights = |model: &Model| forecast(model, Keep::Input).weights;
    assert_eq!(weights(&picture) - weights(&text), {
        let base = Base::new(Frozen::dense(DType::BF16));
        base.bytes(&picture.dit, &(0..40)) - base.bytes(&text.dit, &(0..40))
    });
    let kept = |model: &Model| forecast(model, Keep::All).kept;
    // Output and log-sum-exp of 7800 tokens, keys and values of 257 rows. At the peak all 40 blocks have left theirs.
    let of_block = 7800 * 5120 * 2 + (40u64 * 7800 * 4).next_multiple_of(512) + 2 * 257 * 5120 * 2;
    assert_eq!(kept(&picture) - kept(&text), 40 * of_block);
    let input = |model: &Model| forecast(model, Keep::Input);
    assert_eq!(input(&picture).kept, input(&text).kept, "the input of a block is no larger");
}

/// What must make a step larger makes its forecast larger.
#[test]
fn forecasts_grow_with_what_they_are_made_of() {
    let model = Model::new("t2v-1.3b");
    let peak = |task: &Task, keep, place, ffn| alone(task, BlockPlan { keep, place }, ffn).peak;
    let task = model.task(Storage::Dense, clip(49), 2);
    let keeps =
        [Keep::Input, Keep::Attention, Keep::All].map(|keep| peak(&task, keep, KeepPlace::Device, 8192));
    assert!(keeps.is_sorted() && keeps[0] < keeps[2], "{keeps:?}");
    let places = [KeepPlace::HostUntilUsed, KeepPlace::Host, KeepPlace::Device]
        .map(|p| peak(&task, Keep::Input, p, 8192));
    assert!(places.is_sorted() && places[1] < places[2], "{places:?}");
    let chunks = [1024, 4096, 20280].map(|ffn| peak(&task, Keep::Input, KeepPlace::Device, ffn));
    assert!(chunks.is_sorted() && chunks[0] < chunks[2], "{chunks:?}");
    let input = |task: &Task| peak(task, Keep::Input, KeepPlace::Device, 8192);
    let larger = [
        Task { rank: 64, ..task.clone() },
        Task { batch: 2, ..task.clone() },
        Task { dropout: true, ..task.clone() },
        Task { latents: clip(53), ..task.clone() },
    ];
    assert!(larger.iter().all(|larger| input(larger) > input(&task)));
    let smaller = [model.task(FP8, clip(49), 2), Task { accumulate: 1, ..task.clone() }];
    assert!(smaller.iter().all(|smaller| input(smaller) < input(&task)));
}

/// What training on two consumer cards was made for.
#[test]
fn the_14b_fits_where_it_has_to() {
    let (large, small) = (Model::new("t2v-14b"), Model::new("t2v-1.3b"));
    let video = |frames| clip(frames);
    for (what, task, room) in [
        ("49 frames, bf16, two cards", large.task(Storage::Dense, video(49), 8), &[22.0; 2][..]),
        ("81 frames, fp8, two cards", large.task(FP8, video(81), 8), &[22.0; 2]),
        ("720p, 81 frames, fp8, two cards", large.task(FP8, (21, 90, 160), 1), &[23.0; 2]),
        ("81 frames, bf16, one large card", large.task(Storage::Dense, video(81), 1), &[139.0]),
        ("1.3B, 81 frames, one card", small.task(Storage::Dense, video(81), 1), &[23.4]),
    ] {
        let machine = cards(room);
        let choice = choose(&task, &machine, &MemoryConfig::default(), None).unwrap();
        assert_eq!(choice.beyond, 0, "{what}: {choice:?}");
        let again = choice.forecast(&task, &machine).unwrap();
        assert_eq!(again, choice.stages, "{what}");
        for (memory, card) in again.iter().zip(&machine.stages) {
            assert!(memory.peak < memory.needed && memory.needed <= card.room.bytes().unwrap(), "{what}");
        }
        assert!(again.iter().map(|memory| memory.host).sum::<u64>() <= machine.host, "{what}");
    }
}

/// More memory is never used for a slower plan, and all that there is room for is kept.
#[test]
fn memory_is_turned_into_speed() {
    let model = Model::new("t2v-14b");
    let task = model.task(FP8, clip(49), 1);
    let of = |gib: f64| choose(&task, &cards(&[gib]), &MemoryConfig::default(), None).unwrap();
    let choices: Vec<Choice> = [23.0, 31.0, 47.0, 79.0, 139.0].map(of).into();
    assert!(choices.iter().all(|choice| choice.beyond == 0));
    assert!(choices.is_sorted_by(|less, more| less.seconds >= more.seconds));
    let whole = BlockPlan { keep: Keep::All, place: KeepPlace::Device };
    let last = choices.last().unwrap();
    assert!(last.ffn_tokens == 20280 && last.blocks.iter().all(|block| *block == whole), "{last:?}");
}

/// Uneven cards get uneven shares, as far as it takes for both to fit.
#[test]
fn a_split_follows_memory_and_speed() {
    let model = Model::new("t2v-14b");
    let task = model.task(Storage::Dense, clip(81), 4);
    let split = |machine: &Machine| {
        let choice = choose(&task, machine, &MemoryConfig::default(), None).unwrap();
        assert_eq!((choice.beyond, choice.split.iter().sum::<usize>()), (0, 40), "{choice:?}");
        choice.split
    };
    assert_eq!(split(&cards(&[31.0, 31.0])), [20, 20]);
    let by_memory = split(&cards(&[19.0, 31.0]));
    assert!(by_memory[0] < 20, "{by_memory:?}");
    let mut faster = cards(&[47.0, 47.0]);
    faster.stages[0].flops *= 2.0;
    let by_speed = split(&faster);
    assert!((25..29).contains(&by_speed[0]), "{by_speed:?}");
}

/// Layers that follow main blocks are work too: a stage with side blocks has fewer main ones.
#[test]
fn a_split_counts_the_layers_between_blocks() {
    let mut dit = dit_preset("vace-14b").unwrap();
    let chain = SideChain::new(96, 20, 40, Some((0..20).collect())).unwrap();
    dit.control.side_chain = Some(chain);
    let targets = LoraConfig::default().select(&dit.adaptable_modules()).unwrap();
    let model = Model { dit, targets };
    let task = model.task(FP8, clip(33), 4);
    let choice = choose(&task, &cards(&[79.0, 79.0]), &MemoryConfig::default(), None).unwrap();
    // 40 blocks and 20 side blocks of about one: 15 with theirs are half of it.
    assert!((14..=16).contains(&choice.split[0]), "{:?}", choice.split);
}

/// What the recipe asks for is done, or refused: it is never quietly something else.
#[test]
fn wishes_are_kept() {
    let model = Model::new("t2v-1.3b");
    let task = model.task(Storage::Dense, clip(49), 2);
    let wish = MemoryConfig {
        weights: WeightPlace::Auto,
        keep: KeepConfig::Attention,
        offload: Offload::Always,
        ffn_tokens: Some(3000),
        host_memory: None,
    };
    let choice = choose(&task, &cards(&[30.0, 30.0]), &wish, Some(&[10, 20])).unwrap();
    let waits = |block: &BlockPlan| block.keep == Keep::Attention && block.place != KeepPlace::Device;
    assert!(choice.blocks.iter().all(waits), "{choice:?}");
    assert_eq!((choice.ffn_tokens, choice.split.as_slice()), (3000, &[10, 20][..]));
    let here = MemoryConfig { offload: Offload::Never, ..MemoryConfig::default() };
    let choice = choose(&task, &cards(&[14.0]), &here, None).unwrap();
    assert!(choice.blocks.iter().all(|block| block.place == KeepPlace::Device), "{choice:?}");
}

/// A refusal names changes, and each of them works.
#[test]
fn what_does_not_fit_is_refused_with_what_would() {
    let model = Model::new("t2v-14b");
    let machine = cards(&[15.0, 15.0]);
    let shape = |frames: usize| -> Shape { (format!("832x480, {frames} frames"), clip(frames)) };
    let shapes = Shapes { there: vec![shape(49)], possible: [49, 33, 17].map(shape).into() };
    let task = model.task(Storage::Dense, clip(49), 2);
    let resident = MemoryConfig { weights: WeightPlace::Device, ..MemoryConfig::default() };
    let refused = settle(&task, &machine, &resident, None, &shapes).unwrap_err().to_string();
    for way in ["cuda:", "model.base = \"fp8\"", "memory.weights = \"auto\""] {
        assert!(refused.contains(way), "no {way} in {refused}");
    }
    let streamed = settle(&task, &machine, &MemoryConfig::default(), None, &shapes).unwrap();
    assert!(!streamed.streamed.is_none() && streamed.streamed < Streamed::ALL, "{:?}", streamed.streamed);
    let fits =
        |task: &Task, machine: &Machine| settle(task, machine, &resident, None, &Shapes::default()).is_ok();
    assert!(fits(&model.task(FP8, clip(49), 2), &machine));
    assert_eq!(refused.contains("one more card"), fits(&task, &cards(&[15.0; 3])), "{refused}");
    for frames in [33, 17] {
        let named = refused.contains(&format!("at most 832x480, {frames} frames"));
        assert!(!named || fits(&model.task(Storage::Dense, clip(frames), 2), &machine), "{refused}");
    }
    let none = settle(&task, &cards(&[2.0]), &resident, None, &shapes).unwrap_err().to_string();
    assert!(none.contains("No single change"), "{none}");
    let lopsided = settle(&model.task(FP8, clip(49), 2), &machine, &resident, Some(&[36, 4]), &shapes);
    let lopsided = lopsided.unwrap_err().to_string();
    assert!(lopsided.contains("devices.split to the plan"), "{lopsided}");
    let mut poor = cards(&[24.0, 24.0]);
    poor.host = GIB;
    let away = MemoryConfig { offload: Offload::Always, ..resident };
    let refused = settle(&model.task(FP8, clip(81), 2), &poor, &away, None, &shapes).unwrap_err().to_string();
    assert!(refused.contains("memory.host_memory"), "{refused}");
}

/// A resumed run keeps its plan, independent of what the machine has free today, unless the recipe says otherwise.
#[test]
fn a_run_goes_on_as_it_was_settled() {
    let project = Project::new(&proofs::fixture(""), &["a ball"], "");
    let planned = || Plan::make(&project.recipe(), &mut |_, _| {}).unwrap();
    let mut stored = planned().plan;
    stored.memory.ffn_tokens = 3;
    stored.memory.blocks[0].keep = Keep::Attention;
    let mut later = planned();
    later.keep_to(&stored);
    assert_eq!(later.plan.memory, stored.memory);
    assert_eq!(later.plan.memory.keeping().len(), later.dit.layers);
    // What the recipe leaves open is kept though it says the other.
    let recipe = std::fs::read_to_string(project.recipe()).unwrap();
    let split = format!("\n[devices]\nsplit = {:?}\n", stored.devices.split);
    std::fs::write(project.recipe(), format!("{recipe}{split}")).unwrap();
    let mut given = planned();
    given.keep_to(&stored);
    assert_eq!(given.plan.memory, stored.memory);
    std::fs::write(project.recipe(), recipe).unwrap();
    stored.devices.deterministic = !stored.devices.deterministic;
    let mut elsewhere = planned();
    elsewhere.keep_to(&stored);
    assert_ne!(elsewhere.plan.memory, stored.memory);
}

/// Two experts lie side by side where they fit; where they do not, one waits in host memory: no step on the devices is larger than
/// that of one by more than its optimiser, its embeddings and its norms.
#[test]
fn two_experts_lie_side_by_side_or_one_waits() {
    let model = Model::new("t2v-a14b");
    let of = |storage, networks, gib: &[f64]| {
        let task = Task { networks, ..model.task(storage, clip(17), 2) };
        let resident = MemoryConfig { weights: WeightPlace::Device, ..MemoryConfig::default() };
        settle(&task, &cards(gib), &resident, None, &Shapes::default())
    };
    let both = |storage, gib: &[f64]| of(storage, Networks::SideBySide, gib).unwrap();
    assert_eq!(both(FP8, &[40.0, 40.0]).networks, Networks::SideBySide);
    let dense = both(Storage::Dense, &[24.0, 24.0]);
    assert_eq!(dense.networks, Networks::InTurn);
    let waiting: u64 = dense.forecast.stages.iter().map(|stage| stage.memory.host).sum();
    let matrices = Base::new(Frozen::dense(DType::BF16)).matrix_bytes(&model.dit, &(0..40));
    assert!(waiting >= matrices, "{} of {}", Bytes(waiting), Bytes(matrices));
    let weights = |settled: &trainer::machine::memory::Settled| -> u64 {
        settled.forecast.stages.iter().map(|stage| stage.memory.weights).sum()
    };
    let one = of(Storage::Dense, Networks::One, &[24.0, 24.0]).unwrap();
    let more = weights(&dense) - weights(&one);
    // A number holds the place of each matrix, and each device hands out multiples of 512 bytes.
    let left = weights(&one) - matrices + 10 * 40 * 512;
    assert!(more.abs_diff(left) <= 2 * 512, "a resting network leaves {more} on the devices, counted {left}");
    assert!(dense.forecast.to_string().contains("wait in host memory"), "{}", dense.forecast);
    let refused = of(Storage::Dense, Networks::SideBySide, &[15.5, 15.5]).unwrap_err().to_string();
    assert!(refused.contains("model.base = \"fp8\""), "{refused}");
}

/// Where one expert is trained and clips are made, its matrices wait in host memory while the other one is on the devices; that is
/// in the forecast, and where it is too much, it is said what to leave out.
#[test]
fn an_expert_makes_room_for_the_other_ones_clips() {
    let model = Model::new("t2v-a14b");
    let (offload, weights) = (Offload::Never, WeightPlace::Device);
    let here = MemoryConfig { offload, weights, ..MemoryConfig::default() };
    let of = |networks, machine: &Machine| {
        let task = Task { networks, ..model.task(FP8, clip(17), 2) };
        settle(&task, machine, &here, None, &Shapes::default())
    };
    let mut machine = cards(&[24.0, 24.0]);
    let [alone, with_clips] =
        [Networks::One, Networks::MakesRoom].map(|networks| of(networks, &machine).unwrap());
    let mut first = 0;
    for (one, other) in alone.forecast.stages.iter().zip(&with_clips.forecast.stages) {
        let blocks = one.blocks.1 - first;
        first = one.blocks.1;
        assert_eq!(
            (one.blocks, one.memory.peak),
            (other.blocks, other.memory.peak),
            "on the devices nothing changes"
        );
        // Each matrix of codes is pinned by itself, in multiples of 2 MiB: 5120 x 5120 are 25 MiB, 13824 x 5120 are 67.5.
        let of_block = (8 * 26 + 2 * 68) << 20;
        assert_eq!(other.memory.host - one.memory.host, blocks as u64 * of_block);
    }
    assert_eq!(first, model.dit.layers);
    assert!(
        with_clips.forecast.to_string().contains("clips go through the other expert too"),
        "{}",
        with_clips.forecast
    );
    machine.host = 2 * GIB;
    assert!(of(Networks::One, &machine).is_ok());
    let refused = of(Networks::MakesRoom, &machine).unwrap_err().to_string();
    assert!(refused.contains("memory.host_memory") && refused.contains("sample.prompts"), "{refused}");
}
