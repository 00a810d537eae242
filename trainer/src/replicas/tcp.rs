//! The communicator over TCP: through host memory and rank 0.
//!
//! It is for training on CPUs, for tests, and for the small messages of every run. It is exact and plain: each rank sends its
//! numbers to rank 0, which adds them in the order of the ranks and sends the sum back, so rank 0's connection carries
//! everything twice for each other rank. GPUs exchange over NCCL unless a recipe asks for this.

use std::sync::Arc;

use kernels::Tensor;

use super::communicator::{Communicator, flat, in_buckets, shaped};
use super::error::{ReplicaError, Result};
use super::health::{Doing, Health};
use super::wire::{Kind, Wire};

/// Connections of rank 0 to all others in their order, or of another rank to rank 0.
pub(super) struct Tcp {
    rank: usize,
    wires: Vec<Wire>,
    /// Exchanges so far: two ranks whose counts differ are out of step.
    count: u64,
    health: Arc<Health>,
}

impl Tcp {
    pub fn new(rank: usize, wires: Vec<Wire>, health: Arc<Health>) -> Self {
        Self { rank, wires, count: 0, health }
    }

    /// Runs an exchange, while this rank counts as waiting. A failure that broke the connection explains it better than the
    /// connection does.
    fn exchange<T>(&mut self, work: impl FnOnce(&mut [Wire], u64, &Health) -> Result<T>) -> Result<T> {
        self.health.check()?;
        self.count += 1;
        let before = self.health.enter(Doing::Waiting);
        let done = work(&mut self.wires, self.count, &self.health);
        self.health.enter(before);
        done.map_err(|error| match error {
            ReplicaError::Io { .. } => self.health.cause(error),
            other => other,
        })
    }
}

impl Communicator for Tcp {
    fn name(&self) -> &'static str {
        "TCP"
    }

    fn sum(&mut self, tensors: Vec<Tensor>) -> crate::Result<Vec<Tensor>> {
        let rank = self.rank;
        in_buckets(tensors, |bucket| {
            let mut numbers = flat(bucket)?;
            self.exchange(|wires, count, health| sum(rank, wires, (count, &mut numbers), health))?;
            Ok(shaped(&numbers, bucket)?)
        })
    }

    fn gather(&mut self, message: &[u8]) -> Result<Vec<Vec<u8>>> {
        let is_first = self.rank == 0;
        self.exchange(|wires, count, health| {
            let go_on = || health.check();
            if !is_first {
                let wire = &mut wires[0]; // to rank 0
                wire.send(Kind::Message, count, message, &go_on)?;
                return Ok(split(&message_of(wire, count, &go_on)?));
            }
            let mut all = vec![message.to_vec()];
            for wire in wires.iter_mut() {
                all.push(message_of(wire, count, &go_on)?);
            }
            let joined = join(&all);
            for wire in wires.iter_mut() {
                wire.send(Kind::Message, count, &joined, &go_on)?;
            }
            Ok(all)
        })
    }

    fn broadcast(&mut self, bytes: Vec<u8>) -> Result<Vec<u8>> {
        let is_first = self.rank == 0;
        self.exchange(|wires, count, health| {
            let go_on = || health.check();
            if is_first {
                for wire in wires.iter_mut() {
                    wire.send(Kind::Message, count, &(bytes.len() as u64).to_le_bytes(), &go_on)?;
                    wire.send(Kind::Numbers, count, &bytes, &go_on)?;
                }
                return Ok(bytes);
            }
            let wire = &mut wires[0]; // to rank 0
            let mut length = [0; 8];
            wire.receive_into(Kind::Message, count, &mut length, &go_on)?;
            let mut bytes = vec![0; u64::from_le_bytes(length) as usize];
            wire.receive_into(Kind::Numbers, count, &mut bytes, &go_on)?;
            Ok(bytes)
        })
    }
}

/// Sums `numbers` over all ranks, in the order of the ranks.
fn sum(rank: usize, wires: &mut [Wire], (count, numbers): (u64, &mut [f32]), health: &Health) -> Result<()> {
    let go_on = || health.check();
    let mut bytes = vec![0; 4 * numbers.len()];
    if rank > 0 {
        let wire = &mut wires[0]; // to rank 0
        encode(numbers, &mut bytes);
        wire.send(Kind::Numbers, count, &bytes, &go_on)?;
        wire.receive_into(Kind::Numbers, count, &mut bytes, &go_on)?;
        decode(&bytes, numbers, |number, sum| *number = sum);
        return Ok(());
    }
    for wire in wires.iter_mut() {
        wire.receive_into(Kind::Numbers, count, &mut bytes, &go_on)?;
        decode(&bytes, numbers, |sum, number| *sum += number);
    }
    encode(numbers, &mut bytes);
    wires.iter_mut().try_for_each(|wire| wire.send(Kind::Numbers, count, &bytes, &go_on))
}

fn encode(numbers: &[f32], bytes: &mut [u8]) {
    let places = bytes.chunks_exact_mut(4).zip(numbers);
    places.for_each(|(place, number)| place.copy_from_slice(&number.to_le_bytes()));
}

/// Calls `take` with each of `numbers` and the one that came for it.
fn decode(bytes: &[u8], numbers: &mut [f32], take: impl Fn(&mut f32, f32)) {
    for (number, bytes) in numbers.iter_mut().zip(bytes.as_chunks().0) {
        take(number, f32::from_le_bytes(*bytes));
    }
}

fn message_of(wire: &mut Wire, count: u64, go_on: super::wire::GoOn) -> Result<Vec<u8>> {
    match wire.receive(go_on)? {
        (Kind::Message, number, bytes) if number == count => Ok(bytes),
        (kind, number, _) => {
            let why = format!("{} sends {kind:?} {number} where message {count} is expected", wire.peer);
            Err(ReplicaError::OutOfStep { why })
        }
    }
}

/// Several messages as one: each behind its length.
fn join(messages: &[Vec<u8>]) -> Vec<u8> {
    let mut joined = Vec::new();
    for message in messages {
        joined.extend((message.len() as u64).to_le_bytes());
        joined.extend(message);
    }
    joined
}

/// The messages that [`join`] has made one of.
fn split(mut joined: &[u8]) -> Vec<Vec<u8>> {
    let mut messages = Vec::new();
    while let Some((length, rest)) = joined.split_first_chunk() {
        let length = (u64::from_le_bytes(*length) as usize).min(rest.len());
        messages.push(rest[..length].to_vec());
        joined = &rest[length..];
    }
    messages
}
