//! Devices of shadows on which work is played.

use kernels::ledger::{Allocation, Label, Ledger};
use kernels::transfer::{HOST_GRAIN, Route};
use kernels::{Device, ShadowAttention, ShadowGpu};

use super::{Engine, Neighbours, Scene, Way};

/// What the allocator takes on top of what tensors hold, as a share of their peak: up to two chunks for each hole, and the
/// holes between small tensors. On H200s the steps of a 14B on two cards ran under their limits with 0.05 to spare, and with
/// 0.03 before that.
const SLACK: f64 = 0.05;
/// The driver hands out multiples of this.
const DEVICE_GRAIN: u64 = 512;
/// What libraries take for as long as a device is open.
const WORKSPACE: Label = "workspace";

/// A device of shadows, for work that has it to itself or beside what it holds already.
#[derive(Debug)]
pub struct ShadowDevice {
    engine: Engine,
    device: Device,
    ledger: Ledger,
    held: Vec<Allocation>,
}

/// What a device holds at the peak of some work, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceMemory {
    /// The most that tensors hold.
    pub peak: u64,
    /// The same with what the allocator takes on top: what must be there.
    pub needed: u64,
}

impl ShadowDevice {
    /// One that holds nothing.
    pub fn new(engine: Engine) -> Self {
        Self::at(engine, 0)
    }

    /// The same as number `index` of several.
    pub fn at(engine: Engine, index: usize) -> Self {
        let (ledger, host) = (device_ledger(engine), Ledger::new(HOST_GRAIN));
        let device = shadow(engine, index, &ledger, &host);
        Self { engine, device, ledger, held: Vec::new() }
    }

    /// The same with `bytes` that something else has there all the time.
    pub fn holding(mut self, bytes: u64) -> Self {
        self.held.push(self.ledger.take_as("held", bytes));
        self
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The peak of all work that was played on it.
    pub fn memory(&self) -> DeviceMemory {
        DeviceMemory::of(self.engine, self.ledger.peak())
    }
}

impl DeviceMemory {
    /// Of work whose tensors hold `peak` bytes on `engine`.
    pub fn of(engine: Engine, peak: u64) -> Self {
        let slack = if engine.is_gpu() { (peak as f64 * SLACK) as u64 } else { 0 };
        Self { peak, needed: peak + slack }
    }
}

/// An empty ledger of a device of `engine`.
pub(super) fn device_ledger(engine: Engine) -> Ledger {
    Ledger::new(if engine.is_gpu() { DEVICE_GRAIN } else { 1 })
}

/// Bytes that are alive in `ledger`, without what libraries take for as long as the device is open.
pub(super) fn resident(ledger: &Ledger) -> u64 {
    ledger.reset_peak();
    let labels = ledger.at_peak();
    labels.iter().filter(|(label, _)| *label != WORKSPACE).map(|(_, bytes)| bytes).sum()
}

/// The devices of a stage on `engine` with its neighbours, all shadows; its own is counted in `device`, and pinned host memory
/// beside it in `host`.
pub(super) fn scene(engine: Engine, at: Neighbours, device: &Ledger, host: &Ledger) -> Scene {
    // A neighbour in the same memory is counted apart, as each stage is.
    let beside = |way: Way, index: usize| {
        let index = if way == Way::Same { at.index } else { index };
        let route = if way == Way::Host { Route::Host } else { Route::Auto };
        (shadow(engine, index, &Ledger::new(1), &Ledger::new(1)), route)
    };
    Scene {
        index: at.index,
        count: at.count,
        own: shadow(engine, at.index, device, host),
        previous: at.previous.map(|way| beside(way, at.index.saturating_sub(1))),
        next: at.next.map(|way| beside(way, at.index + 1)),
        host: Device::shadow_cpu(None),
    }
}

fn shadow(engine: Engine, index: usize, device: &Ledger, host: &Ledger) -> Device {
    let attention = match engine {
        Engine::Cpu => return Device::shadow_cpu(Some(device.clone())),
        Engine::Chunked => ShadowAttention::Chunked,
        Engine::Cudnn(repeatability) => ShadowAttention::Cudnn(repeatability),
    };
    Device::shadow_gpu(ShadowGpu { index, attention }, device.clone(), host.clone())
}
