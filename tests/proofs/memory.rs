//! The forecast and the choice.

use candle_core::DType;
use kernels::device::Repeatability;
use kernels::weight::Format;
use models::adapter::{LoraConfig, Target};
use models::dit::{Base, DitConfig};
use models::weights::{Frozen, Storage};
use trainer::bench::dit_preset;
use trainer::forecast::{Engine, Task, Way};
use trainer::memory::{Card, Forecast, Machine, MemoryConfig, Room, choose};

const GIB: u64 = 1 << 30;

fn cards(count: usize, gib: f64, flops: f64) -> Machine {
    let room = Room::AtMost((gib * GIB as f64) as u64);
    let card = Card { name: "cuda:0".into(), engine: Engine::Cudnn(Repeatability::Fast), room, flops };
    Machine { stages: vec![card; count], ways: vec![Way::Peer; count - 1], host: 200 * GIB }
}

fn base(storage: Storage) -> Base {
    Base::new(Frozen { compute: DType::BF16, storage })
}

#[test]
fn show() {
    let fp8 = Storage::Coded(Format::E4m3);
    for (model, storage, count, gib, latents, m) in [
        ("t2v-14b", Storage::Dense, 2, 22.0, (13, 60, 104), 1),
        ("t2v-14b", Storage::Dense, 2, 22.0, (13, 60, 104), 8),
        ("t2v-14b", fp8, 2, 22.0, (13, 60, 104), 8),
        ("t2v-14b", fp8, 2, 22.0, (21, 60, 104), 8),
        ("t2v-14b", fp8, 2, 23.0, (21, 90, 160), 1),
        ("t2v-14b", fp8, 2, 23.0, (21, 90, 160), 4),
        ("t2v-14b", Storage::Dense, 1, 139.0, (13, 60, 104), 1),
        ("t2v-14b", Storage::Dense, 1, 139.0, (21, 60, 104), 1),
        ("t2v-1.3b", Storage::Dense, 1, 23.0, (21, 60, 104), 1),
    ] {
        let dit: DitConfig = dit_preset(model).unwrap();
        let lora = LoraConfig::default();
        let targets: Vec<Target> = lora.select(&dit.adaptable_modules()).unwrap();
        let task = Task {
            dit: &dit,
            base: base(storage),
            targets: &targets,
            rank: 32,
            dropout: false,
            batch: 1,
            accumulate: m,
            latents,
        };
        let machine = cards(count, gib, 989e12);
        let start = std::time::Instant::now();
        let choice = choose(&task, &machine, &MemoryConfig::default(), None);
        println!(
            "{model} {storage:?} x{m}: {:?} beyond {} {:.3} s a block",
            start.elapsed(),
            choice.beyond as f64 / GIB as f64,
            choice.seconds
        );
        println!("{}\n", Forecast::new(&choice, &machine, task.tokens(), 1));
    }
}
