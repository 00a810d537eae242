//! The activations that a forward keeps for its backward, layer by layer, on the device or offloaded.

use kernels::Tensor;
use kernels::transfer::{HostStore, Parked};

use super::layer::Saved;
use super::plan::{KeepPlace, Plans};
use crate::Result;

/// What a forward keeps: the plans of the layers, and the host memory to offload to.
#[derive(Debug, Clone, Copy)]
pub struct Keeping<'a> {
    /// Of every layer that runs.
    pub plans: &'a Plans,
    /// Where offloaded activations are stored.
    pub store: &'a HostStore,
}

/// The activations that a part of a model keeps for its backward, layer by layer.
#[derive(Debug, Default)]
pub struct Kept {
    layers: Vec<KeptLayer>,
}

#[derive(Debug)]
enum KeptLayer {
    Here(Saved),
    Parked(Saved<Parked>),
    /// Offloaded, and copied back only when it is used (no prefetch).
    ParkedUntilUsed(Saved<Parked>),
}

impl Kept {
    /// Adds the activations of the next layer.
    pub(super) fn push(&mut self, saved: Saved, place: KeepPlace, store: &HostStore) -> Result<()> {
        let saved = saved.map(&mut |x| labelled(x, "kept"))?;
        self.layers.push(match place {
            KeepPlace::Device => KeptLayer::Here(saved),
            KeepPlace::Host => KeptLayer::Parked(parked(saved, store)?),
            KeepPlace::HostUntilUsed => KeptLayer::ParkedUntilUsed(parked(saved, store)?),
        });
        Ok(())
    }

    /// The activations of the last layer, on its device. Those of the layer before are prefetched, so that their copy overlaps
    /// with this layer's backward.
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

/// `x`, labelled `label` in its device's ledger, if it has one.
fn labelled(x: Tensor, label: &'static str) -> Result<Tensor> {
    x.relabel(label);
    Ok(x)
}

/// Offloads the activations of a layer.
fn parked(saved: Saved, store: &HostStore) -> Result<Saved<Parked>> {
    store.next_group()?;
    saved.map(&mut |x: Tensor| Ok(store.park(x)?))
}
