//! The same network on several groups of devices, for calls that do not depend on each other: the halves of the guidance, or
//! different clips.

use std::thread::{self, ScopedJoinHandle};

use kernels::Tensor;
use kernels::transfer::{Link, Route};
use models::adapter::Adapters;
use models::dit::Dit;

use super::{Pipeline, Stage, linked};
use crate::error::{Error, Result};

/// Bytes that may be on their way to a device at once: copies through host memory pin as much.
const UNDER_WAY: u64 = 256 << 20;

/// The stages of a pipeline of `stages` that the device of stage `index` holds where the network is on `groups` groups of
/// devices: its own and those beside it.
pub fn held_by(index: usize, groups: usize) -> std::ops::Range<usize> {
    let first = index / groups * groups;
    first..first + groups
}

impl Pipeline {
    /// The network on `count` groups of its devices, which must divide the number of stages. Group `j` has the devices of
    /// the stages j, j + count, ...; each holds the blocks of `count` stages in a row, its own on the same memory and copies of
    /// the others. Adapters are as they stand now.
    ///
    /// # Errors
    /// When a device has too little memory for the copies.
    pub fn grouped(&self, count: usize) -> Result<Vec<Self>> {
        if count == 0 || !self.stages.len().is_multiple_of(count) {
            let why = format!("{} stages cannot be {count} groups of equal size", self.stages.len());
            return Err(kernels::Error::msg(why).into());
        }
        let route = self.route;
        let joined = |index: usize| {
            let held = held_by(index, count);
            Stage::joined(&self.stages[held.clone()].iter().collect::<Vec<_>>(), index - held.start, route)
        };
        // Side by side: copies go both ways at once.
        let stages = thread::scope(|scope| {
            let joined = &joined;
            let threads: Vec<_> =
                (0..self.stages.len()).map(|index| scope.spawn(move || joined(index))).collect();
            let join = |t: ScopedJoinHandle<_>| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p));
            threads.into_iter().map(join).collect::<Result<Vec<Stage>>>()
        })?;
        let mut groups: Vec<Vec<Stage>> = (0..count).map(|_| Vec::new()).collect();
        stages.into_iter().enumerate().for_each(|(index, stage)| groups[index % count].push(stage));
        groups.into_iter().map(|stages| Self::of_stages(stages, route)).collect()
    }

    /// The pipeline of `stages`, whose tensors go from one to the next by `route`.
    pub(super) fn of_stages(stages: Vec<Stage>, route: Route) -> Result<Self> {
        let devices: Vec<_> = stages.iter().map(|stage| &stage.device).collect();
        let (ways, home) = linked(&devices, route)?;
        Ok(Self { stages, ways, home, route, shared: None })
    }
}

impl Stage {
    /// Consecutive stages as one on the device of `parts[own]`: on the same memory what is there, and copies of the rest, which go
    /// there by `route`.
    ///
    /// # Errors
    /// When the device has too little memory.
    pub fn joined(parts: &[&Self], own: usize, route: Route) -> Result<Self> {
        let Some(Self { device, ffn_tokens, store, .. }) = parts.get(own) else {
            return Err(Error::Split { layers: 0 });
        };
        let links = parts.iter().map(|part| Link::new(&part.device, device, route));
        let links = links.collect::<kernels::Result<Vec<_>>>()?;
        let mut under_way = 0;
        let mut place = |part: usize, tensor: &Tensor| {
            if parts[part].device.same_device(device) {
                return Ok(tensor.clone());
            }
            let copy = links[part].send(tensor.clone())?.receive()?;
            links[part].settle()?;
            under_way += (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64;
            if under_way > UNDER_WAY {
                device.synchronize()?;
                under_way = 0;
            }
            Ok(copy)
        };
        let dits: Vec<&Dit> = parts.iter().map(|part| &part.dit).collect();
        let dit = Dit::joined(&dits, device, &mut place)?;
        let (device, store) = (device.clone(), store.clone());
        let mut stage =
            Self { device, dit, adapters: Adapters::default(), ffn_tokens: *ffn_tokens, store, watch: None };
        parts.iter().try_for_each(|part| stage.attach(&part.adapters))?;
        stage.device.synchronize()?;
        links.iter().try_for_each(Link::settle)?;
        Ok(stage)
    }
}
