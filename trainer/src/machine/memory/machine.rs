//! What the stages run on, as far as memory and time go.

use kernels::attention;
use kernels::inventory::{self, Gpu};
use kernels::weight::Format;
use models::dit::{Base, DitConfig};
use models::weights::{Frozen, Storage};

use crate::machine::devices::{DevicesConfig, Limits, Transfer};
use crate::machine::forecast::{Engine, Neighbours, Way};

/// Share of the host's available memory that offload may pin where the recipe says nothing, and that stages on the CPU
/// keep to where they can.
const HOST_SHARE: f64 = 0.5;

/// The devices of the stages, the links between them and the host's memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Machine {
    /// One for each stage, first to last.
    pub stages: Vec<Card>,
    /// From each stage to the next.
    pub ways: Vec<Way>,
    /// Bytes of host memory that may be pinned.
    pub host: u64,
}

/// The device of a stage.
#[derive(Debug, Clone, PartialEq)]
pub struct Card {
    /// As in `devices.stages`.
    pub name: String,
    /// What runs the operations.
    pub engine: Engine,
    /// Room for the tensors of this stage.
    pub room: Room,
    /// Bytes of it that other programs hold.
    pub taken: u64,
    /// Dense bf16 operations a second at the peak.
    pub flops: f64,
    /// Dense operations on 8-bit integers a second at the peak.
    pub integer_ops: f64,
    /// Bytes a second between the card and pinned host memory, one way.
    pub link: f64,
}

impl Card {
    /// Operations a second of products with matrices stored as `frozen` says, at the peak.
    pub fn product_ops(&self, frozen: Frozen) -> f64 {
        match frozen.storage {
            Storage::Quantised(Format::RotatedInt8) => self.integer_ops,
            _ => self.flops,
        }
    }
}

/// How much memory there is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// The device is not here to be asked.
    Unknown,
    /// About so much: a plan keeps under it if it can.
    About(u64),
    /// So much and no more.
    AtMost(u64),
}

impl Room {
    /// The bytes, where they are known.
    pub fn bytes(self) -> Option<u64> {
        match self {
            Self::Unknown => None,
            Self::About(bytes) | Self::AtMost(bytes) => Some(bytes),
        }
    }

    fn times(self, count: u64) -> Self {
        match self {
            Self::Unknown => self,
            Self::About(bytes) => Self::About(bytes * count),
            Self::AtMost(bytes) => Self::AtMost(bytes * count),
        }
    }

    fn shared_by(self, count: u64) -> Self {
        match self {
            Self::Unknown => self,
            Self::About(bytes) => Self::About(bytes / count),
            Self::AtMost(bytes) => Self::AtMost(bytes / count),
        }
    }
}

impl Machine {
    /// What `devices`, settled, are on this machine, where tensors keep to `limits`; `host` is what the recipe lets offload
    /// pin. Of GPUs that are not here it is taken that cuDNN serves them.
    pub fn here(
        devices: &DevicesConfig,
        limits: &Limits,
        base: Base,
        dit: &DitConfig,
        host: Option<u64>,
    ) -> Self {
        let is_gpu = |name: &String| name != "cpu";
        let gpus = match devices.stages.iter().any(is_gpu) {
            true => inventory::gpus().unwrap_or_default(),
            false => Vec::new(),
        };
        let is_fit = attention::is_for_cudnn(base.frozen.compute, dit.head_size());
        let engine = match is_fit && (gpus.is_empty() || attention::cudnn().is_ok()) {
            true => Engine::Cudnn(devices.settings().repeatability),
            false => Engine::Chunked,
        };
        let share = share_of_host();
        let card = |name: &String| {
            let gpu = gpus.iter().find(|gpu| format!("cuda:{}", gpu.index) == *name);
            let limit = limits.of(name);
            let given = devices.memory_limit.map(|given| given.0);
            let sharing = devices.stages.iter().filter(|other| *other == name).count() as u64;
            let (engine, room) = match is_gpu(name) {
                true => {
                    (engine, limit.map(|limit| limit.bytes).or(given).map_or(Room::Unknown, Room::AtMost))
                }
                false => (Engine::Cpu, share.map_or(Room::Unknown, Room::About)),
            };
            let capability = gpu.map_or((0, 0), |gpu| gpu.capability);
            let (flops, integer_ops) = (flops_of(capability), integer_ops_of(capability));
            let link = link_of(capability);
            let taken = limit.map_or(0, |limit| limit.taken);
            Card {
                name: name.clone(),
                engine,
                room: room.shared_by(sharing),
                taken,
                flops,
                integer_ops,
                link,
            }
        };
        Self {
            stages: devices.stages.iter().map(card).collect(),
            ways: devices
                .stages
                .windows(2)
                .map(|pair| way(&pair[0], &pair[1], devices.transfer, &gpus))
                .collect(),
            host: host_memory(host),
        }
    }

    /// The devices, each once, with the stages that are on it.
    pub fn devices(&self) -> Vec<(&str, Vec<usize>)> {
        let mut devices: Vec<(&str, Vec<usize>)> = Vec::new();
        for (index, card) in self.stages.iter().enumerate() {
            match devices.iter_mut().find(|(name, _)| *name == card.name) {
                Some((_, stages)) => stages.push(index),
                None => devices.push((&card.name, vec![index])),
            }
        }
        devices
    }

    /// Room for tensors on the device of stage `index`: that of all stages on it.
    pub fn room_of(&self, index: usize) -> Room {
        let name = &self.stages[index].name;
        let sharing = self.stages.iter().filter(|card| card.name == *name).count() as u64;
        self.stages[index].room.times(sharing)
    }

    /// The place of the device of stage `index` in its pipeline where the network is on `groups` groups of devices.
    pub(crate) fn place_in_group(&self, index: usize, groups: usize) -> Neighbours {
        let (place, count) = (index / groups, self.stages.len() / groups);
        // Ways between cards that are not neighbours are taken to be like those between neighbours.
        let previous = (place > 0).then(|| self.ways.get(index - 1).copied()).flatten();
        let next = (place + 1 < count).then(|| self.ways.get(index).copied()).flatten();
        Neighbours { index: place, count, previous, next }
    }

    /// The place of stage `index`.
    pub(crate) fn place_of(&self, index: usize) -> Neighbours {
        let previous = index.checked_sub(1).and_then(|before| self.ways.get(before)).copied();
        Neighbours { index, count: self.stages.len(), previous, next: self.ways.get(index).copied() }
    }
}

fn way(from: &str, to: &str, transfer: Transfer, gpus: &[Gpu]) -> Way {
    let number = |name: &str| name.strip_prefix("cuda:").and_then(|index| index.parse::<usize>().ok());
    let (Some(a), Some(b)) = (number(from), number(to)) else { return Way::Same };
    let reaches = gpus.iter().any(|gpu| gpu.index == a && gpu.peers.contains(&b));
    match () {
        () if from == to => Way::Same,
        () if reaches && transfer == Transfer::Auto => Way::Peer,
        () => Way::Host,
    }
}

/// Dense bf16 operations a second with f32 sums, by compute capability; NVIDIA's figures for the A100, RTX 3090, RTX 4090,
/// H100, B200 and RTX 5090. Cards of one capability differ, but rarely two in one machine.
pub(super) fn flops_of(capability: (u32, u32)) -> f64 {
    match capability {
        (8, 0) => 312e12,
        (8, 9) => 165e12,
        (9, _) => 989e12,
        (10, _) => 2250e12,
        (12, _) => 209e12,
        _ => 71e12,
    }
}

/// Dense operations on 8-bit integers a second, by compute capability: NVIDIA's figures for the same cards, but for Hopper, where the kernel
/// uses the instructions of earlier cards: what a loop of them alone reached on an H100.
pub(super) fn integer_ops_of(capability: (u32, u32)) -> f64 {
    match capability {
        (8, 0) => 624e12,
        (8, 9) => 660e12,
        (9 | 10, _) => 1283e12,
        (12, _) => 838e12,
        _ => 284e12,
    }
}

/// Bytes a second between a card and pinned host memory, one way, by compute capability. An H200 on PCIe 5.0 x16 was
/// measured at 55e9. PCIe 4.0 x16 carries 25e9, and a desktop's second slot often less.
pub(super) fn link_of(capability: (u32, u32)) -> f64 {
    match capability {
        (9 | 10, _) => 50e9,
        (12, _) => 25e9,
        _ => 20e9,
    }
}

/// Bytes of host memory that may be pinned: what the recipe lets offload have, else a share of what is available.
fn host_memory(asked: Option<u64>) -> u64 {
    asked.or_else(share_of_host).unwrap_or(0)
}

/// `host` bytes in shares of stages: as the micro-batches that each holds, of all.
pub fn host_shares(host: u64, stages: usize, accumulate: usize) -> Vec<u64> {
    let in_flight = |stage: usize| (stages - stage).min(accumulate) as u64;
    let all = (0..stages).map(in_flight).sum::<u64>().max(1);
    (0..stages).map(|stage| host * in_flight(stage) / all).collect()
}

fn share_of_host() -> Option<u64> {
    available_memory().map(|bytes| (bytes as f64 * HOST_SHARE) as u64)
}

/// Bytes of host memory that a process can get without pushing others out, if the system says.
pub fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
