//! The state that a run begins with: rank 0's, on all replicas.

use std::collections::BTreeMap;

use kernels::optimiser::State;
use kernels::transfer::HostStore;
use kernels::{DType, Device, Tensor};
use xxhash_rust::xxh3::Xxh3;

use super::RunFolder;
use super::networks::TrainedNetworks;
use crate::error::{Error, Result};
use crate::learning::optim::{Saved, on_host};
use crate::plan::Planned;
use crate::replicas::{ReplicaError, Replicas};
use crate::residents::Residents;
use crate::train::checkpoint::{self, Progress};
use crate::watch::ui::Ui;

/// Where a run begins.
pub(super) struct Start {
    pub progress: Progress,
    pub networks: TrainedNetworks,
    /// Whether it is where a checkpoint stands.
    pub is_resumed: bool,
}

/// Loads the networks on every replica, with the state of the newest checkpoint in `folder` or a new one. Rank 0 alone reads
/// checkpoints: the others get what differs from theirs.
///
/// # Errors
/// Files that cannot be read, a foreign checkpoint, a replica that fails.
pub(super) fn load(
    planned: &Planned,
    folder: &RunFolder,
    residents: Residents,
    stores: &[HostStore],
    replicas: &mut Replicas,
    ui: &Ui,
) -> Result<Start> {
    let newest = || checkpoint::newest(&folder.checkpoints());
    let saved = if replicas.is_first() { newest()? } else { None };
    let loaded = saved.as_deref().map(checkpoint::load).transpose()?;
    let saved_state = loaded.as_ref().map(|(_, saved)| saved);
    let networks = TrainedNetworks::load(residents, planned, stores, saved_state, ui)?;
    let progress = loaded.map_or_else(Progress::default, |(progress, _)| progress);
    if let Some(path) = &saved {
        ui.say(&format!("going on after step {} from {}", progress.step, path.display()));
    }
    let mut start = Start { progress, networks, is_resumed: saved.is_some() };
    if replicas.world() > 1 {
        ui.phase("comparing replicas", || start.agree(replicas))?;
    }
    Ok(start)
}

impl Start {
    /// Gives rank 0's progress to all replicas, and its state where they have another one.
    fn agree(&mut self, replicas: &mut Replicas) -> Result<()> {
        let failed = |error: serde_json::Error| ReplicaError::OutOfStep { why: error.to_string() };
        let told = serde_json::to_vec(&(self.progress, self.is_resumed)).map_err(failed)?;
        let told = replicas.broadcast(told)?;
        (self.progress, self.is_resumed) = serde_json::from_slice(&told).map_err(failed)?;
        let saved = on_host(&self.networks.saved())?;
        let digests = replicas.gather(&digest(&saved, Digested::Everything)?)?;
        if digests.iter().all(|digest| *digest == digests[0]) {
            return Ok(());
        }
        let first = if replicas.is_first() { encode(&saved)? } else { Vec::new() };
        let first = replicas.broadcast(first)?;
        match replicas.is_first() {
            true => Ok(()),
            false => self.networks.restore(&decode(&first, &saved)?),
        }
    }
}

/// What a digest is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Digested {
    /// All that an optimiser keeps.
    Everything,
    /// The adapters.
    Parameters,
}

/// A digest of `saved`, which is equal where all bits are.
///
/// # Errors
/// A device that fails.
pub(super) fn digest(saved: &Saved, what: Digested) -> Result<Vec<u8>> {
    let mut hash = Xxh3::new();
    for (name, value) in &saved.globals {
        hash.update(name.as_bytes());
        hash.update(&value.to_le_bytes());
    }
    for (name, State { parameter, slots }) in &saved.tensors {
        hash.update(name.as_bytes());
        let slots = if what == Digested::Everything { slots.as_slice() } else { &[] };
        for tensor in std::iter::once(parameter).chain(slots) {
            hash.update(&bytes(tensor)?);
        }
    }
    Ok(hash.digest128().to_le_bytes().to_vec())
}

fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let numbers = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(numbers.into_iter().flat_map(f32::to_le_bytes).collect())
}

/// The numbers of `saved`, in the order of names.
fn encode(saved: &Saved) -> Result<Vec<u8>> {
    let mut all: Vec<u8> = saved.globals.values().flat_map(|value| value.to_le_bytes()).collect();
    for State { parameter, slots } in saved.tensors.values() {
        for tensor in std::iter::once(parameter).chain(slots) {
            all.extend(bytes(tensor)?);
        }
    }
    Ok(all)
}

/// What [`encode`] made of a state with the names and shapes of `like`.
///
/// # Errors
/// Bytes of another state.
fn decode(mut all: &[u8], like: &Saved) -> Result<Saved> {
    let short = || Error::from(ReplicaError::OutOfStep { why: "rank 0 trains other adapters".to_owned() });
    let mut saved = like.clone();
    for value in saved.globals.values_mut() {
        let (bytes, rest) = all.split_first_chunk().ok_or_else(short)?;
        (*value, all) = (f64::from_le_bytes(*bytes), rest);
    }
    let mut next = |like: &Tensor| -> Result<Tensor> {
        let (bytes, rest) = all.split_at_checked(4 * like.elem_count()).ok_or_else(short)?;
        all = rest;
        let numbers: Vec<f32> = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        Ok(Tensor::from_vec(numbers, like.shape(), &Device::Cpu)?)
    };
    let tensors = like.tensors.iter().map(|(name, State { parameter, slots })| {
        let parameter = next(parameter)?;
        let slots = slots.iter().map(&mut next).collect::<Result<_>>()?;
        Ok((name.clone(), State { parameter, slots }))
    });
    saved.tensors = tensors.collect::<Result<BTreeMap<_, _>>>()?;
    match all.is_empty() {
        true => Ok(saved),
        false => Err(short()),
    }
}
