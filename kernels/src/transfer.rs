//! Transfers: from one device to another, and to pinned host memory and back (offload).
//!
//! Every copy is asynchronous and ordered by events; the host never waits. A source is kept alive until its copy is
//! done: candle alone would free it too early.

mod counted;
mod fetch;
mod reading;
pub(crate) mod route;

use std::sync::Arc;

use crate::Result;
#[cfg(feature = "cuda")]
use crate::cuda::copies;
use crate::ledger::Label;
use crate::profile::{self, Class};
use crate::{Device, Tensor};

pub use fetch::{Arriving, Fetcher};
pub use reading::Reading;
pub use route::{HOST_GRAIN, Route};

/// About how much is pinned at once: large enough to waste little, small enough to show progress.
const SLAB: u64 = 1 << 30;

/// The slabs, in bytes, for all of `buffers` (bytes, count) at once: each is a multiple of the largest buffer, and smaller
/// ones fill the rest (first fit, the largest first).
pub fn slabs(buffers: &[(u64, usize)]) -> Vec<u64> {
    let mut sizes: Vec<u64> = Vec::new();
    for &(bytes, count) in buffers {
        sizes.extend(std::iter::repeat_n(bytes.next_multiple_of(crate::arena::GRAIN), count));
    }
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    let Some(&largest) = sizes.first().filter(|largest| **largest > 0) else { return Vec::new() };
    let slab = largest * (SLAB / largest).max(1);
    let mut used: Vec<u64> = Vec::new();
    for size in sizes {
        match used.iter_mut().find(|used| **used + size <= slab) {
            Some(used) => *used += size,
            None => used.push(size),
        }
    }
    used.into_iter().map(|bytes| bytes.next_multiple_of(HOST_GRAIN)).collect()
}

/// A link from one device to another.
#[derive(Debug)]
pub struct Link {
    to: Device,
    way: Way,
}

#[derive(Debug)]
enum Way {
    /// candle copies the tensor when it is received.
    Plain,
    /// Between devices whose memory is counted.
    Counted(counted::Sources),
    #[cfg(feature = "cuda")]
    Cards(copies::Link),
}

/// A tensor that was sent and not yet received.
#[derive(Debug)]
pub struct Sent {
    to: Device,
    x: On,
}

#[derive(Debug)]
enum On {
    /// Copied when it is received.
    Source(Tensor),
    /// The same, where it is counted.
    Counted(Tensor, counted::Copy),
    #[cfg(feature = "cuda")]
    Way(copies::Sent),
}

impl Link {
    /// The link from `from` to `to`; both may be the same device, or the CPU.
    pub fn new(from: &Device, to: &Device, route: Route) -> Result<Self> {
        let to = to.clone();
        #[cfg(feature = "cuda")]
        if let (Some(a), Some(b), false) = (from.card(), to.card(), from.same_device(&to)) {
            let way = Way::Cards(copies::Link::new(a.clone(), b.clone(), route)?);
            return Ok(Self { to, way });
        }
        let is_counted = !from.same_device(&to) && (from.ledger().is_some() || from.is_shadow());
        let way = match is_counted {
            true => Way::Counted(counted::Sources::of_link(from, &to, route)),
            false => Way::Plain,
        };
        Ok(Self { to, way })
    }

    /// Whether tensors are copied directly from one GPU's memory to the other's.
    pub fn is_peer(&self) -> bool {
        match &self.way {
            #[cfg(feature = "cuda")]
            Way::Cards(cards) => cards.is_peer(),
            Way::Plain | Way::Counted(_) => false,
        }
    }

    /// How many sent tensors still take memory on the sending device.
    pub fn live(&self) -> usize {
        match &self.way {
            Way::Plain => 0,
            Way::Counted(sources) => sources.live(),
            #[cfg(feature = "cuda")]
            Way::Cards(cards) => cards.live(),
        }
    }

    /// Frees the sent tensors that have been received since. A sent tensor takes memory until then, so the sender calls this
    /// once the other side has replied.
    pub fn settle(&self) -> Result<()> {
        match &self.way {
            Way::Plain => {}
            Way::Counted(sources) => sources.settle(),
            #[cfg(feature = "cuda")]
            Way::Cards(cards) => cards.settle()?,
        }
        Ok(())
    }

    /// Sends `x`; called by the stage that computed it.
    pub fn send(&self, x: Tensor) -> Result<Sent> {
        let _noted = profile::scope(Class::Copy, x.device());
        let x = match &self.way {
            Way::Plain => On::Source(x),
            Way::Counted(sources) => {
                let (x, copy) = sources.hold(x)?;
                On::Counted(x, copy)
            }
            #[cfg(feature = "cuda")]
            Way::Cards(cards) => On::Way(cards.send(x)?),
        };
        Ok(Sent { to: self.to.clone(), x })
    }
}

impl Sent {
    /// Marks a counted copy as done though nothing receives it: for forecasts of a sender alone.
    pub fn arrive(&self) {
        if let On::Counted(_, copy) = &self.x {
            copy.finish();
        }
    }

    /// The tensor on the other device; called by the stage that uses it.
    pub fn receive(self) -> Result<Tensor> {
        let _noted = profile::scope(Class::Copy, &self.to);
        match self.x {
            On::Source(x) => x.to_device(&self.to),
            On::Counted(x, copy) => {
                copy.finish();
                x.to_device(&self.to)
            }
            #[cfg(feature = "cuda")]
            On::Way(sent) => sent.receive(),
        }
    }
}

/// Pinned host memory of a device, where offloaded tensors wait until they are used; buffers are reused.
#[derive(Debug, Clone)]
pub struct HostStore {
    memory: Apart,
}

/// Which memory a store uses.
#[derive(Debug, Clone)]
enum Apart {
    /// The device's own: the device is the CPU.
    No,
    /// Counted, for the shadow of a GPU.
    Counted(Arc<counted::Store>),
    #[cfg(feature = "cuda")]
    Pinned(Arc<copies::Store>),
}

/// A tensor that was offloaded to host memory. On the CPU it is the tensor itself.
#[derive(Debug)]
pub struct Parked {
    x: Waiting,
}

#[derive(Debug)]
enum Waiting {
    Here(Tensor),
    Counted(counted::Parked),
    #[cfg(feature = "cuda")]
    Out(copies::Parked),
}

impl HostStore {
    /// A store of `device`, for tensors whose sizes are known ahead: [`Self::reserve`].
    ///
    /// # Errors
    /// When the device fails.
    pub fn new(device: &Device) -> Result<Self> {
        Self::counted(device, "parked", 1)
    }

    /// A store of `device` without reserves: each tensor's memory is pinned when it first leaves, by itself.
    ///
    /// # Errors
    /// When the device fails.
    pub fn unreserved(device: &Device) -> Result<Self> {
        Self::counted(device, "resting", HOST_GRAIN)
    }

    /// A store of `device` for weights that stay in host memory, whose sizes are known ahead: [`Self::reserve`].
    ///
    /// # Errors
    /// When the device fails.
    pub fn streamed(device: &Device) -> Result<Self> {
        Self::counted(device, "streamed", 1)
    }

    /// A store whose buffers, where they are counted, are `label` in multiples of `grain` bytes.
    fn counted(device: &Device, label: Label, grain: u64) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if let Some(card) = device.card() {
            return Ok(Self { memory: Apart::Pinned(copies::Store::new(card.clone())?) });
        }
        let memory = match device.as_shadow_gpu() {
            Some(_) => Apart::Counted(Arc::new(counted::Store::new(device, label, grain))),
            None => Apart::No,
        };
        Ok(Self { memory })
    }

    /// Starts copying `x`, a tensor of this device, to host memory; its device memory is freed once the copy is done.
    pub fn park(&self, x: Tensor) -> Result<Parked> {
        let _noted = profile::scope(Class::Copy, x.device());
        let x = match &self.memory {
            Apart::No => Waiting::Here(x),
            Apart::Counted(store) => Waiting::Counted(store.park(x)?),
            #[cfg(feature = "cuda")]
            Apart::Pinned(store) => Waiting::Out(store.park(x)?),
        };
        Ok(Parked { x })
    }

    /// Begins a group of tensors that leave together, such as what a block keeps: for the group before the device waits,
    /// which had a block's time to go, so that one group at most takes memory twice.
    pub fn next_group(&self) -> Result<()> {
        match &self.memory {
            Apart::No => {}
            Apart::Counted(store) => store.next_group(),
            #[cfg(feature = "cuda")]
            Apart::Pinned(store) => store.next_group()?,
        }
        Ok(())
    }

    /// Pins slabs of these sizes in bytes ahead of their use, one after the other. Pinning is slow, so it
    /// is done on a thread of its own while a model loads. `go_on` is called before each slab with the bytes pinned so
    /// far, and stops it by `false`.
    ///
    /// # Errors
    /// When the system has no more memory to pin.
    pub fn reserve(&self, slabs: &[u64], go_on: &dyn Fn(u64) -> bool) -> Result<()> {
        #[cfg(not(feature = "cuda"))]
        let _ = (slabs, go_on);
        #[cfg(feature = "cuda")]
        if let Apart::Pinned(store) = &self.memory {
            store.pinned().reserve(slabs, go_on)?;
        }
        Ok(())
    }

    /// Lets the store pin so many bytes at most while some of them are idle: before it would pin more it gives idle slabs
    /// back. Without this it keeps all for their next use.
    pub fn set_limit(&self, bytes: u64) {
        #[cfg(not(feature = "cuda"))]
        let _ = bytes;
        #[cfg(feature = "cuda")]
        if let Apart::Pinned(store) = &self.memory {
            store.pinned().set_limit(bytes);
        }
    }

    /// Bytes of host memory that the store holds, in use or not.
    pub fn bytes(&self) -> u64 {
        match &self.memory {
            #[cfg(feature = "cuda")]
            Apart::Pinned(store) => store.pinned().bytes(),
            Apart::No | Apart::Counted(_) => 0,
        }
    }
}

impl Parked {
    /// Starts copying back, so that [`Parked::take`] need not wait. Called one block ahead.
    pub fn prefetch(&mut self) -> Result<()> {
        match &mut self.x {
            Waiting::Here(_) => Ok(()),
            Waiting::Counted(parked) => {
                parked.prefetch();
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Waiting::Out(parked) => parked.prefetch(),
        }
    }

    /// Its bytes, without going back to the device; waits for its copy alone, not for what was queued after it. `None` of a
    /// shadow.
    ///
    /// # Errors
    /// If it is not u8.
    pub fn into_bytes(self) -> Result<Option<Vec<u8>>> {
        match self.x {
            Waiting::Here(x) if x.is_shadow() => Ok(None),
            Waiting::Here(x) => Ok(Some(x.flatten_all()?.to_vec1()?)),
            Waiting::Counted(_) => Ok(None),
            #[cfg(feature = "cuda")]
            Waiting::Out(parked) => parked.into_bytes().map(Some),
        }
    }

    /// The tensor on its device again, to the bit.
    pub fn take(self) -> Result<Tensor> {
        match self.x {
            Waiting::Here(x) => Ok(x),
            Waiting::Counted(parked) => Ok(parked.take()),
            #[cfg(feature = "cuda")]
            Waiting::Out(parked) => parked.take(),
        }
    }
}
