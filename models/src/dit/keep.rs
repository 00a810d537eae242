//! What a forward leaves for its backward, layer by layer, and how it waits.

use kernels::Tensor;
use kernels::transfer::{HostStore, Parked};

use super::layer::Saved;
use super::plan::{Place, Plans};
use crate::Result;

/// What becomes of a forward: the plans of the layers, and the host memory beside the device.
#[derive(Debug, Clone, Copy)]
pub struct Keeping<'a> {
    /// Of every layer that goes forward.
    pub plans: &'a Plans,
    /// Where layers park that wait in host memory.
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
    /// Parked, and not asked back ahead of its use.
    Asleep(Saved<Parked>),
}

impl Kept {
    /// Takes in what the next layer leaves.
    pub(super) fn push(&mut self, saved: Saved, place: Place, store: &HostStore) -> Result<()> {
        self.layers.push(match place {
            Place::Device => KeptLayer::Here(saved),
            Place::Host => KeptLayer::Parked(parked(saved, store)?),
            Place::HostUntilUsed => KeptLayer::Asleep(parked(saved, store)?),
        });
        Ok(())
    }

    /// What the last layer left, on its device; the one before it is asked back, so that it comes while this one works.
    pub(super) fn pop(&mut self) -> Result<Option<Saved>> {
        let saved = match self.layers.pop() {
            None => return Ok(None),
            Some(KeptLayer::Here(saved)) => saved,
            Some(KeptLayer::Parked(parked) | KeptLayer::Asleep(parked)) => {
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
        Ok(Some(saved))
    }
}

/// Sends out all that a layer leaves.
fn parked(saved: Saved, store: &HostStore) -> Result<Saved<Parked>> {
    store.next_group()?;
    saved.map(&mut |x: Tensor| Ok(store.park(x)?))
}
