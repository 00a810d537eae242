//! What was chosen and what it takes, for people and for machines.

use std::fmt;

use models::adapter::AdapterKind;
use models::dit::Streamed;
use serde::Serialize;

use super::phases::devices_of;
use super::{Choice, Machine, More, Phase, PhaseForecast, Room, Run, Shape, runs};
use crate::bytes::Bytes;
use crate::error::Result;
use crate::machine::forecast::{Decoding, Networks, StageMemory, Task};

/// The forecast of a plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Forecast {
    /// Tokens of a sample of the largest bucket.
    pub tokens: usize,
    /// Samples of a micro-batch.
    pub batch: usize,
    /// The most tokens that go through a feed-forward layer at once.
    pub ffn_tokens: usize,
    /// The stages, first to last.
    pub stages: Vec<StageForecast>,
    /// The kind of adapter.
    pub kind: AdapterKind,
    /// Where the trained networks are.
    pub networks: Networks,
    /// Where they are while clips are decoded.
    pub decoding: Decoding,
    /// The blocks whose matrices are in host memory.
    #[serde(skip_serializing_if = "Streamed::is_none")]
    pub streamed: Streamed,
    /// How clips go through the network on several devices, and why so; nothing without clips.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clips: Option<String>,
    /// About the share of the run's time that clips take, without their decoding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_share: Option<f64>,
    /// What is done besides steps, in the order in which a run does it; nothing of a step that is planned alone.
    pub phases: Vec<PhaseForecast>,
    /// The same plan in every bucket.
    pub buckets: Vec<BucketForecast>,
    /// What more pinned host memory would bring.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub more_host: Option<More>,
}

/// What a step of one bucket takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BucketForecast {
    /// The bucket, in words.
    pub bucket: String,
    /// Tokens of a sample.
    pub tokens: usize,
    /// The most that tensors hold on each stage, in bytes.
    pub peaks: Vec<u64>,
}

/// The forecast of one stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StageForecast {
    /// The device.
    pub device: String,
    /// First block and the one behind the last.
    pub blocks: (usize, usize),
    /// What it holds at its peak, in bytes.
    #[serde(flatten)]
    pub memory: StageMemory,
    /// Bytes that there are, where that is known.
    pub room: Option<u64>,
    /// What becomes of its blocks.
    pub keep: Vec<Run>,
}

impl Forecast {
    /// Of `choice` for samples of `tokens` tokens, `batch` in a micro-batch.
    pub fn new(choice: &Choice, machine: &Machine, tokens: usize, batch: usize) -> Self {
        let mut first = 0;
        let stage = |(index, memory): (usize, &StageMemory)| {
            let (start, end) = (first, first + choice.split[index]);
            first = end;
            let card = &machine.stages[index];
            StageForecast {
                device: card.name.clone(),
                blocks: (start, end),
                memory: memory.clone(),
                room: card.room.bytes(),
                keep: runs(&choice.blocks[start..end]),
            }
        };
        let stages = choice.stages.iter().enumerate().map(stage).collect();
        Self {
            tokens,
            batch,
            ffn_tokens: choice.ffn_tokens,
            stages,
            kind: AdapterKind::Lora,
            networks: Networks::One,
            decoding: Decoding::Beside,
            streamed: Streamed::NONE,
            clips: None,
            clip_share: None,
            phases: Vec::new(),
            buckets: Vec::new(),
            more_host: None,
        }
    }

    /// With what a run does besides its steps.
    pub fn with_phases(self, phases: Vec<PhaseForecast>) -> Self {
        Self { phases, ..self }
    }

    /// How many devices take part in `phase`.
    pub fn devices_of(&self, phase: Phase) -> usize {
        devices_of(phase, &self.phases)
    }

    /// The slabs of host memory, in bytes, that each stage pins for what its blocks park.
    pub fn slabs(&self) -> Vec<Vec<u64>> {
        self.stages.iter().map(|stage| kernels::transfer::slabs(&stage.memory.parked)).collect()
    }

    /// With what more host memory would bring.
    pub(super) fn with_more(self, more_host: Option<More>) -> Self {
        Self { more_host, ..self }
    }

    /// With what `choice` takes in each of `shapes`, which `task` is cut to.
    pub(super) fn with_buckets(
        self,
        choice: &Choice,
        task: &Task,
        machine: &Machine,
        shapes: &[Shape],
    ) -> Result<Self> {
        let of = |(bucket, latents): &Shape| {
            let task = Task { latents: *latents, ..task.clone() };
            let peaks = choice.forecast(&task, machine)?.iter().map(|memory| memory.peak).collect();
            Ok(BucketForecast { bucket: bucket.clone(), tokens: task.tokens(), peaks })
        };
        let buckets = shapes.iter().map(of).collect::<Result<_>>()?;
        let Task { kind, networks, decoding, base, .. } = *task;
        Ok(Self { kind, networks, decoding, streamed: base.streamed, buckets, ..self })
    }

    /// Whether a device has too little memory for its stage, or the host for all: (device, bytes needed, bytes there).
    pub(super) fn misfit(&self, machine: &Machine) -> Option<(String, u64, u64)> {
        let of_stage = self.stages.iter().zip(&machine.stages).find_map(|(stage, card)| match card.room {
            Room::AtMost(room) if stage.memory.needed > room => {
                Some((with_taken(&stage.device, card.taken), stage.memory.needed, room))
            }
            _ => None,
        });
        let host = self.stages.iter().map(|stage| stage.memory.host).sum::<u64>();
        of_stage.or_else(|| {
            (host > machine.host)
                .then(|| ("pinned host memory (memory.host_memory)".to_owned(), host, machine.host))
        })
    }
}

impl Forecast {
    /// Lines about how clips are made.
    fn tell_clips(&self, f: &mut fmt::Formatter) -> fmt::Result {
        if let Some(clips) = self.clips.as_ref().filter(|_| self.stages.len() > 1) {
            writeln!(f, "  clips: {clips}")?;
        }
        if let Some(share) = self.clip_share {
            writeln!(
                f,
                "  clips take about {:.0} % of the run's time (an estimate)",
                (100.0 * share).max(1.0)
            )?;
        }
        Ok(())
    }

    /// A line about the blocks whose matrices are in host memory.
    fn tell_streamed(&self, f: &mut fmt::Formatter) -> fmt::Result {
        if self.streamed.is_none() {
            return Ok(());
        }
        let ranges = self.stages.iter().map(|stage| stage.blocks.0..stage.blocks.1);
        let streamed: usize = ranges.map(|blocks| self.streamed.of(blocks)).sum();
        let all = self.stages.last().map_or(0, |stage| stage.blocks.1);
        writeln!(
            f,
            "  the matrices of {streamed} of {all} blocks stay in pinned host memory, and are copied one such block ahead of \
             their use"
        )
    }
}

/// A device with what other programs hold of it, where that is worth a word.
pub(super) fn with_taken(device: &str, taken: u64) -> String {
    const WORTH_A_WORD: u64 = 512 << 20;
    match taken >= WORTH_A_WORD {
        true => format!("{device} (other programs hold about {} of it)", Bytes(taken)),
        false => device.to_owned(),
    }
}

impl fmt::Display for Forecast {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(
            f,
            "memory of a step in the largest bucket ({} tokens x {}), feed-forward by up to {} tokens:",
            self.tokens, self.batch, self.ffn_tokens
        )?;
        for stage in &self.stages {
            let StageMemory { weights, adapters, kept, replay, peak, needed, host, .. } = stage.memory;
            let (device, (first, end)) = (&stage.device, stage.blocks);
            write!(f, "  {device:<8} blocks {first:>2}..{end:<2}  weights {}", Bytes(weights))?;
            write!(f, "  adapters {}  kept {}  work {}", Bytes(adapters), Bytes(kept), Bytes(replay))?;
            write!(f, "  peak {}", Bytes(peak))?;
            match stage.room {
                Some(room) => {
                    writeln!(f, "; {} of {} with the allocator's share", Bytes(needed), Bytes(room))?
                }
                None => writeln!(f)?,
            }
            let mut from = first;
            for run in &stage.keep {
                writeln!(f, "{:11}blocks {from:>2}..{:<2}  keep {run}", "", from + run.count)?;
                from += run.count;
            }
            if host > 0 {
                writeln!(f, "{:11}host memory {}", "", Bytes(host))?;
            }
            let alive: Vec<String> = stage
                .memory
                .alive
                .iter()
                .take(6)
                .map(|(name, bytes)| format!("{name} {}", Bytes(*bytes)))
                .collect();
            writeln!(f, "{:11}alive at the peak: {}", "", alive.join(", "))?;
        }
        if self.buckets.len() > 1 {
            for BucketForecast { bucket, tokens, peaks } in &self.buckets {
                let peaks: Vec<String> = peaks.iter().map(|peak| Bytes(*peak).to_string()).collect();
                writeln!(f, "  {bucket}: {tokens} tokens, peak {}", peaks.join(" + "))?;
            }
        }
        self.tell_streamed(f)?;
        match self.networks {
            Networks::One => {}
            Networks::MakesRoom => writeln!(
                f,
                "  clips go through the other expert too: while they are made, the trained one's matrices wait in host memory"
            )?,
            Networks::SideBySide => {
                writeln!(f, "  both experts are on the devices side by side: the weights are those of two")?
            }
            Networks::InTurn => writeln!(
                f,
                "  one expert at a time is on the devices; the other one's matrices wait in host memory, and a step \
                 exchanges the two once at most"
            )?,
        }
        if !self.phases.is_empty() {
            writeln!(f, "memory of the rest of the run, with the allocator's share:")?;
        }
        self.phases.iter().try_for_each(|phase| writeln!(f, "  {phase}"))?;
        self.tell_clips(f)?;
        if self.decoding == Decoding::Alone {
            writeln!(f, "  while clips are decoded, the DiT's matrices wait in host memory")?;
        }
        let host = self.stages.iter().map(|stage| stage.memory.host).sum();
        let needed =
            self.stages.iter().map(|stage| format!("{} {}", stage.device, Bytes(stage.memory.needed)));
        write!(f, "  in all: {}, host {}", needed.collect::<Vec<_>>().join(", "), Bytes(host))?;
        match self.more_host {
            Some(more) => write!(f, "\n  {more}"),
            None => Ok(()),
        }
    }
}
