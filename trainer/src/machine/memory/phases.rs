//! What a run does besides its steps, and what each of it takes.

use std::fmt;

use serde::{Serialize, Serializer};

use super::report::with_taken;
use super::{Machine, Room};
use crate::bytes::Bytes;
use crate::machine::forecast::DeviceMemory;

/// Something that a run, or `tandem sample`, does besides steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Prompts and captions go through UMT5, which is alone on its device.
    TextEncoder,
    /// The largest bucket goes through the VAE, with CLIP beside it where the model looks through it; the DiT is not there.
    EncodingClips,
    /// Pictures that clips are to begin or end with go through the VAE, then through CLIP.
    EncodingPictures,
    /// Held-out clips go through the DiT.
    HeldOutLoss,
    /// Clips go from noise to latents.
    Sampling,
    /// Latents of the largest clip go through the VAE.
    Decoding,
}

/// What a phase takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PhaseForecast {
    /// Which.
    pub phase: Phase,
    /// Of each device that takes part.
    pub devices: Vec<PhaseMemory>,
}

/// What a phase takes of one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PhaseMemory {
    /// The device.
    pub device: String,
    /// The most bytes that tensors hold.
    pub peak: u64,
    /// The same with what the allocator takes on top: what must be there.
    pub needed: u64,
    /// Bytes that there are, where that is known.
    #[serde(serialize_with = "bytes")]
    pub room: Room,
}

/// How many devices take part in `phase` by the forecasts `phases`; one where they do not say.
pub fn devices_of(phase: Phase, phases: &[PhaseForecast]) -> usize {
    phases.iter().find(|forecast| forecast.phase == phase).map_or(1, |forecast| forecast.devices.len())
}

impl PhaseForecast {
    /// `phase` on the devices of `machine` of which `memory` gives the first stage on each.
    pub fn new(
        phase: Phase,
        machine: &Machine,
        memory: impl IntoIterator<Item = (usize, DeviceMemory)>,
    ) -> Self {
        let of = |(stage, DeviceMemory { peak, needed }): (usize, DeviceMemory)| PhaseMemory {
            device: machine.stages[stage].name.clone(),
            peak,
            needed,
            room: machine.room_of(stage),
        };
        Self { phase, devices: memory.into_iter().map(of).collect() }
    }

    /// The first device that has too little memory.
    pub fn misfit(&self) -> Option<&PhaseMemory> {
        self.devices.iter().find(|device| match device.room {
            Room::AtMost(room) => device.needed > room,
            Room::Unknown | Room::About(_) => false,
        })
    }
}

impl PhaseMemory {
    /// The device as a refusal names it: with what other programs hold of it, where that is worth a word.
    pub fn place(&self, machine: &Machine) -> String {
        let card = machine.stages.iter().find(|card| card.name == self.device);
        with_taken(&self.device, card.map_or(0, |card| card.taken))
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(match self {
            Self::TextEncoder => "text encoder",
            Self::EncodingClips => "encoding clips",
            Self::EncodingPictures => "encoding pictures",
            Self::HeldOutLoss => "held-out loss",
            Self::Sampling => "sampling",
            Self::Decoding => "decoding clips",
        })
    }
}

impl fmt::Display for PhaseForecast {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let device = |device: &PhaseMemory| match device.room.bytes() {
            Some(room) => format!("{} {} of {}", device.device, Bytes(device.needed), Bytes(room)),
            None => format!("{} {}", device.device, Bytes(device.needed)),
        };
        let devices: Vec<String> = self.devices.iter().map(device).collect();
        write!(f, "{:<18} {}", self.phase, devices.join(", "))
    }
}

fn bytes<S: Serializer>(room: &Room, serializer: S) -> Result<S::Ok, S::Error> {
    room.bytes().serialize(serializer)
}
