//! The owner of a process's models: what does not fit together is never on the devices together, and no number changes
//! when a model leaves its device and comes back.

use std::num::NonZeroUsize;

use kernels::ledger::Ledger;
use kernels::{DType, Device, Tensor};
use models::Movable;
use models::adapter::Adapters;
use models::clip::{Clip, ClipSizes};
use models::expert::Expert;
use models::umt5::{Umt5, Umt5Sizes};
use models::vae::{Generation, Sizes, Tiling, Vae};
use models::weights::{Frozen, Storage};
use proofs::small::{adapters, micro_batch, velocities};
use proofs::{assert_same_bits, device, fixture};
use trainer::base::{BaseModel, ModelConfig};
use trainer::learning::NoiseRange;
use trainer::machine::forecast::{Decoding, Networks};
use trainer::machine::precision::Processor;
use trainer::pipeline::NetworkInput;
use trainer::residents::{FromFiles, Residency, Residents, Setup, WhenIdle};
use trainer::watch::ui::{Ui, Voice};

/// Runs `model` on a device that is counted, moves it to the host, and back, and runs it again.
fn assert_moves<T: Movable>(what: &str, make: impl Fn(&Device) -> T, run: impl Fn(&T) -> Tensor) {
    let ledger = Ledger::new(1);
    let counted = Device::counted_cpu(ledger.clone());
    let mut model = make(&counted);
    let expected = run(&model).to_device(&Device::Cpu).unwrap();
    let held = ledger.live();
    assert!(held > 0, "{what}: nothing was counted");
    model.move_to(&Device::Cpu).unwrap();
    assert_eq!(ledger.live(), 0, "{what}: bytes that stayed on the device");
    model.move_to(&counted).unwrap();
    assert_eq!(ledger.live(), held, "{what}: bytes that came back");
    assert_same_bits(what, &run(&model).to_device(&Device::Cpu).unwrap(), &expected);

    // On a GPU, where there is one, the numbers are the same too.
    let mut model = make(&device());
    let expected = run(&model);
    model.move_to(&Device::Cpu).unwrap();
    model.move_to(&device()).unwrap();
    assert_same_bits(what, &run(&model), &expected);
}

/// Every tensor goes: what was forgotten would stay on the device, or on the host.
#[test]
fn encoders_move_to_the_host_and_back_as_a_whole() {
    for (generation, latent) in [(Generation::Wan21, 16), (Generation::Wan22, 48)] {
        let sizes = Sizes { generation, latent, encoder: 8, decoder: 8 };
        let decode = |vae: &Vae| {
            let latents = Tensor::ones((1, latent, 2, 4, 4), DType::F32, vae.device()).unwrap();
            vae.decode(&latents, Tiling::Off).unwrap()
        };
        assert_moves("VAE", |device| Vae::seeded(sizes, 0, DType::F32, device).unwrap(), decode);
    }
    let text = Umt5Sizes {
        vocabulary: 50,
        width: 24,
        layers: 2,
        heads: 3,
        inner: 12,
        feed_forward: 40,
        buckets: 32,
    };
    for storage in [Storage::Dense, Storage::Quantised(kernels::weight::Format::Int8)] {
        let frozen = Frozen { compute: DType::F32, storage };
        let encode = |umt5: &Umt5| umt5.encode(&[3, 1, 4, 1, 5]).unwrap();
        assert_moves("text encoder", |device| Umt5::seeded(text, 0, frozen, device).unwrap(), encode);
    }
    let clip = ClipSizes { width: 24, heads: 2, layers: 3, feed_forward: 40, patch: 4, rows: 17 };
    let encode =
        |clip: &Clip| clip.encode(&Tensor::ones((1, 3, 16, 16), DType::F32, clip.device()).unwrap()).unwrap();
    assert_moves("CLIP", |device| Clip::seeded(clip, 0, DType::F32, device).unwrap(), encode);
}

fn two_experts() -> BaseModel {
    let named = ModelConfig { folder: Some(fixture("repo_official_a14b")), ..ModelConfig::default() };
    let mut model = named.settle("".as_ref(), Processor::of(&device())).unwrap();
    model.expert = None;
    model
}

/// The models of `model`, with the expert for high noise trained, and the other one too or read when it is needed.
fn trained(model: &BaseModel, networks: Networks, decoding: Decoding) -> (Residents, [NoiseRange; 2]) {
    let dit = model.dits.of(Expert::High).open().unwrap().0;
    let ranges = Expert::ALL.map(|expert| model.noise_range_of(Some(expert), &dit));
    let residency = Residency { networks, decoding, vae: WhenIdle::Park, clip_groups: NonZeroUsize::MIN };
    let split = vec![(device(), 0..1), (device(), 1..dit.layers)];
    let ui = Ui::new(Voice::Json);
    let mut residents = Residents::new((model, &dit), split, residency, Setup::default(), &ui);
    residents.add_trained(ranges[0], &adapters(&dit, 2, 0.5), Vec::new()).unwrap();
    match networks {
        Networks::MakesRoom => residents.add(FromFiles {
            range: ranges[1],
            files: model.dits.of(Expert::Low).clone(),
            adapters: Vec::new(),
            for_clips: Vec::new(),
        }),
        _ => {
            residents.add_trained(ranges[1], &Adapters::default(), Vec::new()).unwrap();
        }
    }
    (residents, ranges)
}

fn ask(residents: &mut Residents, range: NoiseRange, input: &NetworkInput) -> Tensor {
    velocities(residents.network(range).unwrap(), std::slice::from_ref(input)).remove(0)
}

/// Networks that take turns, and one that is read again each time, predict what they predict side by side; what the plan
/// keeps apart is never on the devices together.
#[test]
fn networks_that_take_turns_predict_what_they_predict_side_by_side() {
    let model = two_experts();
    let (mut together, ranges) = trained(&model, Networks::SideBySide, Decoding::Beside);
    let input = micro_batch("turns", 1, together.dit().text_len, None).input;
    let expected = ranges.map(|range| ask(&mut together, range, &input));
    assert!(ranges.iter().all(|range| together.is_on_devices(*range)), "side by side");
    for networks in [Networks::InTurn, Networks::MakesRoom] {
        for decoding in [Decoding::Beside, Decoding::Alone] {
            let what = format!("{networks:?}, decoding {decoding:?}");
            let (mut residents, _) = trained(&model, networks, decoding);
            for turn in [0, 1, 0, 1] {
                assert_same_bits(&what, &ask(&mut residents, ranges[turn], &input), &expected[turn]);
                let there = ranges.map(|range| residents.is_on_devices(range));
                assert_eq!(there, [turn == 0, turn == 1], "{what}: networks on the devices");
                drop(residents.vae().unwrap());
                let is_alone = decoding == Decoding::Alone;
                assert_eq!(residents.is_on_devices(ranges[turn]), !is_alone, "{what}: beside the VAE");
            }
            assert!(residents.loaded(ranges[0]).is_some(), "{what}: a network that is trained was dropped");
        }
    }
}

/// An encoder that is asked for finds no network on the devices, and a network no encoder.
#[test]
fn encoders_and_networks_make_room_for_each_other() {
    let model = two_experts();
    let (mut residents, ranges) = trained(&model, Networks::SideBySide, Decoding::Beside);
    let states =
        residents.text_encoder().unwrap().encode_prompt("a fox").unwrap().to_dtype(DType::F32).unwrap();
    assert!(ranges.iter().all(|range| !residents.is_on_devices(*range)), "beside the text encoder");
    residents.network(ranges[1]).unwrap();
    assert!(residents.is_on_devices(ranges[1]));
    let again =
        residents.text_encoder().unwrap().encode_prompt("a fox").unwrap().to_dtype(DType::F32).unwrap();
    assert_same_bits("states of a text encoder that was read again", &again, &states);
}

/// Two owners of one card in one process: each is held to its own limit, and counts its own tensors.
#[test]
fn a_card_that_is_opened_twice_has_two_limits() {
    let settings =
        |gib: u64| kernels::device::Settings { memory_limit: Some(gib << 30), ..Default::default() };
    if !cfg!(feature = "cuda") {
        return;
    }
    let [small, large] = [1, 3].map(|gib| kernels::device::open_gpu(0, &settings(gib)).unwrap());
    let floats = |mib: usize| (mib << 20) / 4;
    let take = |device: &Device, mib: usize| Tensor::zeros(floats(mib), DType::F32, device);
    let used = |device: &Device| kernels::device::memory(device).unwrap().unwrap().used;
    // What cuBLASLt works in is there from the start.
    let idle = [used(&small), used(&large)];
    let more = || [used(&small) - idle[0], used(&large) - idle[1]];
    // Below 2 MiB it is the driver's pool that serves, above it the region.
    let little: Vec<Tensor> = (0..64).map(|_| take(&small, 1).unwrap()).collect();
    assert_eq!(more(), [64 << 20, 0]);
    let much = take(&large, 2048).unwrap();
    assert_eq!(more(), [64 << 20, 2 << 30]);
    assert!(take(&small, 1100).is_err(), "beyond the smaller limit");
    let kept: Vec<Tensor> = (0..800).map_while(|_| take(&large, 1).ok()).collect();
    assert!(kept.len() == 800, "the larger limit has room for {} MiB of small tensors", kept.len());
    let beyond: Vec<Tensor> = (0..1024).map_while(|_| take(&small, 1).ok()).collect();
    assert!(beyond.len() < 1000, "small tensors go beyond the smaller limit: {} MiB", beyond.len());
    drop((little, much));
}
