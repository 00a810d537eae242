//! The communicator over NCCL: gradients go from GPU to GPU, small messages over TCP.
//!
//! NCCL's own sum has an order that depends on the topology. Here each rank gets its part of the numbers from all others, adds
//! them in the order of the ranks, and gives the sum to all: as many bytes as a ring moves, and the same bits as over TCP.

use std::sync::Arc;
use std::time::Duration;

use kernels::collective::{Collective, ID_BYTES, new_id};
use kernels::{Device, Tensor};

use super::communicator::{Communicator, in_buckets};
use super::error::{ReplicaError, Result};
use super::health::{Doing, Health};

/// What moves the numbers of a device between ranks.
pub trait Mover {
    /// Row j of `x` [world, n] to rank j; what each rank gave to this one, [world, n].
    ///
    /// # Errors
    /// A device or a connection that fails.
    fn all_to_all(&self, x: &Tensor) -> kernels::Result<Tensor>;

    /// The `x` `[n]` of all ranks, [world, n].
    ///
    /// # Errors
    /// A device or a connection that fails.
    fn all_gather(&self, x: &Tensor) -> kernels::Result<Tensor>;
}

impl Mover for Collective {
    fn all_to_all(&self, x: &Tensor) -> kernels::Result<Tensor> {
        Self::all_to_all(self, x)
    }

    fn all_gather(&self, x: &Tensor) -> kernels::Result<Tensor> {
        Self::all_gather(self, x)
    }
}

/// A group of which nothing is moved, for forecasts: what it takes on a device is what the real one takes.
#[derive(Debug, Clone, Copy)]
pub struct Pretended {
    /// Ranks of the group.
    pub world: usize,
}

impl Mover for Pretended {
    fn all_to_all(&self, x: &Tensor) -> kernels::Result<Tensor> {
        x.zeros_like()
    }

    fn all_gather(&self, x: &Tensor) -> kernels::Result<Tensor> {
        Tensor::zeros((self.world, x.elem_count()), x.dtype(), x.device())
    }
}

/// The sums of tensors of one device, f32, over `world` ranks in their order, moved by `mover`, a bucket at a time.
///
/// # Errors
/// A device or a connection that fails.
pub fn sum_on_device(tensors: Vec<Tensor>, world: usize, mover: &impl Mover) -> crate::Result<Vec<Tensor>> {
    in_buckets(tensors, |bucket| {
        let flat = bucket.iter().map(Tensor::flatten_all).collect::<kernels::Result<Vec<_>>>()?;
        let sum = sum_of_numbers(&Tensor::cat(&flat, 0)?, world, mover)?;
        let mut at = 0;
        let own = |tensor: &Tensor| {
            let count = tensor.elem_count();
            at += count;
            sum.narrow(0, at - count, count)?.reshape(tensor.shape().clone())
        };
        Ok(bucket.iter().map(own).collect::<kernels::Result<_>>()?)
    })
}

/// The sum of `x` `[n]` over all ranks.
fn sum_of_numbers(x: &Tensor, world: usize, mover: &impl Mover) -> kernels::Result<Tensor> {
    let count = x.elem_count();
    let part = count.div_ceil(world).max(1);
    let padded = match part * world - count {
        0 => x.clone(),
        more => x.pad_with_zeros(0, 0, more)?,
    };
    let parts = mover.all_to_all(&padded.reshape((world, part))?)?;
    let mut sum = parts.get(0)?;
    for rank in 1..world {
        sum = (sum + parts.get(rank)?)?;
    }
    mover.all_gather(&sum)?.flatten_all()?.narrow(0, 0, count)
}

/// A group for each device of this rank; the devices of all ranks correspond by their order.
pub(super) struct Nccl {
    small: Box<dyn Communicator>,
    groups: Vec<(Device, Collective)>,
    world: usize,
    health: Arc<Health>,
}

impl Nccl {
    /// Joins a group for each of `devices`, in which all ranks are, and takes `small` for messages.
    ///
    /// # Errors
    /// NCCL that is missing or does not take a GPU, and ranks that fail.
    pub fn join(
        mut small: Box<dyn Communicator>,
        devices: &[Device],
        (rank, world): (usize, usize),
        health: Arc<Health>,
    ) -> Result<Self> {
        let failed = |why: String| {
            let why = format!(
                "{why}. `tandem doctor` says which NCCL is found; devices.exchange = \"tcp\" does without it, slower"
            );
            ReplicaError::Nccl { why }
        };
        let mut groups = Vec::new();
        for device in devices {
            let own = if rank == 0 { new_id().map_err(failed)?.to_vec() } else { Vec::new() };
            let id = small.broadcast(own)?;
            let id: [u8; ID_BYTES] = id.try_into().map_err(|_| failed("rank 0 sent no identity".into()))?;
            let before = health.enter(Doing::Waiting);
            let group = Collective::join(device, id, (rank, world));
            health.enter(before);
            groups.push((device.clone(), group.map_err(failed)?));
        }
        Ok(Self { small, groups, world, health })
    }
}

impl Communicator for Nccl {
    fn name(&self) -> &'static str {
        "NCCL"
    }

    fn sum(&mut self, tensors: Vec<Tensor>) -> crate::Result<Vec<Tensor>> {
        self.health.check()?;
        let before = self.health.enter(Doing::Waiting);
        let sums = sum_by_device(tensors, self.world, &self.groups);
        // Waited for here, so that a group that never answers is known to be what this rank waits for.
        let waited = self.groups.iter().try_for_each(|(device, _)| device.synchronize());
        self.health.enter(before);
        // A rank that has gone explains it better than NCCL does.
        match sums.and_then(|sums| waited.map(|()| sums).map_err(Into::into)) {
            Ok(sums) => Ok(sums),
            Err(error) => {
                std::thread::sleep(Duration::from_millis(500));
                self.health.check()?;
                Err(error)
            }
        }
    }

    fn gather(&mut self, message: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.small.gather(message)
    }

    fn broadcast(&mut self, bytes: Vec<u8>) -> Result<Vec<u8>> {
        self.small.broadcast(bytes)
    }
}

/// Sums the tensors of each device in its group; all of them, in their order.
fn sum_by_device(
    tensors: Vec<Tensor>,
    world: usize,
    groups: &[(Device, Collective)],
) -> crate::Result<Vec<Tensor>> {
    let home = |tensor: &Tensor| groups.iter().position(|(device, _)| device.same_device(tensor.device()));
    let homes: Vec<Option<usize>> = tensors.iter().map(home).collect();
    let mut own: Vec<Vec<Tensor>> = groups.iter().map(|_| Vec::new()).collect();
    for (tensor, home) in tensors.into_iter().zip(&homes) {
        let why = || "a gradient is on a device that is in no group".to_owned();
        let home = home.ok_or_else(|| ReplicaError::OutOfStep { why: why() })?;
        own[home].push(tensor);
    }
    let summed = own.into_iter().zip(groups);
    let sums: Vec<Vec<Tensor>> = summed
        .map(|(tensors, (_, group))| sum_on_device(tensors, world, group))
        .collect::<crate::Result<_>>()?;
    let mut sums: Vec<_> = sums.into_iter().map(Vec::into_iter).collect();
    // As many as went in, device by device.
    Ok(homes.into_iter().filter_map(|home| sums[home?].next()).collect())
}
