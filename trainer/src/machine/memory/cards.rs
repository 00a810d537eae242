//! Cards that are not here, to plan for: `--on 2x4090`.

use std::str::FromStr;

use kernels::attention;
use models::dit::{Base, DitConfig};

use super::machine::{Card, Machine, Room, flops_of, integer_ops_of, link_of};
use crate::bytes::Bytes;
use crate::machine::devices::DevicesConfig;
use crate::machine::forecast::{Engine, Way};

/// Bytes of a card that no tensor gets: the driver's context, loaded kernels, cuBLAS and cuDNN.
const TAKEN: u64 = 600 << 20;
/// Bytes of host memory that are taken to be there for pinning where the recipe does not say: half of a machine with 64 GiB.
pub const HOST: u64 = 32 << 30;

/// Name, GiB of memory, compute capability. Source: NVIDIA's product pages and its table of compute capabilities.
const KNOWN: [(&str, u64, (u32, u32)); 14] = [
    ("3060", 12, (8, 6)),
    ("3090", 24, (8, 6)),
    ("4070", 12, (8, 9)),
    ("4080", 16, (8, 9)),
    ("4090", 24, (8, 9)),
    ("5080", 16, (12, 0)),
    ("5090", 32, (12, 0)),
    ("a40", 48, (8, 6)),
    ("a6000", 48, (8, 6)),
    ("l4", 24, (8, 9)),
    ("l40s", 48, (8, 9)),
    ("a100", 80, (8, 0)),
    ("h100", 80, (9, 0)),
    ("h200", 141, (9, 0)),
];

/// Cards that a plan is made for, one for each stage.
#[derive(Debug, Clone, PartialEq)]
pub struct Cards(Vec<Assumed>);

/// A card that is not here.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Assumed {
    /// Bytes of its memory.
    memory: u64,
    capability: (u32, u32),
}

impl FromStr for Cards {
    type Err = String;

    /// Reads `4090`, `2x4090`, `24GiB`, `2x24GiB`, or several of these behind commas. A card of which only the memory is said
    /// is taken to be as fast as an RTX 3090.
    fn from_str(text: &str) -> Result<Self, String> {
        let known: Vec<&str> = KNOWN.iter().map(|card| card.0).collect();
        let refuse = |part: &str| {
            format!(
                "\"{part}\" is no card; write an amount of memory, such as 24GiB or 2x24GiB, or one of {}, such as 2x4090",
                known.join(", ")
            )
        };
        let mut cards = Vec::new();
        for part in text.split(',').map(str::trim) {
            let (count, name) = match part.split_once(['x', 'X']) {
                Some((count, name)) => (count.trim().parse().map_err(|_| refuse(part))?, name.trim()),
                None => (1, part),
            };
            let plain = name.to_lowercase().replace("rtx", "").replace([' ', '-'], "");
            let card = match KNOWN.iter().find(|card| card.0 == plain) {
                Some(&(_, memory, capability)) => Assumed { memory: memory << 30, capability },
                None => {
                    let Bytes(memory) = name.parse().map_err(|_| refuse(part))?;
                    Assumed { memory, capability: (8, 6) }
                }
            };
            if !(1..=16).contains(&count) || card.memory <= TAKEN {
                return Err(refuse(part));
            }
            cards.extend(std::iter::repeat_n(card, count));
        }
        Ok(Self(cards))
    }
}

impl Cards {
    /// `asked` with a stage for each card; stages and split of a recipe for as many GPUs stay.
    pub fn devices(&self, asked: &DevicesConfig) -> DevicesConfig {
        let is_for_them = asked.stages.len() == self.0.len() && asked.stages.iter().all(|name| name != "cpu");
        match is_for_them {
            true => asked.clone(),
            false => DevicesConfig {
                stages: (0..self.0.len()).map(|index| format!("cuda:{index}")).collect(),
                split: Vec::new(),
                ..asked.clone()
            },
        }
    }

    /// What `devices`, which are these cards, would run on: without a way from card to card but through host memory, and with
    /// cuDNN.
    pub fn machine(
        &self,
        devices: &DevicesConfig,
        base: Base,
        dit: &DitConfig,
        host: Option<u64>,
    ) -> Machine {
        let engine = match attention::is_for_cudnn(base.frozen.compute, dit.head_size()) {
            true => Engine::Cudnn(devices.settings().repeatability),
            false => Engine::Chunked,
        };
        let card = |(name, card): (&String, &Assumed)| {
            let whole = card.memory - TAKEN; // a card has more
            let room = devices.memory_limit.map_or(whole, |limit| whole.min(limit.0));
            let (flops, integer_ops) = (flops_of(card.capability), integer_ops_of(card.capability));
            let link = link_of(card.capability);
            Card { name: name.clone(), engine, room: Room::AtMost(room), taken: 0, flops, integer_ops, link }
        };
        Machine {
            stages: devices.stages.iter().zip(&self.0).map(card).collect(),
            ways: vec![Way::Host; self.0.len() - 1], // at least one card was read
            host: host.unwrap_or(HOST),
        }
    }
}
