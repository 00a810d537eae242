//! How much host memory a plan pins where the recipe does not say: as much as pays.
//!
//! Pinned memory cannot be swapped or used by anything else, and takes time to pin. A desktop has 64 GiB for
//! all of its programs, so every GiB has to bring something.

use std::cmp::Ordering;

use super::{Choice, Machine, MemoryConfig, Offload};

/// Amounts that are tried below half of what is available, in GiB.
const TRIED: [u64; 6] = [8, 16, 24, 32, 48, 64];
/// What a GiB must bring, as a share of a step's time: 10 GiB for 3 %.
const WORTH: f64 = 0.003;
/// What more host memory would bring is said from this share of a step on.
const WORTH_A_WORD: f64 = 0.02;

const GIB: u64 = 1 << 30;

/// What more pinned host memory would bring.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct More {
    /// Bytes in all, for `memory.host_memory`.
    pub bytes: u64,
    /// Share of a step's time that it would save.
    pub saves: f64,
}

impl std::fmt::Display for More {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let (gib, percent) = (self.bytes.div_ceil(GIB), 100.0 * self.saves);
        write!(f, "memory.host_memory = \"{gib}GiB\" would make a step about {percent:.0} % faster")
    }
}

/// What a plan comes to with some amount of host memory.
#[derive(Debug, Clone)]
pub(super) struct Tried {
    /// The machine with that much.
    machine: Machine,
    /// Bytes by which it does not fit.
    beyond: u64,
    /// Estimated seconds of the slowest stage for a micro-batch.
    seconds: f64,
    /// Bytes that it pins.
    pinned: u64,
}

impl Tried {
    /// `choice`, made on `machine`.
    pub fn new(machine: Machine, choice: &Choice) -> Self {
        let pinned = choice.stages.iter().map(|stage| stage.host).sum();
        Self { machine, beyond: choice.beyond, seconds: choice.seconds, pinned }
    }

    /// Time with what is pinned counted in: the lower, the better.
    fn cost(&self) -> f64 {
        self.seconds * (1.0 + WORTH * self.pinned as f64 / GIB as f64)
    }
}

/// `machine` with each amount of host memory below its own that is worth a try; none where the recipe gives the amount.
pub(super) fn less(machine: &Machine, asked: &MemoryConfig) -> Vec<Machine> {
    let is_open = asked.host_memory.is_none() && asked.offload != Offload::Never;
    match is_open && machine.stages.iter().any(|card| card.engine.is_gpu()) {
        true => {
            let amounts = TRIED.into_iter().map(|gib| gib * GIB).filter(|host| *host < machine.host);
            amounts.map(|host| Machine { host, ..machine.clone() }).collect()
        }
        false => Vec::new(),
    }
}

/// The machine whose plan pays best, of `less` host memory or the `most` that may be pinned, and what the most would bring
/// over it.
pub(super) fn best(less: Vec<Tried>, most: Tried) -> (Machine, Option<More>) {
    let order = |a: &Tried, b: &Tried| a.beyond.cmp(&b.beyond).then(a.cost().total_cmp(&b.cost()));
    let best = less.into_iter().fold(most.clone(), |best, other| match order(&other, &best) {
        Ordering::Less => other,
        _ => best,
    });
    let saves = 1.0 - most.seconds / best.seconds;
    let is_more = best.beyond == 0 && most.pinned > best.pinned && saves >= WORTH_A_WORD;
    (best.machine, is_more.then_some(More { bytes: most.pinned, saves }))
}
