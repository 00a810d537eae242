//! What a forward leaves for its backward, layer by layer, and how it waits.

use kernels::Tensor;
use kernels::transfer::{HostStore, Parked};

use super::layer::Saved;
use super::plan::{Place, Plans};
use crate::Result;

/// How a forward is kept: the plans of the layers, and the host memory to offload to.
#[derive(Debug, Clone, Copy)]
pub struct Keeping<'a> {
    /// Of every layer that goes forward.
    pub plans: &'a Plans,
    /// Where offloaded layers wait.
    pub store: &'a HostStore,
}

/// What a part keeps of its forward for its backward, layer by layer.
#[derive(Debug, Default)]
pub struct Kept {
    layers: Vec<KeptLayer>,
}

#[derive(Debug)]
enum KeptLayer {
    Here(Saved),
    Parked(Saved<Parked>),
    /// Parked, and not prefetched: it comes back when it is used.
    ParkedUntilUsed(Saved<Parked>),
}

impl Kept {
    /// Takes in what the next layer leaves.
    pub(super) fn push(&mut self, saved: Saved, place: Place, store: &HostStore) -> Result<()> {
        let saved = saved.map(&mut |x| labelled(x, "kept"))?;
        self.layers.push(match place {
            Place::Device => KeptLayer::Here(saved),
            Place::Host => KeptLayer::Parked(parked(saved, store)?),
            Place::HostUntilUsed => KeptLayer::ParkedUntilUsed(parked(saved, store)?),
        });
        Ok(())
    }

    /// What the last layer left, on its device. The layer before it is prefetched, so that its copy runs while this one works.
    pub(super) fn pop(&mut self) -> Result<Option<Saved>> {
        let saved = match self.layers.pop() {
            None => return Ok(None),
            Some(KeptLayer::Here(saved)) => saved,
            Some(KeptLayer::Parked(parked) | KeptLayer::ParkedUntilUsed(parked)) => {
                parked.map(&mut |x: Parked| Ok(x.take()?))?
            }
        };
        if let Some(KeptLayer::Parked(parked)) =
            self.layers.pop_if(|next| matches!(next, KeptLayer::Parked(_)))
        {
            let coming = parked.map(&mut |mut x: Parked| {
                x.prefetch()?;
                Ok(x)
            })?;
            self.layers.push(KeptLayer::Parked(coming));
        }
        saved.map(&mut |x| labelled(x, "block")).map(Some)
    }
}

/// `x`, counted as `label` where its device counts.
fn labelled(x: Tensor, label: &'static str) -> Result<Tensor> {
    x.relabel(label);
    Ok(x)
}

/// Sends out all that a layer leaves.
fn parked(saved: Saved, store: &HostStore) -> Result<Saved<Parked>> {
    store.next_group()?;
    saved.map(&mut |x: Tensor| Ok(store.park(x)?))
}
